#include "composite.h"
#include "cuda_launch.h"

namespace factorkit {
namespace {

using std::int64_t;

constexpr unsigned kAll = 0xFFFFFFFFu;

// A warp walks one ray, 32 samples at a time. Sums over the samples before (or after) each are scans of the warp plus
// what the chunks before (after) carry over.
template <class S>
__device__ __forceinline__ S scan_up(S x, int lane) {  // sum over lanes 0..lane
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const S other = __shfl_up_sync(kAll, x, step);
        if (lane >= step) x += other;
    }
    return x;
}

template <class S>
__device__ __forceinline__ S scan_down(S x, int lane) {  // sum over lanes lane..31
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const S other = __shfl_down_sync(kAll, x, step);
        if (lane + step < 32) x += other;
    }
    return x;
}

template <class S>
__device__ __forceinline__ S sum_lanes(S x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
    return x;
}

// An inclusive scan without its own lane's part; not by subtraction, which infinite depth would turn into NaN.
template <class S>
__device__ __forceinline__ S before_lane(S scanned, int lane) {
    const S other = __shfl_up_sync(kAll, scanned, 1);
    return lane == 0 ? S(0) : other;
}

template <class S>
__device__ __forceinline__ S after_lane(S scanned, int lane) {
    const S other = __shfl_down_sync(kAll, scanned, 1);
    return lane == 31 ? S(0) : other;
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
template <class T>
__device__ __forceinline__ Sample<wide_t<T>> take(const Composite<T>& p, int64_t i, bool& live, wide_t<T> limit,
                                                  bool spread, Carry<wide_t<T>>& carry, int lane) {
    using S = wide_t<T>;
    Sample<S> s;
    if (live) {
        const S t0 = p.t_start[i], t1 = p.t_end[i];
        s.sigma = to_float(p.sigma[i]);
        s.length = t1 - t0;
        s.mid = S(0.5) * (t0 + t1);
        s.tau = optical_depth(s.sigma, s.length);
    }
    const S before = S(carry.depth + double(before_lane(scan_up(s.tau, lane), lane)));
    live = live && !(before > limit);
    if (!live) s.tau = 0;
    carry.depth += double(sum_lanes(s.tau));
    if (live) {
        const Attenuation<S> here = attenuate(s.tau);
        s.reaching = attenuate(before).passed;
        s.passed = here.passed;
        s.stopped = here.stopped;
        s.weight = s.reaching * here.stopped;
    }
    if (spread) {  // the same for the whole launch
        const S weights = scan_up(s.weight, lane);
        s.below = carry.weight + before_lane(weights, lane);
        const S other = __shfl_up_sync(kAll, s.mid, 1), mid_before = lane == 0 ? carry.mid : other;
        // The first sample of a ray has nothing below, so what is before it does not matter.
        s.spread = carry.spread + scan_up(live ? s.below * (s.mid - mid_before) : S(0), lane);
        carry.weight += __shfl_sync(kAll, weights, 31);
        carry.spread = __shfl_sync(kAll, s.spread, 31);
        carry.mid = __shfl_sync(kAll, s.mid, 31);
    }
    return s;
}

// C: room for that many channels.
template <class T, int C>
__global__ void __launch_bounds__(kThreads) forward(const Composite<T> p, const CompositeOutputs<wide_t<T>> out) {
    using S = wide_t<T>;
    const int64_t ray = thread_index() / 32;
    const int lane = threadIdx.x % 32;
    if (ray >= p.rays) return;
    const Span span = ray_span(p, ray);
    const S limit = stop_depth(p.early_stop);
    Carry<S> carry;
    S color[C] = {}, depth = 0, distortion = 0;
    int64_t used = 0, chunk = 0;
    for (bool stopped = false; chunk < span.count && !stopped; chunk += 32) {
        const int64_t i = span.begin + chunk + lane;
        const bool there = chunk + lane < span.count;
        bool live = there;
        const Sample<S> s = take(p, i, live, limit, out.distortion != nullptr, carry, lane);
        used += __popc(__ballot_sync(kAll, live));
        stopped = __any_sync(kAll, there && !live);
        if (live) {
#pragma unroll
            for (int c = 0; c < C; ++c)
                if (c < p.channels) color[c] += s.weight * to_float(p.rgb[i * p.channels + c]);
            depth += s.weight * s.mid;
            distortion += s.weight * (2 * s.spread + s.weight * s.length * S(1.0 / 3));
        }
        if (out.weights && there) out.weights[i] = s.weight;
    }
    if (out.weights)
        for (int64_t i = chunk + lane; i < span.count; i += 32) out.weights[span.begin + i] = 0;

    const Attenuation<S> whole = attenuate(S(carry.depth));
    const S* background = p.background ? p.background + (p.background_shared ? 0 : ray * p.channels) : nullptr;
#pragma unroll
    for (int c = 0; c < C; ++c) {
        const S sum = sum_lanes(color[c]);
        if (c < p.channels && lane == c % 32)
            out.color[ray * p.channels + c] = sum + (background ? whole.passed * background[c] : S(0));
    }
    depth = sum_lanes(depth);
    distortion = sum_lanes(distortion);
    if (lane == 0) {
        out.depth[ray] = depth;
        out.opacity[ray] = whole.stopped;
        out.used[ray] = used;
        if (out.distortion) out.distortion[ray] = distortion;
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads) backward(const Composite<T> p, const CompositeGradients<T> d) {
    using S = wide_t<T>;
    const int64_t ray = thread_index() / 32;
    const int lane = threadIdx.x % 32;
    if (ray >= p.rays) return;
    const Span span = ray_span(p, ray);
    const int64_t used = d.used[ray], chunks = (used + 31) / 32;
    const bool spread = d.distortion != nullptr;
    const S on_depth = d.depth ? d.depth[ray] : S(0), on_spread = spread ? d.distortion[ray] : S(0);
    const S* on_color = d.color ? d.color + ray * p.channels : nullptr;
    const S* background = p.background ? p.background + (p.background_shared ? 0 : ray * p.channels) : nullptr;
    const auto chunk_sample = [&](int64_t chunk, Carry<S>& carry) {
        bool live = chunk * 32 + lane < used;
        return take(p, span.begin + chunk * 32 + lane, live, S(INFINITY), spread, carry, lane);
    };

    // Forward once, so that lane k knows the sums in front of the k-th of 32 stretches: one chunk each up to 1024
    // samples. Longer stretches are walked again from there. The ray was just read, so this comes out of the caches.
    const int64_t stretch = (chunks + 31) / 32;
    Carry<S> carry, mine;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        if (chunk == lane * stretch) mine = carry;
        chunk_sample(chunk, carry);
    }
    const S end = attenuate(S(carry.depth)).passed;

    S on_end = d.opacity ? -d.opacity[ray] : S(0);  // gradient of the transmittance at the end
    for (int c = 0; c < p.channels && background; ++c) on_end += on_color ? on_color[c] * background[c] : S(0);
    if (d.background && lane < p.channels)
        d.background[ray * p.channels + lane] = on_color ? end * on_color[lane] : S(0);
    const S through = on_end * end;

    // Backward: sums over all samples behind the chunk.
    S later = 0, weight_after = 0, spread_after = 0, mid_after = 0;
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
        const int owner = int(chunk / stretch);
        carry.depth = __shfl_sync(kAll, mine.depth, owner);
        carry.weight = __shfl_sync(kAll, mine.weight, owner);
        carry.spread = __shfl_sync(kAll, mine.spread, owner);
        carry.mid = __shfl_sync(kAll, mine.mid, owner);
        for (int64_t k = owner * stretch; k < chunk; ++k) chunk_sample(k, carry);
        const Sample<S> s = chunk_sample(chunk, carry);
        const int64_t i = span.begin + chunk * 32 + lane;
        const bool live = chunk * 32 + lane < used;

        S value = live ? on_depth * s.mid + (d.weights ? d.weights[i] : S(0)) : S(0), on_mid = s.weight * on_depth;
        for (int c = 0; c < p.channels && live; ++c) {
            const S g = on_color ? on_color[c] : S(0);
            value += g * to_float(p.rgb[i * p.channels + c]);
            if (d.rgb) store(s.weight * g, d.rgb[i * p.channels + c]);
        }
        if (spread) {
            const S weights = scan_down(s.weight, lane);
            const S above = weight_after + after_lane(weights, lane);
            const S other = __shfl_down_sync(kAll, s.mid, 1);
            const bool next = chunk * 32 + lane + 1 < used;
            const S step = next ? (lane == 31 ? mid_after : other) - s.mid : S(0);
            const S pairs = spread_after + scan_down(above * step, lane);
            if (live) value += 2 * on_spread * (s.spread + pairs + s.weight * s.length * S(1.0 / 3));
            on_mid += 2 * on_spread * s.weight * (s.below - above);
            weight_after += __shfl_sync(kAll, weights, 0);
            spread_after = __shfl_sync(kAll, pairs, 0);
            mid_after = __shfl_sync(kAll, s.mid, 0);
        }
        const S terms = scan_down(s.weight * value, lane);
        const S d_tau = s.reaching * s.passed * value - (later + after_lane(terms, lane)) - through;
        later += __shfl_sync(kAll, terms, 0);
        if (!live) continue;
        const S on_length = on_spread * s.weight * s.weight * S(1.0 / 3);
        const SampleGradient<S> g = sample_gradient(s.sigma, s.length, d_tau, on_mid, on_length);
        store(g.sigma, d.sigma[i]);
        if (d.t_start) {
            d.t_start[i] = g.t_start;
            d.t_end[i] = g.t_end;
        }
    }
    for (int64_t k = used + lane; k < span.count; k += 32) {
        const int64_t i = span.begin + k;
        d.sigma[i] = T{};
        if (d.t_start) d.t_start[i] = d.t_end[i] = S(0);
        for (int c = 0; c < p.channels && d.rgb; ++c) d.rgb[i * p.channels + c] = T{};
    }
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
    forward<T, C><<<blocks_for(p.rays, 32), kThreads, 0, stream>>>(p, out);
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
        backward<T><<<blocks_for(p.rays, 32), kThreads, 0, stream>>>(p, d);
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
