// Launching kernels: one thread an index, and errors that name the kernel. For .cu files only.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include <cuda_runtime.h>

namespace factorkit {

constexpr int kThreads = 256;

inline void check_launch(const char* kernel) {
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess)
        throw std::runtime_error(std::string("launching ") + kernel + " on CUDA: " + cudaGetErrorString(status));
}

// Blocks that give every one of `count` indices a group of `group` threads.
inline unsigned blocks_for(std::int64_t count, int group = 1) {
    const std::int64_t per_block = kThreads / group, blocks = (count + per_block - 1) / per_block;
    if (blocks > 0x7FFFFFFF) throw std::runtime_error("more rays or samples than one CUDA launch can hold");
    return unsigned(blocks);
}

__device__ __forceinline__ std::int64_t thread_index() { return std::int64_t(blockIdx.x) * kThreads + threadIdx.x; }

}  // namespace factorkit
