#include "composite.h"

#include <algorithm>
#include <vector>

#include "simd.h"
#include "threads.h"

namespace factorkit {
namespace {

using std::int64_t;

constexpr int64_t kRays = 16;  // what a thread takes at a time

// The samples of one ray up to its early stop, and what the quadrature makes of them. Every loop is over samples and
// vectorises, but for the running sums, which are kept in double: their rounding would grow with the ray.
template <class T>
struct Ray {
    using S = wide_t<T>;
    const Composite<T>& p;
    int64_t begin = 0, count = 0, used = 0;
    S total = 0;  // optical depth of all that is used
    std::vector<S> memory;
    S *sigma, *length, *mid, *before, *passed, *stopped, *weight, *value, *d_tau, *below, *spread;

    explicit Ray(const Composite<T>& p) : p(p) {}

    // Optical depth in front of each sample. Without `limit`, `used` is known already.
    FACTORKIT_INLINE void read(int64_t ray, const S* limit) {
        const Span span = ray_span(p, ray);
        begin = span.begin;
        count = span.count;
        if (int64_t(memory.size()) < 11 * count) memory.resize(11 * count);
        S** const parts[] = {&sigma,  &length, &mid,   &before, &passed, &stopped,
                             &weight, &value,  &d_tau, &below,  &spread};
        for (int i = 0; i < 11; ++i) *parts[i] = memory.data() + i * count;
        const T* density = p.sigma + begin;
        const S *t0 = p.t_start + begin, *t1 = p.t_end + begin;
        const int64_t n = limit ? count : used;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            sigma[i] = to_float(density[i]);
            length[i] = t1[i] - t0[i];
            mid[i] = S(0.5) * (t0[i] + t1[i]);
            d_tau[i] = optical_depth(sigma[i], length[i]);
        }
        double sum = 0;
        int64_t i = 0;
        for (; i < n; ++i) {
            before[i] = S(sum);
            if (limit && before[i] > *limit) break;
            sum += d_tau[i];
        }
        used = i;
        total = S(sum);
#pragma omp simd
        for (int64_t i = 0; i < used; ++i) {
            const Attenuation<S> here = attenuate(d_tau[i]);
            before[i] = attenuate(before[i]).passed;  // from here on the transmittance
            passed[i] = here.passed;
            stopped[i] = here.stopped;
            weight[i] = before[i] * here.stopped;
        }
    }

    // below_i = sum_{j<i} w_j and spread_i = sum_{j<i} w_j (m_i - m_j), as sums of positive numbers.
    FACTORKIT_INLINE void spread_below() {
        double mass = 0, distance = 0;
        for (int64_t i = 0; i < used; ++i) {
            if (i > 0) distance += mass * (mid[i] - mid[i - 1]);
            below[i] = S(mass);
            spread[i] = S(distance);
            mass += weight[i];
        }
    }
};

template <class T, int C>
FACTORKIT_INLINE void forward_rays(const Composite<T>& p, const CompositeOutputs<wide_t<T>>& out, int64_t first,
                                   int64_t last) {
    using S = wide_t<T>;
    Ray<T> ray(p);
    const int channels = C ? C : p.channels;
    const S limit = stop_depth(p.early_stop);
    for (int64_t r = first; r < last; ++r) {
        ray.read(r, &limit);
        const S *weight = ray.weight, *mid = ray.mid;
        const T* rgb = p.rgb + ray.begin * channels;
        S color[C ? C : kMaxChannels] = {};
        for (int64_t i = 0; i < ray.used; ++i)
            for (int c = 0; c < channels; ++c) color[c] += weight[i] * to_float(rgb[i * channels + c]);
        S depth = 0;
#pragma omp simd reduction(+ : depth)
        for (int64_t i = 0; i < ray.used; ++i) depth += weight[i] * mid[i];
        const Attenuation<S> whole = attenuate(ray.total);
        const S* background = p.background ? p.background + (p.background_shared ? 0 : r * channels) : nullptr;
        for (int c = 0; c < channels; ++c)
            out.color[r * channels + c] = color[c] + (background ? whole.passed * background[c] : S(0));
        out.depth[r] = depth;
        out.opacity[r] = whole.stopped;
        out.used[r] = ray.used;
        if (out.weights) {
            std::copy(weight, weight + ray.used, out.weights + ray.begin);
            std::fill(out.weights + ray.begin + ray.used, out.weights + ray.begin + ray.count, S(0));
        }
        if (out.distortion) {
            ray.spread_below();
            S sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < ray.used; ++i)
                sum += weight[i] * (2 * ray.spread[i] + weight[i] * ray.length[i] * S(1.0 / 3));
            out.distortion[r] = sum;
        }
    }
}

