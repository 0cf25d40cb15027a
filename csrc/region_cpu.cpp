#include "region.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "simd.h"
#include "threads.h"

namespace factorkit {
namespace {

using std::int64_t;
using Floats = std::vector<float>;

// --- blend ---
// By tiles of pixels, copied plane by plane: planes whose size is a power of two lie a multiple of 4 KiB apart, and
// loads from one would wait for stores to another. Behind the end of the last tile there are other numbers.

constexpr int64_t kTile = 64;  // pixels

template <class Run>
FACTORKIT_INLINE void for_lanes(const Run& run) {
    for (int64_t i = 0; i < kTile; i += kLanes) run(i);
}

// Calls run(channels) with a constant for images and latents, whose interleaved channels the compiler then vectorises.
template <class Run>
FACTORKIT_INLINE void with_channels(int64_t channels, const Run& run) {
    if (channels == 3)
        run(std::integral_constant<int64_t, 3>{});
    else if (channels == 4)
        run(std::integral_constant<int64_t, 4>{});
    else
        run(channels);
}

template <class T>
struct Blender {
    const BlendProblem& p;
    Floats masks, on_masks;  // [regions][kTile]
    Floats prediction;       // [channels][kTile]: or its gradient
    Floats values;           // [channels][kTile]: of a branch, or their gradient
    int64_t image = 0, begin = 0, count = 0;  // of the tile

    explicit Blender(const BlendProblem& p)
        : p(p), masks(p.regions * kTile), on_masks(p.regions * kTile), prediction(p.channels * kTile),
          values(p.channels * kTile) {}

    FACTORKIT_INLINE void begin_tile(int64_t index) {
        const int64_t tiles = (p.pixels + kTile - 1) / kTile;
        image = index / tiles;
        begin = index % tiles * kTile;
        count = std::min(kTile, p.pixels - begin);
    }

    FACTORKIT_INLINE void forward(float* to_masks, float* to_prediction) {
        read_planes(p.logits, p.regions, masks);
        for_lanes([&](int64_t i) FACTORKIT_INLINE_LAMBDA {
            Lanes top = load_lanes(&masks[i]), sum = {};
            for (int64_t k = 1; k < p.regions; ++k) {
                const Lanes x = load_lanes(&masks[k * kTile + i]);
                top = x > top ? x : top;
            }
            for (int64_t k = 0; k < p.regions; ++k) {
                const Lanes e = fast_exp(load_lanes(&masks[k * kTile + i]) - top);
                store_lanes(e, &masks[k * kTile + i]);
                sum += e;
            }
            const Lanes factor = 1.0f / sum;
            for (int64_t k = 0; k < p.regions; ++k)
                store_lanes(load_lanes(&masks[k * kTile + i]) * factor, &masks[k * kTile + i]);
        });
        write_planes(masks, p.regions, to_masks);
        std::fill(prediction.begin(), prediction.end(), 0.0f);
        for (int64_t k = 0; k < p.regions; ++k) {
            read_branch(k);
            for (int64_t c = 0; c < p.channels; ++c) {
                float *sum = &prediction[c * kTile], *value = &values[c * kTile];
                for_lanes([&](int64_t i) FACTORKIT_INLINE_LAMBDA {
                    const Lanes m = load_lanes(&masks[k * kTile + i]);
                    store_lanes(load_lanes(sum + i) + m * load_lanes(value + i), sum + i);
                });
            }
        }
        write_planes(prediction, p.channels, to_prediction);
    }

    FACTORKIT_INLINE void backward(const BlendGradients& d) {
        read_planes(d.masks, p.regions, masks);
        std::fill(on_masks.begin(), on_masks.end(), 0.0f);
        if (d.on_masks) read_planes(d.on_masks, p.regions, on_masks);
        read_planes(d.on_prediction, p.channels, prediction);
        for (int64_t k = 0; k < p.regions; ++k) {
            read_branch(k);
            float *mask = &masks[k * kTile], *on_mask = &on_masks[k * kTile];
            for (int64_t c = 0; c < p.channels; ++c) {
                float *grad = &prediction[c * kTile], *value = &values[c * kTile];
                for_lanes([&](int64_t i) FACTORKIT_INLINE_LAMBDA {
                    const Lanes g = load_lanes(grad + i);
                    store_lanes(load_lanes(on_mask + i) + g * load_lanes(value + i), on_mask + i);
                    store_lanes(g * load_lanes(mask + i), value + i);
                });
            }
            write_branch(k, static_cast<T*>(d.branches));
        }
        for_lanes([&](int64_t i) FACTORKIT_INLINE_LAMBDA {
            Lanes mean = {};
            for (int64_t k = 0; k < p.regions; ++k)
                mean += load_lanes(&masks[k * kTile + i]) * load_lanes(&on_masks[k * kTile + i]);
            for (int64_t k = 0; k < p.regions; ++k) {
                float* on_mask = &on_masks[k * kTile + i];
                store_lanes(load_lanes(&masks[k * kTile + i]) * (load_lanes(on_mask) - mean), on_mask);
            }
        });
        write_planes(on_masks, p.regions, d.logits);
    }

