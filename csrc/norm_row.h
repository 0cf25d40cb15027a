// One row of the norm's input as its loops read it: its moments, and the factors of its pixels and channels.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "norm.h"
#include "simd.h"

namespace factorkit {
namespace {

using std::int64_t;
using Floats = std::vector<float>;

constexpr int64_t kTile = 64;  // pixels whose values stay in the first-level cache from one loop to the next
// u_k or m_k * skip, the two halves of the concatenation.
template <class T>
struct Half {
    const T* x;          // [pixels][width]
    int64_t width, at;   // channels, and where they begin in the concatenation
};

// Element `at` of the scale or the shift, 0 without modulation.
inline float load_modulation(const NormProblem& p, const void* x, int64_t at) {
    if (!x) return 0;
    return p.modulation_is_bf16 ? to_float(static_cast<const bf16*>(x)[at]) : static_cast<const float*>(x)[at];
}

// Some pixels of a row, and by pixel: what multiplies each half's values, of it what comes from the pixel norm (1/rms,
// else 1), and the weight in the moments, which sums to `mass` over the row.
struct Tile {
    int64_t begin, count;
    float factor[2][kTile], scale[kTile], weight[kTile];
};

// One row [pixels][channels] of [u_k ; m_k * skip]. Its normalised values are z = factor * x - mean; the pre-activation
// is z * slope + offset.
template <class T, class V>
struct Row {
    const NormProblem& p;
    const int64_t n, channels, size;  // pixels, channels, channels of a group
    int64_t image = 0, index = 0;
    const float* mask = nullptr;             // of this branch, or null
    Half<T> halves[2];
    Floats mean, rstd, slope, offset;        // by channel; mean 0 and 1/std 1 for the pixel norm
    float mass = 0;

    explicit Row(const NormProblem& p)
        : p(p), n(p.pixels), channels(p.channels_u + p.channels_skip), size(channels / p.groups), mean(channels),
          rstd(channels, 1.0f), slope(channels), offset(channels) {}

    // `moments` are as in norm.h: those of a forward pass, which are read, or room for them, which is filled.
    FACTORKIT_INLINE void read(int64_t row, const float* stored, float* moments) {
        index = row;
        image = row / p.regions;
        mask = p.masks ? p.masks + row * n : nullptr;
        halves[0] = {static_cast<const T*>(p.u) + (p.u_shared ? image : row) * n * p.channels_u, p.channels_u, 0};
        halves[1] = {static_cast<const T*>(p.skip) + image * n * p.channels_skip, p.channels_skip, p.channels_u};
        const int64_t plane = p.batch * p.regions * p.groups, at = row * p.groups;
        if (p.kind != NormKind::pixel && !stored) {
            compute_moments();
            pool_moments(moments + at, plane);
            stored = moments;
        }
        if (p.kind != NormKind::pixel) {
            for (int64_t c = 0; c < channels; ++c) {
                mean[c] = stored[at + c / size];
                rstd[c] = stored[plane + at + c / size];
            }
            mass = p.kind == NormKind::masked_group ? stored[2 * plane + at] : float(n);
        }
        for (int64_t c = 0; c < channels; ++c) {
            const int64_t at = index * p.modulation_stride + c;
            const float scale = 1 + load_modulation(p, p.scale, at);
            slope[c] = p.weight[c] * scale * rstd[c];
            offset[c] = p.bias[c] * scale + load_modulation(p, p.shift, at);
        }
    }

    // The mean over each group of what is given by channel, back into every channel of the group.
    FACTORKIT_INLINE void pool_groups(Floats& by_channel) const {
        for (int64_t g = 0; g < p.groups; ++g) {
            double sum = 0;
            for (int64_t c = g * size; c < (g + 1) * size; ++c) sum += by_channel[c];
            for (int64_t c = g * size; c < (g + 1) * size; ++c) by_channel[c] = float(sum / size);
        }
    }

    FACTORKIT_INLINE Tile tile(int64_t begin) const {
        Tile t;
        t.begin = begin;
        t.count = std::min(kTile, n - begin);
        for (int64_t i = 0; i < t.count; ++i) {
            t.factor[0][i] = t.scale[i] = 1;
            t.factor[1][i] = mask ? mask[begin + i] : 1.0f;
            t.weight[i] = p.kind == NormKind::masked_group ? mask[begin + i] + p.mask_floor : 1.0f;
        }
        if (p.kind == NormKind::pixel) divide_by_rms(t);
        return t;
    }

