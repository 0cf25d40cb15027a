#include "resample.h"

#include "threads.h"

namespace factorkit {

template <class S>
void resample(const Resample<S>& p, S* edges, int threads) {
    parallel_for_uneven(p.rays, 64, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) resample_ray(p, edges, i);
    });
}

template void resample(const Resample<float>&, float*, int);
template void resample(const Resample<double>&, double*, int);

}  // namespace factorkit