   private:
    FACTORKIT_INLINE void copy(const float* from, float* to) const {
        if (count == kTile)
            std::memcpy(to, from, kTile * sizeof(float));  // of constant size, which needs no call
        else
            std::copy(from, from + count, to);
    }

    FACTORKIT_INLINE void read_planes(const float* from, int64_t planes, Floats& to) const {
        from += image * planes * p.pixels + begin;
        for (int64_t j = 0; j < planes; ++j) copy(from + j * p.pixels, &to[j * kTile]);
    }

    FACTORKIT_INLINE void write_planes(const Floats& from, int64_t planes, float* to) const {
        to += image * planes * p.pixels + begin;
        for (int64_t j = 0; j < planes; ++j) copy(&from[j * kTile], to + j * p.pixels);
    }

    FACTORKIT_INLINE int64_t row_of(int64_t k) const {
        return (image * p.regions + k) * p.channels * p.pixels + begin * (p.channels_last ? p.channels : 1);
    }

    FACTORKIT_INLINE void read_branch(int64_t k) {
        const T* __restrict from = static_cast<const T*>(p.branches) + row_of(k);
        float* __restrict to = values.data();
        if (p.channels_last)
            with_channels(p.channels, [&](const auto channels) FACTORKIT_INLINE_LAMBDA {
                for (int64_t i = 0; i < count; ++i)
                    for (int64_t c = 0; c < channels; ++c) to[c * kTile + i] = to_float(from[i * channels + c]);
            });
        else
            for (int64_t c = 0; c < p.channels; ++c)
                for (int64_t i = 0; i < count; ++i) to[c * kTile + i] = to_float(from[c * p.pixels + i]);
    }