template <class T, int C>
FACTORKIT_INLINE void backward_rays(const Composite<T>& p, const CompositeGradients<T>& d, int64_t first,
                                    int64_t last) {
    using S = wide_t<T>;
    Ray<T> ray(p);
    const int channels = C ? C : p.channels;
    const T none{};
    for (int64_t r = first; r < last; ++r) {
        ray.used = d.used[r];
        ray.read(r, nullptr);
        const int64_t n = ray.used, begin = ray.begin;
        const S on_depth = d.depth ? d.depth[r] : S(0), on_spread = d.distortion ? d.distortion[r] : S(0);
        const S* background = p.background ? p.background + (p.background_shared ? 0 : r * channels) : nullptr;
        S on_color[C ? C : kMaxChannels] = {};
        S on_end = d.opacity ? -d.opacity[r] : S(0);  // gradient of the transmittance at the end
        const S end = attenuate(ray.total).passed;
        for (int c = 0; c < channels; ++c) {
            on_color[c] = d.color ? d.color[r * channels + c] : S(0);
            if (background) on_end += on_color[c] * background[c];
            if (d.background) d.background[r * channels + c] = end * on_color[c];
        }

        // The gradient of each weight, and what the colours are owed.
        S *value = ray.value, *weight = ray.weight;
        const T* rgb = p.rgb + begin * channels;
        T* d_rgb = d.rgb ? d.rgb + begin * channels : nullptr;
        const S* on_weight = d.weights ? d.weights + begin : nullptr;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            S sum = on_depth * ray.mid[i] + (on_weight ? on_weight[i] : S(0));
            for (int c = 0; c < channels; ++c) sum += on_color[c] * to_float(rgb[i * channels + c]);
            value[i] = sum;
        }
        if (d_rgb) {
#pragma omp simd
            for (int64_t i = 0; i < n; ++i)
                for (int c = 0; c < channels; ++c) store(weight[i] * on_color[c], d_rgb[i * channels + c]);
            std::fill(d_rgb + n * channels, d_rgb + ray.count * channels, none);
        }
        S* d_mid = ray.below;  // becomes sum_{j<i} w_j - sum_{j>i} w_j
        if (d.distortion) {
            ray.spread_below();
            double mass = 0, distance = 0;
            for (int64_t i = n - 1; i >= 0; --i) {
                if (i + 1 < n) distance += mass * (ray.mid[i + 1] - ray.mid[i]);
                const S pairs = ray.spread[i] + S(distance), own = weight[i] * ray.length[i] * S(1.0 / 3);
                value[i] += 2 * on_spread * (pairs + own);
                d_mid[i] -= S(mass);
                mass += weight[i];
            }
        } else {
            std::fill(d_mid, d_mid + n, S(0));
        }

        // From the far end: `later` is the gradient through all that lies behind, per unit of light that reaches it.
        S later = 0;
        S* d_tau = ray.d_tau;
        const S through = on_end * end;
        for (int64_t i = n - 1; i >= 0; --i) {
            d_tau[i] = value[i] - later;
            later = ray.stopped[i] * value[i] + ray.passed[i] * later;
        }
        T* d_sigma = d.sigma + begin;
        S *t0 = d.t_start ? d.t_start + begin : nullptr, *t1 = d.t_end ? d.t_end + begin : nullptr;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            d_tau[i] = ray.before[i] * ray.passed[i] * d_tau[i] - through;
            store(d_tau[i] * ray.length[i], d_sigma[i]);
        }
        std::fill(d_sigma + n, d_sigma + ray.count, none);
        if (t0) {
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) {
                const S on_mid = weight[i] * (on_depth + 2 * on_spread * d_mid[i]);
                const S on_length = on_spread * weight[i] * weight[i] * S(1.0 / 3);
                const auto g = sample_gradient(ray.sigma[i], ray.length[i], d_tau[i], on_mid, on_length);
                t0[i] = g.t_start;
                t1[i] = g.t_end;
            }
            std::fill(t0 + n, t0 + ray.count, S(0));
            std::fill(t1 + n, t1 + ray.count, S(0));
        }
    }
}

