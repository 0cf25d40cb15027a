// Marks a function that both the CPU loops and the CUDA kernels call.
#pragma once

#ifdef __CUDACC__
#define FACTORKIT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FACTORKIT_HOST_DEVICE inline __attribute__((always_inline))
#endif