    FACTORKIT_INLINE void write_branch(int64_t k, T* __restrict to) const {
        const float* __restrict from = values.data();
        to += row_of(k);
        if (p.channels_last)
            with_channels(p.channels, [&](const auto channels) FACTORKIT_INLINE_LAMBDA {
                for (int64_t i = 0; i < count; ++i)
                    for (int64_t c = 0; c < channels; ++c) store(from[c * kTile + i], to[i * channels + c]);
            });
        else
            for (int64_t c = 0; c < p.channels; ++c)
                for (int64_t i = 0; i < count; ++i) store(from[c * kTile + i], to[c * p.pixels + i]);
    }
};

template <class T>
FACTORKIT_INLINE void blend_tiles(const BlendProblem& p, float* masks, float* prediction, const BlendGradients* d,
                                  int64_t begin, int64_t end) {
    Blender<T> blender(p);
    for (int64_t tile = begin; tile < end; ++tile) {
        blender.begin_tile(tile);
        if (d)
            blender.backward(*d);
        else
            blender.forward(masks, prediction);
    }
}

// --- pyramid ---

// Averages 2x2 blocks of a plane into one [height][width].
template <class T>
FACTORKIT_INLINE void halve(const T* from, int64_t height, int64_t width, T* to) {
    for (int64_t y = 0; y < height; ++y, from += 4 * width, to += width)
        for (int64_t x = 0; x < width; ++x) {
            const float top = to_float(from[2 * x]) + to_float(from[2 * x + 1]);
            const float bottom = to_float(from[2 * width + 2 * x]) + to_float(from[2 * width + 2 * x + 1]);
            store(0.25f * (top + bottom), to[x]);
        }
}

// Sets a plane [2 height][2 width] to `grad`, null for zeros, plus a quarter of the coarser plane's values.
template <class From, class To>
FACTORKIT_INLINE void spread(const float* coarse, int64_t height, int64_t width, const From* grad, To* to) {
    for (int64_t y = 0; y < 2 * height; ++y, to += 2 * width) {
        const float* row = coarse + y / 2 * width;
        const From* g = grad ? grad + y * 2 * width : nullptr;
        for (int64_t x = 0; x < width; ++x) {
            const float share = 0.25f * row[x];
            store(g ? share + to_float(g[2 * x]) : share, to[2 * x]);
            store(g ? share + to_float(g[2 * x + 1]) : share, to[2 * x + 1]);
        }
    }
}

template <class T>
FACTORKIT_INLINE T* plane(const PyramidProblem& p, const Planes& level, int64_t index) {
    return static_cast<T*>(level.data) + index / p.regions * level.stride_b + index % p.regions * level.stride_k;
}

template <class T>
FACTORKIT_INLINE void halve_planes(const PyramidProblem& p, const Planes* levels, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
        for (int l = 1; l <= p.levels; ++l)
            halve(plane<T>(p, levels[l - 1], i), p.height >> l, p.width >> l, plane<T>(p, levels[l], i));
}

// From the coarsest level up, in fp32.
template <class T>
FACTORKIT_INLINE void spread_planes(const PyramidProblem& p, const Planes* levels, int64_t begin, int64_t end) {
    Floats total(p.height * p.width / 4), finer(p.levels > 1 ? total.size() : 0);
    for (int64_t i = begin; i < end; ++i) {
        const T* coarsest = plane<T>(p, levels[p.levels], i);
        const int64_t size = (p.height >> p.levels) * (p.width >> p.levels);
        for (int64_t j = 0; j < size; ++j) total[j] = to_float(coarsest[j]);
        for (int l = p.levels; l > 1; --l) {
            spread(total.data(), p.height >> l, p.width >> l, plane<T>(p, levels[l - 1], i), finer.data());
            total.swap(finer);
        }
        const T* none = nullptr;
        spread(total.data(), p.height >> 1, p.width >> 1, none, plane<T>(p, levels[0], i));
    }
}

}  // namespace

FACTORKIT_CLONES void blend_float(const BlendProblem& p, float* masks, float* prediction, const BlendGradients* d,
                                  int64_t begin, int64_t end) {
    blend_tiles<float>(p, masks, prediction, d, begin, end);
}
FACTORKIT_CLONES void blend_bf16(const BlendProblem& p, float* masks, float* prediction, const BlendGradients* d,
                                 int64_t begin, int64_t end) {
    blend_tiles<bf16>(p, masks, prediction, d, begin, end);
}
FACTORKIT_CLONES void halve_float(const PyramidProblem& p, const Planes* levels, int64_t begin, int64_t end) {
    halve_planes<float>(p, levels, begin, end);
}
FACTORKIT_CLONES void halve_bf16(const PyramidProblem& p, const Planes* levels, int64_t begin, int64_t end) {
    halve_planes<bf16>(p, levels, begin, end);
}
FACTORKIT_CLONES void spread_float(const PyramidProblem& p, const Planes* levels, int64_t begin, int64_t end) {
    spread_planes<float>(p, levels, begin, end);
}
FACTORKIT_CLONES void spread_bf16(const PyramidProblem& p, const Planes* levels, int64_t begin, int64_t end) {
    spread_planes<bf16>(p, levels, begin, end);
}

void region_blend(const BlendProblem& p, float* masks, float* prediction, const BlendGradients* d, int threads) {
    const auto run = p.is_bf16 ? blend_bf16 : blend_float;
    const int64_t tiles = p.batch * ((p.pixels + kTile - 1) / kTile);
    parallel_for(tiles, threads, [&](int64_t begin, int64_t end) { run(p, masks, prediction, d, begin, end); });
}

void region_blend_forward(const BlendProblem& p, float* masks, float* prediction, int threads) {
    region_blend(p, masks, prediction, nullptr, threads);
}

void region_blend_backward(const BlendProblem& p, const BlendGradients& d, int threads) {
    region_blend(p, nullptr, nullptr, &d, threads);
}

void mask_pyramid_forward(const PyramidProblem& p, const Planes* levels, int threads) {
    const auto run = p.is_bf16 ? halve_bf16 : halve_float;
    parallel_for(p.batch * p.regions, threads, [&](int64_t begin, int64_t end) { run(p, levels, begin, end); });
}

void mask_pyramid_backward(const PyramidProblem& p, const Planes* levels, int threads) {
    const auto run = p.is_bf16 ? spread_bf16 : spread_float;
    parallel_for(p.batch * p.regions, threads, [&](int64_t begin, int64_t end) { run(p, levels, begin, end); });
}

}  // namespace factorkit
