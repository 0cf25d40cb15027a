#include "skip.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "rows.h"
#include "simd.h"
#include "threads.h"

namespace factorkit {
namespace {

using std::int64_t;
using Floats = std::vector<float>;

// By tiles of pixels, so that the skip stays in the first-level cache from one branch to the next. Branches lie a
// multiple of 4 KiB apart if sizes are powers of two: within a pixel, loads from one would wait for stores to another.
constexpr int64_t kTileNumbers = 2048;

int64_t tile_pixels(const SkipProblem& p) {
    return std::max(kLanes, kTileNumbers / p.channels / kLanes * kLanes);
}

int64_t tiles_per_image(const SkipProblem& p) { return (p.pixels + tile_pixels(p) - 1) / tile_pixels(p); }

struct Tile {
    int64_t image, begin, count;  // pixels
};

Tile tile_at(const SkipProblem& p, int64_t index) {
    const int64_t image = index / tiles_per_image(p), begin = index % tiles_per_image(p) * tile_pixels(p);
    return {image, begin, std::min(tile_pixels(p), p.pixels - begin)};
}

template <class T, bool HasResidual>
FACTORKIT_INLINE void add_tile(const SkipProblem& p, const Tile& tile, const float* bias, T* to_out) {
    const int64_t width = p.channels, in_image = (tile.image * p.pixels + tile.begin) * width;
    for (int64_t k = 0; k < p.regions; ++k) {
        const int64_t row = tile.image * p.regions + k, in_row = (row * p.pixels + tile.begin) * width;
        const T* base = static_cast<const T*>(p.base) + (p.base_shared ? in_image : in_row);
        const T* residual = HasResidual ? static_cast<const T*>(p.residual) + in_row : base;
        const T* skip = static_cast<const T*>(p.skip) + in_image;
        const float* mask = p.masks + row * p.pixels + tile.begin;
        T* out = to_out + in_row;
        for (int64_t i = 0; i < tile.count; ++i, base += width, skip += width, residual += width, out += width)
            for_row_packs<T>(width, [&](const auto pack) FACTORKIT_INLINE_LAMBDA {
                constexpr int V = decltype(pack)::kVectors;
                Lanes x[V];
                for (int v = 0; v < V; ++v) {
                    x[v] = pack.load(base, v) + mask[i] * pack.load(skip, v) + pack.load_packed(bias, v);
                    if (HasResidual) x[v] += pack.load(residual, v);
                }
                pack.store(x, out);
            });
    }
}

template <class T>
FACTORKIT_INLINE void add_tiles(const SkipProblem& p, const float* bias, void* out, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        if (p.residual)
            add_tile<T, true>(p, tile_at(p, i), bias, static_cast<T*>(out));
        else
            add_tile<T, false>(p, tile_at(p, i), bias, static_cast<T*>(out));
    }
}

// The gradients of `count` pixels, at most kLanes. `products` [regions][kLanes][kLanes] holds m_k's gradient of each
// pixel before the sum over the last index: eight of these sums take little longer than one.
template <class T, bool SharedBase>
FACTORKIT_INLINE void add_gradients(const SkipProblem& p, const SkipGradients& d, int64_t image, int64_t begin,
                                    int64_t count, Floats& products) {
    const int64_t n = p.pixels, width = p.channels, regions = p.regions, of_region = n * width;
    const float* masks = p.masks + image * regions * n + begin;
    float* all_products = products.data();
    std::fill(products.begin(), products.end(), 0.0f);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (image * n + begin + i) * width;
        const T* grads = static_cast<const T*>(d.on_out) + (image * regions * n + begin + i) * width;
        const T* skip = static_cast<const T*>(p.skip) + at;
        T* on_skip = static_cast<T*>(d.skip) + at;
        T* on_base = SharedBase ? static_cast<T*>(d.base) + at : nullptr;
        for_row_packs<T>(width, [&](const auto pack) FACTORKIT_INLINE_LAMBDA {
            constexpr int V = decltype(pack)::kVectors;
            Lanes masked[V] = {}, plain[V] = {};
            for (int64_t k = 0; k < regions; ++k) {
                float* product = all_products + (k * kLanes + i) * kLanes;
                Lanes sum = load_lanes(product);
                for (int v = 0; v < V; ++v) {
                    const Lanes g = pack.load(grads + k * of_region, v);
                    masked[v] += masks[k * n + i] * g;
                    if (SharedBase) plain[v] += g;
                    sum += pack.once(g * pack.load(skip, v));
                }
                store_lanes(sum, product);
            }
            pack.store(masked, on_skip);
            if (SharedBase) pack.store(plain, on_base);
        });
    }
    for (int64_t k = 0; k < p.regions; ++k) {
        Lanes of_pixel[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) of_pixel[i] = load_lanes(&products[(k * kLanes + i) * kLanes]);
        const Lanes sums = sum_each(of_pixel);
        std::memcpy(d.masks + (image * p.regions + k) * n + begin, &sums, count * sizeof(float));
    }
}

template <class T>
FACTORKIT_INLINE void add_gradients_of_tiles(const SkipProblem& p, const SkipGradients& d, int64_t begin, int64_t end) {
    Floats products(p.regions * kLanes * kLanes);
    for (int64_t index = begin; index < end; ++index) {
        const Tile tile = tile_at(p, index);
        for (int64_t i = 0; i < tile.count; i += kLanes) {
            const int64_t count = std::min(kLanes, tile.count - i);
            if (d.base)
                add_gradients<T, true>(p, d, tile.image, tile.begin + i, count, products);
            else
                add_gradients<T, false>(p, d, tile.image, tile.begin + i, count, products);
        }
    }
}

}  // namespace

FACTORKIT_CLONES void skip_add_float(const SkipProblem& p, const float* bias, void* out, int64_t begin, int64_t end) {
    add_tiles<float>(p, bias, out, begin, end);
}
FACTORKIT_CLONES void skip_add_bf16(const SkipProblem& p, const float* bias, void* out, int64_t begin, int64_t end) {
    add_tiles<bf16>(p, bias, out, begin, end);
}
FACTORKIT_CLONES void skip_gradients_float(const SkipProblem& p, const SkipGradients& d, int64_t begin, int64_t end) {
    add_gradients_of_tiles<float>(p, d, begin, end);
}
FACTORKIT_CLONES void skip_gradients_bf16(const SkipProblem& p, const SkipGradients& d, int64_t begin, int64_t end) {
    add_gradients_of_tiles<bf16>(p, d, begin, end);
}

void masked_skip_add_forward(const SkipProblem& p, void* out, int threads) {
    const auto run = p.is_bf16 ? skip_add_bf16 : skip_add_float;
    Floats bias(packed_size(p.channels));
    for (int64_t i = 0; p.bias && i < int64_t(bias.size()); ++i) bias[i] = p.bias[channel_at(i, p.channels, p.is_bf16)];
    parallel_for(p.batch * tiles_per_image(p), threads,
                 [&](int64_t begin, int64_t end) { run(p, bias.data(), out, begin, end); });
}

void masked_skip_add_backward(const SkipProblem& p, const SkipGradients& d, int threads) {
    const auto run = p.is_bf16 ? skip_gradients_bf16 : skip_gradients_float;
    parallel_for(p.batch * tiles_per_image(p), threads, [&](int64_t begin, int64_t end) { run(p, d, begin, end); });
}

}  // namespace factorkit
