#include "cuda_launch.h"
#include "resample.h"

namespace factorkit {
namespace {

template <class S>
__global__ void __launch_bounds__(kThreads) quantiles(const Resample<S> p, S* edges) {
    const std::int64_t i = thread_index();
    if (i < p.rays) resample_ray(p, edges, i);
}

}  // namespace

template <class S>
void resample_cuda(const Resample<S>& p, S* edges, void* stream) {
    if (p.rays == 0) return;
    quantiles<<<blocks_for(p.rays), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, edges);
    check_launch("sample_pdf");
}

template void resample_cuda(const Resample<float>&, float*, void*);
template void resample_cuda(const Resample<double>&, double*, void*);

}  // namespace factorkit
