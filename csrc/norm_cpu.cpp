#include "norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"
#include "threads.h"

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
            const float scale = p.scale ? 1 + p.scale[index * channels + c] : 1.0f;
            slope[c] = p.weight[c] * scale * rstd[c];
            offset[c] = p.bias[c] * scale + (p.shift ? p.shift[index * channels + c] : 0.0f);
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
                            pack.store(p.activate ? pre * sigmoid(pre) : pre, y + i * channels);
                        }
                    });
                });
            }
        }
    }
}

// The gradients of one image: those of its branches, and their sums where branches share u or the skip.
template <class T, class V>
struct ImageGradients {
    const NormProblem& p;
    const NormGradients& d;
    Row<T, V> row;
    const int64_t n, channels;
    Floats inner;              // gradient of the pre-activation
    Floats first, second;      // by channel: what the moments owe to each value is weight * (first + second * z)
    Floats d_share;            // by pixel, for the masked norm: gradient of its weight / mass
    Floats wide_u, wide_skip;  // sums over branches in fp32, where the gradients themselves are in bf16

    ImageGradients(const NormProblem& p, const NormGradients& d)
        : p(p), d(d), row(p), n(row.n), channels(row.channels), inner(n * channels), first(channels),
          second(channels, -1.0f), d_share(p.kind == NormKind::masked_group ? n : 0) {
        if (std::is_same<T, float>::value) return;
        wide_u.resize(p.u_shared ? n * p.channels_u : 0);
        wide_skip.resize(n * p.channels_skip);
    }

    FACTORKIT_INLINE void compute(int64_t image) {
        for (int64_t k = 0; k < p.regions; ++k) {
            row.read(image * p.regions + k, d.moments, nullptr);
            float *summed = d.summed + row.index * channels, *moment = d.moment + row.index * channels;
            std::fill(summed, summed + channels, 0.0f);
            std::fill(moment, moment + channels, 0.0f);
            const bool pixel = p.kind == NormKind::pixel;
            for (int64_t begin = 0; begin < n; begin += kTile) {
                Tile t = row.tile(begin);
                V along[kTile] = {};
                through_activation(t, summed, moment, along);
                if (!pixel) continue;
                for (int64_t i = 0; i < t.count; ++i) t.weight[i] = sum_lanes(along[i]) / channels;
                to_inputs(t, k > 0);
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
            for (int64_t begin = 0; begin < n; begin += kTile) to_inputs(row.tile(begin), k > 0);
            if (p.kind == NormKind::masked_group) through_weights();
        }
        narrow(wide_u, static_cast<T*>(d.u) + image * n * p.channels_u);
        narrow(wide_skip, static_cast<T*>(d.skip) + image * n * p.channels_skip);
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
                            const W pre = z * slope + offset, s = sigmoid(pre);
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

    // From `inner` to u, the skip and the mask; `add` to what earlier branches left.
    FACTORKIT_INLINE void to_inputs(const Tile& t, bool add) {
        V on_share[kTile] = {}, on_mask[kTile] = {};
        const int64_t shared = row.image * n + t.begin;  // pixel of what branches share
        T* u = static_cast<T*>(d.u) + (p.u_shared ? shared : row.index * n + t.begin) * p.channels_u;
        T* skip = static_cast<T*>(d.skip) + shared * p.channels_skip;
        wide_u.empty() ? half_to_inputs<false>(t, u, add && p.u_shared, on_share, on_mask)
                       : half_to_inputs<false>(t, &wide_u[t.begin * p.channels_u], add, on_share, on_mask);
        wide_skip.empty() ? half_to_inputs<true>(t, skip, add, on_share, on_mask)
                          : half_to_inputs<true>(t, &wide_skip[t.begin * p.channels_skip], add, on_share, on_mask);
        if (!d_share.empty())
            for (int64_t i = 0; i < t.count; ++i) d_share[t.begin + i] = sum_lanes(on_share[i]);
        if (d.masks)
            for (int64_t i = 0; i < t.count; ++i) d.masks[row.index * n + t.begin + i] = sum_lanes(on_mask[i]);
    }

    template <bool IsSkip, class To>
    FACTORKIT_INLINE void half_to_inputs(const Tile& t, To* to, bool add, V* on_share, V* on_mask) {
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
                    pack.store(add ? dx + pack.load(to + i * half.width) : dx, to + i * half.width);
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

    FACTORKIT_INLINE static void narrow(const Floats& wide, T* to) {
        for (std::size_t i = 0; i < wide.size(); ++i) store(wide[i], to[i]);
    }
};

struct Forward {
    template <class V>
    FACTORKIT_INLINE static void run(const NormProblem& p, void* out, float* moments, int64_t begin, int64_t end) {
        if (p.is_bf16)
            forward_rows<bf16, V>(p, out, moments, begin, end);
        else
            forward_rows<float, V>(p, out, moments, begin, end);
    }
};

template <class T, class V>
FACTORKIT_INLINE void backward_images(const NormProblem& p, const NormGradients& d, int64_t begin, int64_t end) {
    ImageGradients<T, V> gradients(p, d);
    for (int64_t image = begin; image < end; ++image) gradients.compute(image);
}

struct Backward {
    template <class V>
    FACTORKIT_INLINE static void run(const NormProblem& p, const NormGradients& d, int64_t begin, int64_t end) {
        if (p.is_bf16)
            backward_images<bf16, V>(p, d, begin, end);
        else
            backward_images<float, V>(p, d, begin, end);
    }
};

}  // namespace

void norm_silu_forward(const NormProblem& p, void* out, float* moments, int threads) {
    parallel_for(p.batch * p.regions, threads,
                 [&](int64_t begin, int64_t end) { run_fastest<Forward>(p, out, moments, begin, end); });
}

void norm_silu_backward(const NormProblem& p, const NormGradients& d, int threads) {
    parallel_for(p.batch, threads, [&](int64_t begin, int64_t end) { run_fastest<Backward>(p, d, begin, end); });
}

}  // namespace factorkit
