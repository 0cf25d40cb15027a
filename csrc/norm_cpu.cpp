#include "norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "norm_row.h"
#include "simd.h"
#include "threads.h"

namespace factorkit {
namespace {

template <class T, class V>
FACTORKIT_INLINE void forward_rows(const NormProblem& p, void* out, float* moments, int64_t begin, int64_t end) {
    Row<T, V> row(p);
    const int64_t channels = row.channels;
    for (int64_t r = begin; r < end; ++r) {
        row.read(r, nullptr, moments);
        for (int64_t first = 0; first < row.n; first += kTile) {
            const Tile t = row.tile(first);
            for (int h = 0; h < 2; ++h) {
                const Half<T>& half = row.halves[h];
                const T* x = half.x + first * half.width;
                T* y = static_cast<T*>(out) + (r * row.n + first) * channels + half.at;
                for_packs<V>(half.width, [&](const auto pack) FACTORKIT_INLINE_LAMBDA {
                    using W = typename decltype(pack)::Floats;
                    const W mean = pack.load(row.mean.data() + half.at), slope = pack.load(row.slope.data() + half.at);
                    const W offset = pack.load(row.offset.data() + half.at);
                    with_factors(pack, row.is_scaled(h), false, [&](const auto scaled, auto) FACTORKIT_INLINE_LAMBDA {
                        for (int64_t i = 0; i < t.count; ++i) {
                            const W x_i = pack.load(x + i * half.width);
                            const W z = (scaled ? x_i * t.factor[h][i] : x_i) - mean, pre = z * slope + offset;
                            pack.store(p.activate ? pre * sigmoid<T>(pre) : pre, y + i * channels);
                        }
                    });
                });
            }
        }
    }
}

// By row and channel, the sums over pixels of the pre-activation's gradient and of its product with the normalised value.
// They begin at zero.
struct RowSums {
    float *plain, *times_normal;  // [rows, channels]
};

// The gradients of one image: those of its branches, and their sums where branches share u or the skip.
template <class T, class V>
struct ImageGradients {
    const NormProblem& p;
    const NormGradients& d;
    RowSums sums;
    Row<T, V> row;
    const int64_t n, channels;
    Floats inner;              // gradient of the pre-activation
    Floats first, second;      // by channel: what the moments owe to each value is weight * (first + second * z)
    Floats d_share;            // by pixel, for the masked norm: gradient of its weight / mass
    Floats wide_u, wide_skip;  // sums over branches in fp32, where the gradients themselves are in bf16

    ImageGradients(const NormProblem& p, const NormGradients& d, RowSums sums)
        : p(p), d(d), sums(sums), row(p), n(row.n), channels(row.channels), inner(n * channels), first(channels),
          second(channels, -1.0f), d_share(p.kind == NormKind::masked_group ? n : 0) {
        if (std::is_same<T, float>::value || p.regions == 1) return;
        wide_u.resize(p.u_shared ? n * p.channels_u : 0);
        wide_skip.resize(n * p.channels_skip);
    }

    FACTORKIT_INLINE void compute(int64_t image) {
        for (int64_t k = 0; k < p.regions; ++k) {
            row.read(image * p.regions + k, d.moments, nullptr);
            float *summed = sums.plain + row.index * channels, *moment = sums.times_normal + row.index * channels;
            const bool pixel = p.kind == NormKind::pixel;
            for (int64_t begin = 0; begin < n; begin += kTile) {
                Tile t = row.tile(begin);
                V along[kTile] = {};
                through_activation(t, summed, moment, along);
                if (!pixel) continue;
                for (int64_t i = 0; i < t.count; ++i) t.weight[i] = sum_lanes(along[i]) / channels;
                to_inputs(t, k);
            }
            if (pixel) continue;
            for (int64_t c = 0; c < channels; ++c) {
                first[c] = row.slope[c] * summed[c];
                second[c] = row.slope[c] * moment[c];
            }
            row.pool_groups(first);
            row.pool_groups(second);
            for (int64_t c = 0; c < channels; ++c) {
                first[c] /= -row.mass;
                second[c] *= -row.rstd[c] * row.rstd[c] / row.mass;
                moment[c] *= row.rstd[c];
            }
            for (int64_t begin = 0; begin < n; begin += kTile) to_inputs(row.tile(begin), k);
            if (p.kind == NormKind::masked_group) through_weights();
        }
    }

