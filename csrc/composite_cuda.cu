#include "composite.h"
#include "cuda_launch.h"

namespace factorkit {
namespace {

using std::int64_t;

constexpr unsigned kAll = 0xFFFFFFFFu;

// A warp walks one ray, 32 samples at a time, or `32 / width` short rays side by side, `width` samples of each at a
// time. Sums over the samples before (or after) each are scans of the ray's lanes plus what the chunks before (after)
// carry over. All lanes meet at every shuffle: a ray that has ended goes along without samples until the last of its
// warp has.
struct WholeWarp {
    static constexpr int width = 32, bits = 5, first = 0, last = 31;
    const int index = threadIdx.x % 32;
    static constexpr unsigned mask = kAll;
};

struct PartOfWarp {
    const int width, bits;  // a ray has width = 2^bits lanes
    const int index;        // this lane's place among them
    const int first, last;  // where in the warp they begin and end
    const unsigned mask;

    __device__ __forceinline__ explicit PartOfWarp(int bits)
        : width(1 << bits), bits(bits), index(threadIdx.x & (width - 1)), first(threadIdx.x % 32 - index),
          last(first + width - 1), mask(kAll >> (32 - width) << first) {}
};

template <class S, class Lanes>
__device__ __forceinline__ S scan_up(S x, const Lanes& l) {  // sum over the ray's lanes up to this one
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        if (step >= l.width) break;
        const S other = __shfl_up_sync(kAll, x, step);
        if (l.index >= step) x += other;
    }
    return x;
}

template <class S, class Lanes>
__device__ __forceinline__ S scan_down(S x, const Lanes& l) {  // sum over the ray's lanes from this one on
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        if (step >= l.width) break;
        const S other = __shfl_down_sync(kAll, x, step);
        if (l.index + step < l.width) x += other;
    }
    return x;
}

template <class S, class Lanes>
__device__ __forceinline__ S sum_lanes(S x, const Lanes& l) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        if (step >= l.width) break;
        x += __shfl_xor_sync(kAll, x, step);
    }
    return x;
}

// An inclusive scan without its own lane's part; not by subtraction, which infinite depth would turn into NaN.
template <class S, class Lanes>
__device__ __forceinline__ S before_lane(S scanned, const Lanes& l) {
    const S other = __shfl_up_sync(kAll, scanned, 1);
    return l.index == 0 ? S(0) : other;
}

template <class S, class Lanes>
__device__ __forceinline__ S after_lane(S scanned, const Lanes& l) {
    const S other = __shfl_down_sync(kAll, scanned, 1);
    return l.index == l.width - 1 ? S(0) : other;
}

// Sums over all samples in front of a chunk.
template <class S>
struct Carry {
    double depth = 0;  // optical; in double, because its rounding would grow with the ray
    S weight = 0, spread = 0, mid = 0;
};

// This lane's sample of a chunk.
template <class S>
struct Sample {
    S sigma = 0, length = 0, mid = 0, tau = 0;
    S reaching = 0, passed = 1, stopped = 0, weight = 0;  // reaching: the transmittance in front of it
    S below = 0, spread = 0;                              // sums of w_j and of w_j (m_i - m_j) over j < i
};

// Reads sample `i` where `live`, and moves the carry to the next chunk. `limit`: see stop_depth.
template <class T, class Lanes>
__device__ __forceinline__ Sample<wide_t<T>> take(const Composite<T>& p, int64_t i, bool& live, wide_t<T> limit,
                                                  bool spread, Carry<wide_t<T>>& carry, const Lanes& l) {
    using S = wide_t<T>;
    Sample<S> s;
    if (live) {
        const S t0 = p.t_start[i], t1 = p.t_end[i];
        s.sigma = to_float(p.sigma[i]);
        s.length = t1 - t0;
        s.mid = S(0.5) * (t0 + t1);
        s.tau = optical_depth(s.sigma, s.length);
    }
    const S before = S(carry.depth + double(before_lane(scan_up(s.tau, l), l)));
    live = live && !(before > limit);
    if (!live) s.tau = 0;
    carry.depth += double(sum_lanes(s.tau, l));
    if (live) {
        const Attenuation<S> here = attenuate(s.tau);
        s.reaching = attenuate(before).passed;
        s.passed = here.passed;
        s.stopped = here.stopped;
        s.weight = s.reaching * here.stopped;
    }
    if (spread) {  // the same for the whole launch
        const S weights = scan_up(s.weight, l);
        s.below = carry.weight + before_lane(weights, l);
        const S other = __shfl_up_sync(kAll, s.mid, 1), mid_before = l.index == 0 ? carry.mid : other;
        // The first sample of a ray has nothing below, so what is before it does not matter.
        s.spread = carry.spread + scan_up(live ? s.below * (s.mid - mid_before) : S(0), l);
        carry.weight += __shfl_sync(kAll, weights, l.last);
        carry.spread = __shfl_sync(kAll, s.spread, l.last);
        carry.mid = __shfl_sync(kAll, s.mid, l.last);
    }
    return s;
}