// target_clones does not go with templates, so every type and the common channel counts are spelled out.
#define FACTORKIT_COMPOSITE(NAME, T, C)                                                                             \
    FACTORKIT_CLONES void NAME(const Composite<T>& p, const CompositeOutputs<wide_t<T>>& out, int64_t a, int64_t b) { \
        forward_rays<T, C>(p, out, a, b);                                                                           \
    }                                                                                                               \
    FACTORKIT_CLONES void NAME(const Composite<T>& p, const CompositeGradients<T>& d, int64_t a, int64_t b) {       \
        backward_rays<T, C>(p, d, a, b);                                                                            \
    }
FACTORKIT_COMPOSITE(rays_of_one, float, 1)
FACTORKIT_COMPOSITE(rays_of_one, bf16, 1)
FACTORKIT_COMPOSITE(rays_of_one, fp16, 1)
FACTORKIT_COMPOSITE(rays_of_one, double, 1)
FACTORKIT_COMPOSITE(rays_of_three, float, 3)
FACTORKIT_COMPOSITE(rays_of_three, bf16, 3)
FACTORKIT_COMPOSITE(rays_of_three, fp16, 3)
FACTORKIT_COMPOSITE(rays_of_three, double, 3)
FACTORKIT_COMPOSITE(rays_of_any, float, 0)
FACTORKIT_COMPOSITE(rays_of_any, bf16, 0)
FACTORKIT_COMPOSITE(rays_of_any, fp16, 0)
FACTORKIT_COMPOSITE(rays_of_any, double, 0)

template <class T, class Other>
void for_rays(const Composite<T>& p, const Other& other, int threads) {
    parallel_for_uneven(p.rays, kRays, threads, [&](int64_t a, int64_t b) {
        if (p.channels == 1)
            rays_of_one(p, other, a, b);
        else if (p.channels == 3)
            rays_of_three(p, other, a, b);
        else
            rays_of_any(p, other, a, b);
    });
}

}  // namespace

template <class T>
void composite_forward(const Composite<T>& p, const CompositeOutputs<wide_t<T>>& out, int threads) {
    for_rays(p, out, threads);
    if (out.weights) std::fill(out.weights + tail_begin(p), out.weights + p.samples, wide_t<T>(0));
}

template <class T>
void composite_backward(const Composite<T>& p, const CompositeGradients<T>& d, int threads) {
    for_rays(p, d, threads);
    const int64_t tail = tail_begin(p);
    std::fill(d.sigma + tail, d.sigma + p.samples, T{});
    if (d.rgb) std::fill(d.rgb + tail * p.channels, d.rgb + p.samples * p.channels, T{});
    if (d.t_start) std::fill(d.t_start + tail, d.t_start + p.samples, wide_t<T>(0));
    if (d.t_end) std::fill(d.t_end + tail, d.t_end + p.samples, wide_t<T>(0));
}

#define FACTORKIT_INSTANTIATE(T)                                                                        \
    template void composite_forward(const Composite<T>&, const CompositeOutputs<wide_t<T>>&, int);      \
    template void composite_backward(const Composite<T>&, const CompositeGradients<T>&, int);
FACTORKIT_INSTANTIATE(float)
FACTORKIT_INSTANTIATE(bf16)
FACTORKIT_INSTANTIATE(fp16)
FACTORKIT_INSTANTIATE(double)

}  // namespace factorkit
