#include "norm.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
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
    bool is_skip;
};

// Some pixels of a row, and by pixel: what multiplies each half's values, of it what comes from the pixel norm (1/rms,
// else 1), and the weight in the moments, which sums to `mass` over the row.
struct Tile {
    int64_t begin, count;
    float factor[2][kTile], scale[kTile], weight[kTile];
};

// One row [pixels][channels] of [u_k ; m_k * skip]. Its normalised values are z = factor * x - mean; the pre-activation
// is z * slope + offset.
template <class T>
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
        halves[0] = {static_cast<const T*>(p.u) + (p.u_shared ? image : row) * n * p.channels_u, p.channels_u, 0, false};
        halves[1] = {static_cast<const T*>(p.skip) + image * n * p.channels_skip, p.channels_skip, p.channels_u, true};
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

   private:
    FACTORKIT_INLINE void divide_by_rms(Tile& t) const {
        for (int64_t i = 0; i < t.count; ++i) {
            Lanes square = {};
            for (int h = 0; h < 2; ++h) {
                const T* x = halves[h].x + (t.begin + i) * halves[h].width;
                const float factor = t.factor[h][i];
                for_packs(halves[h].width, [&](const auto pack) FACTORKIT_INLINE_LAMBDA {
                    for (int v = 0; v < pack.kVectors; ++v) {
                        const Lanes z = pack.load(x, v) * factor;
                        square += z * z;
                    }
                });
            }
            t.scale[i] = 1 / std::sqrt(sum_lanes(square) / channels + p.eps);
            for (auto& factor : t.factor) factor[i] *= t.scale[i];
        }
    }

    // Mean and 1/std (until pool_moments the sum of squares about the mean) by channel, and `mass`. Within a tile the
    // mean comes before the squares, and tiles are joined as Chan et al. (1979) do: no cancellation of E[x^2] - E[x]^2.
    FACTORKIT_INLINE void compute_moments() {
        std::fill(mean.begin(), mean.end(), 0.0f);
        std::fill(rstd.begin(), rstd.end(), 0.0f);
        mass = 0;
        for (int64_t begin = 0; begin < n; begin += kTile) {
            const Tile t = tile(begin);
            float weight = 0;
            for (int64_t i = 0; i < t.count; ++i) weight += t.weight[i];
            const float share = weight / (mass + weight), joint = mass * share;
            for (int h = 0; h < 2; ++h) {
                const Half<T>& half = halves[h];
                const T* x = half.x + begin * half.width;
                float *means = mean.data() + half.at, *squares = rstd.data() + half.at;
                for_packs(half.width, [&](const auto pack) FACTORKIT_INLINE_LAMBDA {
                    constexpr int V = decltype(pack)::kVectors;
                    Lanes first[V] = {}, second[V] = {};
                    for (int64_t i = 0; i < t.count; ++i)
                        for (int v = 0; v < V; ++v)
                            first[v] += pack.load(x + i * half.width, v) * (t.factor[h][i] * t.weight[i]);
                    for (int v = 0; v < V; ++v) first[v] /= weight;
                    for (int64_t i = 0; i < t.count; ++i)
                        for (int v = 0; v < V; ++v) {
                            const Lanes z = pack.load(x + i * half.width, v) * t.factor[h][i] - first[v];
                            second[v] += z * z * t.weight[i];
                        }
                    for (int v = 0; v < V; ++v) {
                        const Lanes before = pack.load(means, v), change = first[v] - before;
                        pack.store(before + change * share, means, v);
                        pack.store(pack.load(squares, v) + second[v] + change * change * joint, squares, v);
                    }
                });
            }
            mass += weight;
        }
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

template <class T>
FACTORKIT_INLINE void forward_rows(const NormProblem& p, void* out, float* moments, int64_t begin, int64_t end) {
    Row<T> row(p);
    const int64_t channels = row.channels;
    for (int64_t r = begin; r < end; ++r) {
        row.read(r, nullptr, moments);
        for (int64_t first = 0; first < row.n; first += kTile) {
            const Tile t = row.tile(first);
            for (int h = 0; h < 2; ++h) {
                const Half<T>& half = row.halves[h];
                const T* x = half.x + first * half.width;
                T* y = static_cast<T*>(out) + (r * row.n + first) * channels + half.at;
                for_packs(half.width, [&](const auto pack) FACTORKIT_INLINE_LAMBDA {
                    constexpr int V = decltype(pack)::kVectors;
                    Lanes mean[V], slope[V], offset[V];
                    for (int v = 0; v < V; ++v) {
                        mean[v] = pack.load(row.mean.data() + half.at, v);
                        slope[v] = pack.load(row.slope.data() + half.at, v);
                        offset[v] = pack.load(row.offset.data() + half.at, v);
                    }
                    for (int64_t i = 0; i < t.count; ++i)
                        for (int v = 0; v < V; ++v) {
                            const Lanes z = pack.load(x + i * half.width, v) * t.factor[h][i] - mean[v];
                            const Lanes pre = z * slope[v] + offset[v];
                            pack.store(p.activate ? pre * sigmoid(pre) : pre, y + i * channels, v);
                        }
                });
            }
        }
    }
}

// The gradients of one image: those of its branches, and their sums where branches share u or the skip.
template <class T>
struct ImageGradients {
    const NormProblem& p;
    const NormGradients& d;
    Row<T> row;
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
                Lanes along[kTile] = {};
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
                first[c] = -first[c];
                second[c] *= -row.rstd[c] * row.rstd[c];
                moment[c] *= row.rstd[c];
            }
            for (int64_t begin = 0; begin < n; begin += kTile) {
                Tile t = row.tile(begin);
                for (int64_t i = 0; i < t.count; ++i) t.weight[i] /= row.mass;
                to_inputs(t, k > 0);
            }
            if (p.kind == NormKind::masked_group) through_weights();
        }
        narrow(wide_u, static_cast<T*>(d.u) + image * n * p.channels_u);
        narrow(wide_skip, static_cast<T*>(d.skip) + image * n * p.channels_skip);
    }

   private:
    // Into `inner`, its sums over pixels alone and times z, and for the pixel norm the sum over channels of its product
    // with slope * z.
    FACTORKIT_INLINE void through_activation(const Tile& t, float* summed, float* moment, Lanes* along) {
        for (int h = 0; h < 2; ++h) {
            const Half<T>& half = row.halves[h];
            const T* x = half.x + t.begin * half.width;
            const T* grad = static_cast<const T*>(d.grad) + (row.index * n + t.begin) * channels + half.at;
            float* to = inner.data() + t.begin * channels + half.at;
            for_packs(half.width, [&](const auto pack) FACTORKIT_INLINE_LAMBDA {
                constexpr int V = decltype(pack)::kVectors;
                Lanes mean[V], slope[V], offset[V], plain[V], times[V];
                for (int v = 0; v < V; ++v) {
                    mean[v] = pack.load(row.mean.data() + half.at, v);
                    slope[v] = pack.load(row.slope.data() + half.at, v);
                    offset[v] = pack.load(row.offset.data() + half.at, v);
                    plain[v] = pack.load(summed + half.at, v);
                    times[v] = pack.load(moment + half.at, v);
                }
                for (int64_t i = 0; i < t.count; ++i)
                    for (int v = 0; v < V; ++v) {
                        const Lanes z = pack.load(x + i * half.width, v) * t.factor[h][i] - mean[v];
                        Lanes g = pack.load(grad + i * channels, v);
                        if (p.activate) {
                            const Lanes pre = z * slope[v] + offset[v], s = sigmoid(pre);
                            g *= s * (1.0f + pre * (1.0f - s));
                        }
                        pack.store(g, to + i * channels, v);
                        plain[v] += g;
                        times[v] += g * z;
                        along[i] += g * slope[v] * z;
                    }
                for (int v = 0; v < V; ++v) {
                    pack.store(plain[v], summed + half.at, v);
                    pack.store(times[v], moment + half.at, v);
                }
            });
        }
    }

    // From `inner` to u, the skip and the mask; `add` to what earlier branches left.
    FACTORKIT_INLINE void to_inputs(const Tile& t, bool add) {
        Lanes on_share[kTile] = {}, on_mask[kTile] = {};
        const int64_t shared = row.image * n + t.begin;  // pixel of what branches share
        T* u = static_cast<T*>(d.u) + (p.u_shared ? shared : row.index * n + t.begin) * p.channels_u;
        T* skip = static_cast<T*>(d.skip) + shared * p.channels_skip;
        if (wide_u.empty())
            half_to_inputs<false>(t, u, add && p.u_shared, on_share, on_mask);
        else
            half_to_inputs<false>(t, wide_u.data() + t.begin * p.channels_u, add, on_share, on_mask);
        if (wide_skip.empty())
            half_to_inputs<true>(t, skip, add, on_share, on_mask);
        else
            half_to_inputs<true>(t, wide_skip.data() + t.begin * p.channels_skip, add, on_share, on_mask);
        if (!d_share.empty())
            for (int64_t i = 0; i < t.count; ++i) d_share[t.begin + i] = sum_lanes(on_share[i]);
        if (d.masks)
            for (int64_t i = 0; i < t.count; ++i) d.masks[row.index * n + t.begin + i] = sum_lanes(on_mask[i]);
    }

    template <bool IsSkip, class To>
    FACTORKIT_INLINE void half_to_inputs(const Tile& t, To* to, bool add, Lanes* on_share, Lanes* on_mask) {
        const Half<T>& half = row.halves[IsSkip];
        const T* x = half.x + t.begin * half.width;
        const float* g = inner.data() + t.begin * channels + half.at;
        const bool masked = !d_share.empty();
        const float* mask = IsSkip && row.mask ? row.mask + t.begin : nullptr;
        for_packs(half.width, [&](const auto pack) FACTORKIT_INLINE_LAMBDA {
            constexpr int V = decltype(pack)::kVectors;
            Lanes mean[V], slope[V], constant[V], linear[V];
            for (int v = 0; v < V; ++v) {
                mean[v] = pack.load(row.mean.data() + half.at, v);
                slope[v] = pack.load(row.slope.data() + half.at, v);
                constant[v] = pack.load(first.data() + half.at, v);
                linear[v] = pack.load(second.data() + half.at, v);
            }
            for (int64_t i = 0; i < t.count; ++i)
                for (int v = 0; v < V; ++v) {
                    const Lanes value = pack.load(x + i * half.width, v), z = value * t.factor[IsSkip][i] - mean[v];
                    const Lanes spread = (constant[v] + linear[v] * z) * t.weight[i];
                    Lanes dx = (pack.load(g + i * channels, v) * slope[v] + spread) * t.scale[i];
                    if (masked) on_share[i] += (constant[v] + 0.5f * linear[v] * z) * z;
                    if (IsSkip) {
                        on_mask[i] += value * dx;
                        if (mask) dx *= mask[i];
                    }
                    pack.store(add ? dx + pack.load(to + i * half.width, v) : dx, to + i * half.width, v);
                }
        });
    }

    // Through weight / mass = (mask + floor) / mass.
    FACTORKIT_INLINE void through_weights() {
        const float* mask = row.mask;
        double along = 0;
        for (int64_t i = 0; i < n; ++i) along += double(d_share[i]) * (mask[i] + p.mask_floor);
        const float mean = float(along / row.mass);
        float* d_mask = d.masks + row.index * n;
        for (int64_t i = 0; i < n; ++i) d_mask[i] += (d_share[i] - mean) / row.mass;
    }

    FACTORKIT_INLINE static void narrow(const Floats& wide, T* to) {
        for (std::size_t i = 0; i < wide.size(); ++i) store(wide[i], to[i]);
    }
};