    // Whether a half's values have a factor that is not one.
    bool is_scaled(int half) const { return p.kind == NormKind::pixel || (half && mask); }

   private:
    FACTORKIT_INLINE void divide_by_rms(Tile& t) const {
        for (int64_t i = 0; i < t.count; ++i) {
            V square = {};
            for (int h = 0; h < 2; ++h) {
                const T* x = halves[h].x + (t.begin + i) * halves[h].width;
                const float factor = t.factor[h][i];
                for_packs<V>(halves[h].width, [&](const auto pack) FACTORKIT_INLINE_LAMBDA {
                    const auto z = pack.load(x) * factor;
                    add_lanes(square, z * z);
                });
            }
            t.scale[i] = 1 / std::sqrt(sum_lanes(square) / channels + p.eps);
            for (auto& factor : t.factor) factor[i] *= t.scale[i];
        }
    }

    // Mean and 1/std (until pool_moments the sum of squares about the mean) by channel, and `mass`. Nothing cancels: sums
    // are of differences to a value near the mean, and tiles are joined as Chan et al. (1979) do.
    FACTORKIT_INLINE void compute_moments() {
        std::fill(mean.begin(), mean.end(), 0.0f);
        std::fill(rstd.begin(), rstd.end(), 0.0f);
        mass = 0;
        for (int64_t begin = 0; begin < n; begin += kTile) {
            const Tile t = tile(begin);
            float weight = 0;
            for (int64_t i = 0; i < t.count; ++i) weight += t.weight[i];
            for (int h = 0; h < 2; ++h)
                for_packs<V>(halves[h].width, [&](const auto pack) FACTORKIT_INLINE_LAMBDA {
                    const bool weighted = p.kind == NormKind::masked_group;
                    with_factors(pack, is_scaled(h), weighted, [&](auto... constants) FACTORKIT_INLINE_LAMBDA {
                        join_moments(pack, t, h, weight, constants...);
                    });
                });
            mass += weight;
        }
    }

    template <class P, class Scaled, class Weighted>
    FACTORKIT_INLINE void join_moments(P pack, const Tile& t, int h, float weight, Scaled scaled, Weighted weighted) {
        using W = typename P::Floats;
        const Half<T>& half = halves[h];
        const T* x = half.x + t.begin * half.width;
        float *means = mean.data() + half.at, *squares = rstd.data() + half.at;
        const W before = pack.load(means);
        W near = t.begin ? before : pack.load(x) * t.factor[h][0];
        if (weighted) {  // of such a tile the mean itself: the first pixel may be outside the region, and unlike it
            near = W{};
            for (int64_t i = 0; i < t.count; ++i) near += pack.load(x + i * half.width) * (t.factor[h][i] * t.weight[i]);
            near /= weight;
        }
        constexpr int kPixels = 4;  // at a time, so that no sum waits for the one before
        W first[kPixels] = {}, second[kPixels] = {};
        const auto add = [&](int64_t i, int j) FACTORKIT_INLINE_LAMBDA {
            const W x_i = pack.load(x + i * half.width), z = (scaled ? x_i * t.factor[h][i] : x_i) - near;
            const W share = weighted ? z * t.weight[i] : z;
            first[j] += share;
            second[j] += share * z;
        };
        int64_t i = 0;
        for (; i + kPixels <= t.count; i += kPixels)
            for (int j = 0; j < kPixels; ++j) add(i + j, j);
        for (; i < t.count; ++i) add(i, 0);
        const W sum = first[0] + first[1] + (first[2] + first[3]), offset = sum / weight, change = near + offset - before;
        const W square = second[0] + second[1] + (second[2] + second[3]) - offset * sum;
        const float share = weight / (mass + weight);
        pack.store(before + change * share, means);
        pack.store(pack.load(squares) + square + change * change * (mass * share), squares);
    }

    FACTORKIT_INLINE void pool_moments(float* moments, int64_t plane) const {
        for (int64_t g = 0; g < p.groups; ++g) {
            double sum = 0, squares = 0;
            for (int64_t c = g * size; c < (g + 1) * size; ++c) sum += mean[c];
            const double center = sum / size;
            for (int64_t c = g * size; c < (g + 1) * size; ++c)
                squares += double(rstd[c]) / mass + (mean[c] - center) * (mean[c] - center);
            moments[g] = float(center);
            moments[plane + g] = float(1 / std::sqrt(squares / size + double(p.eps)));
            if (p.kind == NormKind::masked_group) moments[2 * plane + g] = mass;
        }
    }
};

}  // namespace
}  // namespace factorkit
