#include "cuda_launch.h"
#include "intersect.h"

namespace factorkit {
namespace {

template <class S>
__global__ void __launch_bounds__(kThreads) forward(const Rays<S> rays, const Box<S> box, S* near, S* far) {
    const std::int64_t i = thread_index();
    if (i < rays.count) intersect_ray(rays, box, near, far, i);
}

template <class S>
__global__ void __launch_bounds__(kThreads) backward(const Rays<S> rays, const Box<S> box, const S* d_near,
                                                     const S* d_far, S* d_origins, S* d_directions) {
    const std::int64_t i = thread_index();
    if (i < rays.count) intersect_ray_backward(rays, box, d_near, d_far, d_origins, d_directions, i);
}

}  // namespace

template <class S>
void intersect_cuda(const Rays<S>& rays, const Box<S>& box, S* near, S* far, void* stream) {
    if (rays.count == 0) return;
    forward<<<blocks_for(rays.count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(rays, box, near, far);
    check_launch("intersect");
}

template <class S>
void intersect_backward_cuda(const Rays<S>& rays, const Box<S>& box, const S* d_near, const S* d_far, S* d_origins,
                             S* d_directions, void* stream) {
    if (rays.count == 0) return;
    backward<<<blocks_for(rays.count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(rays, box, d_near, d_far,
                                                                                         d_origins, d_directions);
    check_launch("the gradient of intersect");
}

#define FACTORKIT_INSTANTIATE(S)                                                         \
    template void intersect_cuda(const Rays<S>&, const Box<S>&, S*, S*, void*);        \
    template void intersect_backward_cuda(const Rays<S>&, const Box<S>&, const S*, const S*, S*, S*, void*);
FACTORKIT_INSTANTIATE(float)
FACTORKIT_INSTANTIATE(double)

}  // namespace factorkit