   private:
    // Into `inner`, its sums over pixels alone and times z, and for the pixel norm the sum over channels of its product
    // with slope * z.
    FACTORKIT_INLINE void through_activation(const Tile& t, float* summed, float* moment, V* along) {
        for (int h = 0; h < 2; ++h) {
            const Half<T>& half = row.halves[h];
            const T* x = half.x + t.begin * half.width;
            const T* grad = static_cast<const T*>(d.grad) + (row.index * n + t.begin) * channels + half.at;
            float* to = inner.data() + t.begin * channels + half.at;
            for_packs<V>(half.width, [&](const auto pack) FACTORKIT_INLINE_LAMBDA {
                using W = typename decltype(pack)::Floats;
                const W mean = pack.load(row.mean.data() + half.at), slope = pack.load(row.slope.data() + half.at);
                const W offset = pack.load(row.offset.data() + half.at);
                W plain = pack.load(summed + half.at), times = pack.load(moment + half.at);
                with_factors(pack, row.is_scaled(h), p.kind == NormKind::pixel, [&](const auto scaled, const auto pixel)
                                 FACTORKIT_INLINE_LAMBDA {
                    for (int64_t i = 0; i < t.count; ++i) {
                        const W x_i = pack.load(x + i * half.width), z = (scaled ? x_i * t.factor[h][i] : x_i) - mean;
                        W g = pack.load(grad + i * channels);
                        if (p.activate) {
                            const W pre = z * slope + offset, s = sigmoid<T>(pre);
                            g *= s * (1.0f + pre * (1.0f - s));
                        }
                        pack.store(g, to + i * channels);
                        plain += g;
                        times += g * z;
                        if (pixel) add_lanes(along[i], g * slope * z);
                    }
                });
                pack.store(plain, summed + half.at);
                pack.store(times, moment + half.at);
            });
        }
    }

    // From `inner` of branch k to u, the skip and the mask.
    FACTORKIT_INLINE void to_inputs(const Tile& t, int64_t k) {
        V on_share[kTile] = {}, on_mask[kTile] = {};
        const int64_t shared = row.image * n + t.begin;  // pixel of what branches share
        const int64_t at_u = (p.u_shared ? shared : row.index * n + t.begin) * p.channels_u, at_skip = shared * p.channels_skip;
        half_to_inputs<false>(t, d.u, d.other_u, at_u, wide_u, p.u_shared ? k : 0, on_share, on_mask);
        half_to_inputs<true>(t, d.skip, d.other_skip, at_skip, wide_skip, k, on_share, on_mask);
        if (!d_share.empty())
            for (int64_t i = 0; i < t.count; ++i) d_share[t.begin + i] = sum_lanes(on_share[i]);
        if (d.masks)
            for (int64_t i = 0; i < t.count; ++i) d.masks[row.index * n + t.begin + i] = sum_lanes(on_mask[i]);
    }

    // To the gradient from element `at` on: branch k of those that share it, added to the branches before or, for the first
    // one, to the gradient of other uses. Sums that are not the last one are in fp32.
    template <bool IsSkip>
    FACTORKIT_INLINE void half_to_inputs(const Tile& t, void* gradient, const void* other, int64_t at, Floats& wide, int64_t k,
                                         V* on_share, V* on_mask) {
        T* to = static_cast<T*>(gradient) + at;
        const T* others = other ? static_cast<const T*>(other) + at : nullptr;
        if (wide.empty()) return half_to<IsSkip>(t, to, k ? static_cast<const T*>(to) : others, on_share, on_mask);
        float* sums = wide.data() + t.begin * row.halves[IsSkip].width;
        const float* before = sums;
        if (k == 0)
            half_to<IsSkip>(t, sums, others, on_share, on_mask);
        else if (k + 1 < p.regions)
            half_to<IsSkip>(t, sums, before, on_share, on_mask);
        else
            half_to<IsSkip>(t, to, before, on_share, on_mask);
    }

