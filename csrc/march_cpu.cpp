#include "march.h"

#include "simd.h"
#include "threads.h"

namespace factorkit {
namespace {

using std::int64_t;

constexpr int64_t kRays = 64;  // what a thread takes at a time

template <class S>
FACTORKIT_INLINE void write_rays(const March<S>& p, const MarchOutputs<S>& out, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) write_ray(p, out, i);
}

template <class S>
FACTORKIT_INLINE void count_rays(const March<S>& p, int64_t* counts, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) counts[i] = count_ray(p, i);
}

FACTORKIT_CLONES void run(const March<float>& p, int64_t* counts, int64_t a, int64_t b) { count_rays(p, counts, a, b); }
FACTORKIT_CLONES void run(const March<double>& p, int64_t* counts, int64_t a, int64_t b) {
    count_rays(p, counts, a, b);
}
FACTORKIT_CLONES void run(const March<float>& p, const MarchOutputs<float>& out, int64_t a, int64_t b) {
    write_rays(p, out, a, b);
}
FACTORKIT_CLONES void run(const March<double>& p, const MarchOutputs<double>& out, int64_t a, int64_t b) {
    write_rays(p, out, a, b);
}

}  // namespace

template <class S>
void march_count(const March<S>& p, int64_t* counts, int threads) {
    parallel_for_uneven(p.rays.count, kRays, threads, [&](int64_t a, int64_t b) { run(p, counts, a, b); });
}

template <class S>
void march_write(const March<S>& p, const MarchOutputs<S>& out, int threads) {
    parallel_for_uneven(p.rays.count, kRays, threads, [&](int64_t a, int64_t b) { run(p, out, a, b); });
    for (int64_t i = std::max<int64_t>(0, out.offsets[p.rays.count]); i < out.size; ++i) clear_sample(out, i);
}

template void march_count(const March<float>&, int64_t*, int);
template void march_count(const March<double>&, int64_t*, int);
template void march_write(const March<float>&, const MarchOutputs<float>&, int);
template void march_write(const March<double>&, const MarchOutputs<double>&, int);

}  // namespace factorkit