// C: room for that many channels.
template <int C, class T, class Lanes>
__device__ __forceinline__ void forward_ray(const Composite<T>& p, const CompositeOutputs<wide_t<T>>& out, int64_t ray,
                                            const Lanes& l) {
    using S = wide_t<T>;
    const Span span = ray_span(p, ray);
    const S limit = stop_depth(p.early_stop);
    Carry<S> carry;
    S color[C] = {}, depth = 0, distortion = 0;
    int steps = 0, alive = 0;  // chunks of this ray, and samples of the last one before the early stop
    bool going = span.count > 0;
    for (int chunk = 0; __any_sync(kAll, going); ++chunk) {
        const int64_t k = (int64_t(chunk) << l.bits) + l.index, i = span.begin + k;
        const bool there = going && k < span.count;
        bool live = there;
        const Sample<S> s = take(p, i, live, limit, out.distortion != nullptr, carry, l);
        if (live) {
#pragma unroll
            for (int c = 0; c < C; ++c)
                if (c < p.channels) color[c] += s.weight * to_float(p.rgb[i * p.channels + c]);
            depth += s.weight * s.mid;
            distortion += s.weight * (2 * s.spread + s.weight * s.length * S(1.0 / 3));
        }
        if (out.weights && there) out.weights[i] = s.weight;
        const int count = __popc(__ballot_sync(kAll, live) & l.mask);
        if (!going) continue;
        steps = chunk + 1;
        alive = count;
        going = count == l.width && (int64_t(steps) << l.bits) < span.count;
    }
    if (out.weights)
        for (int64_t i = (int64_t(steps) << l.bits) + l.index; i < span.count; i += l.width)
            out.weights[span.begin + i] = 0;

    const Attenuation<S> whole = attenuate(S(carry.depth));
    const S* background = p.background ? p.background + (p.background_shared ? 0 : ray * p.channels) : nullptr;
#pragma unroll
    for (int c = 0; c < C; ++c) {
        const S sum = sum_lanes(color[c], l);
        if (c < p.channels && l.index == c % l.width)
            out.color[ray * p.channels + c] = sum + (background ? whole.passed * background[c] : S(0));
    }
    depth = sum_lanes(depth, l);
    distortion = sum_lanes(distortion, l);
    if (l.index == 0) {
        out.depth[ray] = depth;
        out.opacity[ray] = whole.stopped;
        out.used[ray] = steps ? (int64_t(steps - 1) << l.bits) + alive : 0;
        if (out.distortion) out.distortion[ray] = distortion;
    }
}