    template <bool IsSkip, class To, class Before>
    FACTORKIT_INLINE void half_to(const Tile& t, To* to, const Before* before, V* on_share, V* on_mask) {
        const Half<T>& half = row.halves[IsSkip];
        const T* x = half.x + t.begin * half.width;
        const float* g = inner.data() + t.begin * channels + half.at;
        const float* mask = IsSkip && row.mask ? row.mask + t.begin : nullptr;
        for_packs<V>(half.width, [&](const auto pack) FACTORKIT_INLINE_LAMBDA {
            using W = typename decltype(pack)::Floats;
            const W mean = pack.load(row.mean.data() + half.at), slope = pack.load(row.slope.data() + half.at);
            const W constant = pack.load(first.data() + half.at), linear = pack.load(second.data() + half.at);
            with_factors(pack, row.is_scaled(IsSkip), p.kind != NormKind::group,
                         [&](const auto scaled, const auto weighted) FACTORKIT_INLINE_LAMBDA {
                for (int64_t i = 0; i < t.count; ++i) {
                    const W x_i = pack.load(x + i * half.width);
                    const W z = (scaled ? x_i * t.factor[IsSkip][i] : x_i) - mean, spread = constant + linear * z;
                    W dx = pack.load(g + i * channels) * slope;
                    if (weighted) {
                        dx = (dx + spread * t.weight[i]) * t.scale[i];
                        if (!d_share.empty()) add_lanes(on_share[i], (spread - 0.5f * linear * z) * z);
                    } else {
                        dx += spread;
                    }
                    if (mask) {
                        add_lanes(on_mask[i], x_i * dx);
                        dx *= mask[i];
                    }
                    pack.store(before ? dx + pack.load(before + i * half.width) : dx, to + i * half.width);
                }
            });
        });
    }

    // Through weight / mass = (mask + floor) / mass.
    FACTORKIT_INLINE void through_weights() {
        const float* mask = row.mask;
        double along = 0;
        for (int64_t i = 0; i < n; ++i) along += double(d_share[i]) * (mask[i] + p.mask_floor);
        float* d_mask = d.masks + row.index * n;
        for (int64_t i = 0; i < n; ++i) d_mask[i] += d_share[i] - float(along / row.mass);
    }
};

struct Forward {
    template <class V, class B>
    FACTORKIT_INLINE static void run(const NormProblem& p, void* out, float* moments, int64_t begin, int64_t end) {
        if (p.is_bf16)
            forward_rows<B, V>(p, out, moments, begin, end);
        else
            forward_rows<float, V>(p, out, moments, begin, end);
    }
};

template <class T, class V>
FACTORKIT_INLINE void backward_images(const NormProblem& p, const NormGradients& d, const RowSums& sums, int64_t begin,
                                      int64_t end) {
    ImageGradients<T, V> gradients(p, d, sums);
    for (int64_t image = begin; image < end; ++image) gradients.compute(image);
}

struct Backward {
    template <class V, class B>
    FACTORKIT_INLINE static void run(const NormProblem& p, const NormGradients& d, const RowSums& sums, int64_t begin,
                                     int64_t end) {
        if (p.is_bf16)
            backward_images<B, V>(p, d, sums, begin, end);
        else
            backward_images<float, V>(p, d, sums, begin, end);
    }
};

// Of weight and bias, which all rows share, and of scale and shift. One row after the other: sums do not depend on threads.
template <class T>
void affine_gradients(const NormProblem& p, const NormGradients& d, const RowSums& sums) {
    const int64_t channels = p.channels_u + p.channels_skip;
    std::vector<double> weight(channels), bias(channels);
    for (int64_t r = 0; r < p.batch * p.regions; ++r) {
        const float *plain = sums.plain + r * channels, *times_normal = sums.times_normal + r * channels;
        for (int64_t c = 0; c < channels; ++c) {
            const float factor = 1 + load_modulation(p, p.scale, r * p.modulation_stride + c);
            weight[c] += times_normal[c] * factor;
            bias[c] += plain[c] * factor;
        }
        if (!d.scale) continue;
        for (int64_t c = 0; c < channels; ++c) {
            store(times_normal[c] * p.weight[c] + plain[c] * p.bias[c], static_cast<T*>(d.scale)[r * channels + c]);
            store(plain[c], static_cast<T*>(d.shift)[r * channels + c]);
        }
    }
    for (int64_t c = 0; c < channels; ++c) {
        d.weight[c] = float(weight[c]);
        d.bias[c] = float(bias[c]);
    }
}

}  // namespace

void norm_silu_forward(const NormProblem& p, void* out, float* moments, int threads) {
    parallel_for(p.batch * p.regions, threads,
                 [&](int64_t begin, int64_t end) { run_fastest<Forward>(p, out, moments, begin, end); });
}

void norm_silu_backward(const NormProblem& p, const NormGradients& d, int threads) {
    const int64_t size = p.batch * p.regions * (p.channels_u + p.channels_skip);
    Floats values(2 * size);
    const RowSums sums{values.data(), values.data() + size};
    parallel_for(p.batch, threads, [&](int64_t begin, int64_t end) { run_fastest<Backward>(p, d, sums, begin, end); });
    p.modulation_is_bf16 ? affine_gradients<bf16>(p, d, sums) : affine_gradients<float>(p, d, sums);
}

}  // namespace factorkit
