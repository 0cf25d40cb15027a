#include "intersect.h"

#include "threads.h"

namespace factorkit {

using std::int64_t;

template <class S>
void intersect(const Rays<S>& rays, const Shape<S>& shape, S* near, S* far, int threads) {
    parallel_for(rays.count, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) intersect_ray(rays, shape, near, far, i);
    });
}

template <class S>
void intersect_backward(const Rays<S>& rays, const Shape<S>& shape, const S* d_near, const S* d_far, S* d_origins,
                        S* d_directions, int threads) {
    parallel_for(rays.count, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            intersect_ray_backward(rays, shape, d_near, d_far, d_origins, d_directions, i);
    });
}

#define FACTORKIT_INSTANTIATE(S)                                                \
    template void intersect(const Rays<S>&, const Shape<S>&, S*, S*, int);      \
    template void intersect_backward(const Rays<S>&, const Shape<S>&, const S*, const S*, S*, S*, int);
FACTORKIT_INSTANTIATE(float)
FACTORKIT_INSTANTIATE(double)

}  // namespace factorkit
