#include "intersect.h"

#include "threads.h"

namespace factorkit {

using std::int64_t;

template <class S>
void intersect(const Rays<S>& rays, const Box<S>& box, S* near, S* far, int threads) {
    parallel_for(rays.count, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) intersect_ray(rays, box, near, far, i);
    });
}

template <class S>
void intersect_backward(const Rays<S>& rays, const Box<S>& box, const S* d_near, const S* d_far, S* d_origins,
                        S* d_directions, int threads) {
    parallel_for(rays.count, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            intersect_ray_backward(rays, box, d_near, d_far, d_origins, d_directions, i);
    });
}

#define FACTORKIT_INSTANTIATE(S)                                                \
    template void intersect(const Rays<S>&, const Box<S>&, S*, S*, int);      \
    template void intersect_backward(const Rays<S>&, const Box<S>&, const S*, const S*, S*, S*, int);
FACTORKIT_INSTANTIATE(float)
FACTORKIT_INSTANTIATE(double)

}  // namespace factorkit
