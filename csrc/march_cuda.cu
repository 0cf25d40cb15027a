#include "cuda_launch.h"
#include "march.h"

namespace factorkit {
namespace {

// Rays of a block. One warp, so that few rays reach many multiprocessors: 4096 rays are 128 blocks. The registers of a
// ray, not the number of blocks, limit how many rays a multiprocessor takes.
constexpr int kRays = 32;

__device__ __forceinline__ std::int64_t ray_index() { return std::int64_t(blockIdx.x) * kRays + threadIdx.x; }

unsigned ray_blocks(std::int64_t rays) { return blocks_for(rays, kThreads / kRays); }

// One thread a ray: what a ray does depends on the cells it meets, and neighbours meet much the same ones.
template <class S>
__global__ void __launch_bounds__(kRays) count(const March<S> p, std::int64_t* counts) {
    const std::int64_t i = ray_index();
    if (i < p.rays.count) counts[i] = count_ray(p, i);
}

template <class S>
__global__ void __launch_bounds__(kRays) write(const March<S> p, const MarchOutputs<S> out) {
    const std::int64_t i = ray_index();
    if (i < p.rays.count) write_ray(p, out, i);
}

// Where the samples end is known on the device alone, so every sample of the capacity gets a thread.
template <class S>
__global__ void __launch_bounds__(kThreads) clear_rest(const MarchOutputs<S> out, std::int64_t rays) {
    const std::int64_t i = thread_index();
    if (i < out.size && i >= out.offsets[rays]) clear_sample(out, i);
}

}  // namespace

template <class S>
void march_count_cuda(const March<S>& p, std::int64_t* counts, void* stream) {
    if (p.rays.count == 0) return;
    count<<<ray_blocks(p.rays.count), kRays, 0, static_cast<cudaStream_t>(stream)>>>(p, counts);
    check_launch("march_count");
}

template <class S>
void march_write_cuda(const March<S>& p, const MarchOutputs<S>& out, void* stream) {
    if (out.size == 0) return;
    clear_rest<<<blocks_for(out.size), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(out, p.rays.count);
    check_launch("the end of march_write");
    if (p.rays.count == 0) return;
    write<<<ray_blocks(p.rays.count), kRays, 0, static_cast<cudaStream_t>(stream)>>>(p, out);
    check_launch("march_write");
}

#define FACTORKIT_INSTANTIATE(S)                                                   \
    template void march_count_cuda(const March<S>&, std::int64_t*, void*);         \
    template void march_write_cuda(const March<S>&, const MarchOutputs<S>&, void*);
FACTORKIT_INSTANTIATE(float)
FACTORKIT_INSTANTIATE(double)

}  // namespace factorkit