template <class T, class Lanes>
__device__ __forceinline__ void backward_ray(const Composite<T>& p, const CompositeGradients<T>& d, int64_t ray,
                                             const Lanes& l) {
    using S = wide_t<T>;
    const Span span = ray_span(p, ray);
    const int64_t used = d.used[ray];
    int64_t longest = used;  // of the rays of this warp
    for (int step = 16; step >= l.width; step /= 2) {
        const int64_t other = __shfl_xor_sync(kAll, longest, step);
        longest = other > longest ? other : longest;
    }
    const int chunks = int((longest + l.width - 1) >> l.bits);
    const bool spread = d.distortion != nullptr;
    const S on_depth = d.depth ? d.depth[ray] : S(0), on_spread = spread ? d.distortion[ray] : S(0);
    const S* on_color = d.color ? d.color + ray * p.channels : nullptr;
    const S* background = p.background ? p.background + (p.background_shared ? 0 : ray * p.channels) : nullptr;
    const auto chunk_sample = [&](int chunk, Carry<S>& carry) {
        const int64_t k = (int64_t(chunk) << l.bits) + l.index;
        bool live = k < used;
        return take(p, span.begin + k, live, S(INFINITY), spread, carry, l);
    };

    // Forward once, so that lane k of a ray knows the sums in front of the k-th of `width` stretches: one chunk each up
    // to width^2 samples. Longer stretches are walked again from there. The ray was just read, so this comes out of the
    // caches.
    const int stretch = (chunks + l.width - 1) >> l.bits;
    Carry<S> carry, mine;
    for (int chunk = 0; chunk < chunks; ++chunk) {
        if (chunk == l.index * stretch) mine = carry;
        chunk_sample(chunk, carry);
    }
    const S end = attenuate(S(carry.depth)).passed;

    S on_end = d.opacity ? -d.opacity[ray] : S(0);  // gradient of the transmittance at the end
    for (int c = 0; c < p.channels && background; ++c) on_end += on_color ? on_color[c] * background[c] : S(0);
    for (int c = l.index; c < p.channels && d.background; c += l.width)
        d.background[ray * p.channels + c] = on_color ? end * on_color[c] : S(0);
    const S through = on_end * end;

    // Backward: sums over all samples behind the chunk.
    S later = 0, weight_after = 0, spread_after = 0, mid_after = 0;
    for (int chunk = chunks - 1; chunk >= 0; --chunk) {
        const int owner = chunk / stretch, from = l.first + owner;
        carry.depth = __shfl_sync(kAll, mine.depth, from);
        carry.weight = __shfl_sync(kAll, mine.weight, from);
        carry.spread = __shfl_sync(kAll, mine.spread, from);
        carry.mid = __shfl_sync(kAll, mine.mid, from);
        for (int again = owner * stretch; again < chunk; ++again) chunk_sample(again, carry);
        const Sample<S> s = chunk_sample(chunk, carry);
        const int64_t k = (int64_t(chunk) << l.bits) + l.index, i = span.begin + k;
        const bool live = k < used;

        S value = live ? on_depth * s.mid + (d.weights ? d.weights[i] : S(0)) : S(0), on_mid = s.weight * on_depth;
        for (int c = 0; c < p.channels && live; ++c) {
            const S g = on_color ? on_color[c] : S(0);
            value += g * to_float(p.rgb[i * p.channels + c]);
            if (d.rgb) store(s.weight * g, d.rgb[i * p.channels + c]);
        }
        if (spread) {
            const S weights = scan_down(s.weight, l);
            const S above = weight_after + after_lane(weights, l);
            const S other = __shfl_down_sync(kAll, s.mid, 1);
            const bool next = k + 1 < used;
            const S step = next ? (l.index == l.width - 1 ? mid_after : other) - s.mid : S(0);
            const S pairs = spread_after + scan_down(above * step, l);
            if (live) value += 2 * on_spread * (s.spread + pairs + s.weight * s.length * S(1.0 / 3));
            on_mid += 2 * on_spread * s.weight * (s.below - above);
            weight_after += __shfl_sync(kAll, weights, l.first);
            spread_after = __shfl_sync(kAll, pairs, l.first);
            mid_after = __shfl_sync(kAll, s.mid, l.first);
        }
        const S terms = scan_down(s.weight * value, l);
        const S d_tau = s.reaching * s.passed * value - (later + after_lane(terms, l)) - through;
        later += __shfl_sync(kAll, terms, l.first);
        if (!live) continue;
        const S on_length = on_spread * s.weight * s.weight * S(1.0 / 3);
        const SampleGradient<S> g = sample_gradient(s.sigma, s.length, d_tau, on_mid, on_length);
        store(g.sigma, d.sigma[i]);
        if (d.t_start) {
            d.t_start[i] = g.t_start;
            d.t_end[i] = g.t_end;
        }
    }
    for (int64_t k = used + l.index; k < span.count; k += l.width) {
        const int64_t i = span.begin + k;
        d.sigma[i] = T{};
        if (d.t_start) d.t_start[i] = d.t_end[i] = S(0);
        for (int c = 0; c < p.channels && d.rgb; ++c) d.rgb[i * p.channels + c] = T{};
    }
}

// Calls run(ray, lanes) for the rays of this warp: short ones side by side, but one after another on all lanes where
// one of them has more samples than a warp has lanes. The last ray fills the places of those that the last warp lacks.
template <bool Short, class T, class Run>
__device__ __forceinline__ void for_rays(const Composite<T>& p, int bits, const Run& run) {
    if constexpr (Short) {
        const int64_t first = thread_index() / 32 << (5 - bits), last = p.rays - 1;
        if (first > last) return;
        const int64_t mine = first + (threadIdx.x % 32 >> bits);
        const bool together = !__any_sync(kAll, ray_span(p, mine < last ? mine : last).count > 32);
        const PartOfWarp lanes(together ? bits : 5);
        for (int i = 0; i < 32 >> bits; i += together ? 32 : 1) {
            const int64_t ray = first + i + (threadIdx.x % 32 >> lanes.bits);
            run(ray < last ? ray : last, lanes);
        }
    } else {
        const int64_t ray = thread_index() / 32;
        if (ray < p.rays) run(ray, WholeWarp());
    }
}