template <class T>
FACTORKIT_INLINE void backward_images(const NormProblem& p, const NormGradients& d, int64_t begin, int64_t end) {
    ImageGradients<T> gradients(p, d);
    for (int64_t image = begin; image < end; ++image) gradients.compute(image);
}

}  // namespace

FACTORKIT_CLONES void forward_float(const NormProblem& p, void* out, float* moments, int64_t begin, int64_t end) {
    forward_rows<float>(p, out, moments, begin, end);
}
FACTORKIT_CLONES void forward_bf16(const NormProblem& p, void* out, float* moments, int64_t begin, int64_t end) {
    forward_rows<bf16>(p, out, moments, begin, end);
}
FACTORKIT_CLONES void backward_float(const NormProblem& p, const NormGradients& d, int64_t begin, int64_t end) {
    backward_images<float>(p, d, begin, end);
}
FACTORKIT_CLONES void backward_bf16(const NormProblem& p, const NormGradients& d, int64_t begin, int64_t end) {
    backward_images<bf16>(p, d, begin, end);
}

void norm_silu_forward(const NormProblem& p, void* out, float* moments, int threads) {
    auto run = p.is_bf16 ? forward_bf16 : forward_float;
    parallel_for(p.batch * p.regions, threads, [&](int64_t begin, int64_t end) { run(p, out, moments, begin, end); });
}

void norm_silu_backward(const NormProblem& p, const NormGradients& d, int threads) {
    auto run = p.is_bf16 ? backward_bf16 : backward_float;
    parallel_for(p.batch, threads, [&](int64_t begin, int64_t end) { run(p, d, begin, end); });
}

}  // namespace factorkit