template <class T, int C, bool Short>
__global__ void __launch_bounds__(kThreads)
    forward(const Composite<T> p, const CompositeOutputs<wide_t<T>> out, int bits) {
    for_rays<Short>(p, bits, [&](int64_t ray, const auto& lanes) { forward_ray<C>(p, out, ray, lanes); });
}

// At least so many blocks at once on a multiprocessor: where it is left to choose, ptxas spills to save registers.
template <class T, bool Short>
__global__ void __launch_bounds__(kThreads, (Short ? 3 : 4) / (sizeof(T) == 8 ? 2 : 1))
    backward(const Composite<T> p, const CompositeGradients<T> d, int bits) {
    for_rays<Short>(p, bits, [&](int64_t ray, const auto& lanes) { backward_ray(p, d, ray, lanes); });
}

// What belongs to no ray is zero; where it begins is known on the device alone.
template <class T>
__global__ void __launch_bounds__(kThreads) clear_tail(const Composite<T> p, wide_t<T>* weights, T* sigma, T* rgb,
                                                       wide_t<T>* t_start, wide_t<T>* t_end) {
    const int64_t i = thread_index();
    if (i >= p.samples || i < tail_begin(p)) return;
    if (weights) weights[i] = 0;
    if (sigma) sigma[i] = T{};
    for (int c = 0; c < p.channels && rgb; ++c) rgb[i * p.channels + c] = T{};
    if (t_start) t_start[i] = t_end[i] = 0;
}

template <class T, int C>
void launch_forward(const Composite<T>& p, const CompositeOutputs<wide_t<T>>& out, cudaStream_t stream) {
    const int bits = lane_bits(p.samples, p.rays);
    if (bits < 5)
        forward<T, C, true><<<blocks_for(p.rays, 1 << bits), kThreads, 0, stream>>>(p, out, bits);
    else
        forward<T, C, false><<<blocks_for(p.rays, 1 << bits), kThreads, 0, stream>>>(p, out, bits);
}

}  // namespace

template <class T>
void composite_forward_cuda(const Composite<T>& p, const CompositeOutputs<wide_t<T>>& out, void* on) {
    const auto stream = static_cast<cudaStream_t>(on);
    if (p.rays > 0) {
        const int c = p.channels;
        const auto launch = c == 1   ? launch_forward<T, 1>
                            : c <= 3 ? launch_forward<T, 3>
                            : c <= 4 ? launch_forward<T, 4>
                            : c <= 8 ? launch_forward<T, 8>
                                     : launch_forward<T, kMaxChannels>;
        launch(p, out, stream);
        check_launch("composite");
    }
    if (p.offsets && out.weights && p.samples > 0) {
        clear_tail<T><<<blocks_for(p.samples), kThreads, 0, stream>>>(p, out.weights, nullptr, nullptr, nullptr,
                                                                      nullptr);
        check_launch("the end of composite");
    }
}

template <class T>
void composite_backward_cuda(const Composite<T>& p, const CompositeGradients<T>& d, void* on) {
    const auto stream = static_cast<cudaStream_t>(on);
    if (p.rays > 0) {
        const int bits = lane_bits(p.samples, p.rays);
        if (bits < 5)
            backward<T, true><<<blocks_for(p.rays, 1 << bits), kThreads, 0, stream>>>(p, d, bits);
        else
            backward<T, false><<<blocks_for(p.rays, 1 << bits), kThreads, 0, stream>>>(p, d, bits);
        check_launch("the gradient of composite");
    }
    if (p.offsets && p.samples > 0) {
        clear_tail<T><<<blocks_for(p.samples), kThreads, 0, stream>>>(p, nullptr, d.sigma, d.rgb, d.t_start, d.t_end);
        check_launch("the end of composite's gradient");
    }
}

#define FACTORKIT_INSTANTIATE(T)                                                                              \
    template void composite_forward_cuda(const Composite<T>&, const CompositeOutputs<wide_t<T>>&, void*);     \
    template void composite_backward_cuda(const Composite<T>&, const CompositeGradients<T>&, void*);
FACTORKIT_INSTANTIATE(float)
FACTORKIT_INSTANTIATE(bf16)
FACTORKIT_INSTANTIATE(fp16)
FACTORKIT_INSTANTIATE(double)

}  // namespace factorkit
