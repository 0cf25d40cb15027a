#include "region_pool.h"

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

constexpr int64_t kTileNumbers = 4096;  // features that stay in the first-level cache from some regions to the next
constexpr int kInFlight = 2;            // pixels whose sums do not wait for each other

// Adds m_k f over `count` pixels to the packed sums [R][stride] of R regions.
template <int R, class T>
FACTORKIT_INLINE void add_weighted(const T* features, const float* masks, int64_t pixels, int64_t count, int64_t width,
                                   float* totals, int64_t stride) {
    for_row_packs<T>(width, [&](const auto pack) FACTORKIT_INLINE_LAMBDA {
        constexpr int V = decltype(pack)::kVectors;
        Lanes sums[kInFlight][R][V] = {};
        const auto add = [&](int64_t i, int j) FACTORKIT_INLINE_LAMBDA {
            for (int v = 0; v < V; ++v) {
                const Lanes f = pack.load(features + i * width, v);
                for (int k = 0; k < R; ++k) sums[j][k][v] += masks[k * pixels + i] * f;
            }
        };
        int64_t i = 0;
        for (; i + kInFlight <= count; i += kInFlight)
            for (int j = 0; j < kInFlight; ++j) add(i + j, j);
        for (; i < count; ++i) add(i, 0);
        for (int k = 0; k < R; ++k)
            for (int v = 0; v < V; ++v) {
                Lanes sum = pack.load_packed(totals + k * stride, v);
                for (int j = 0; j < kInFlight; ++j) sum += sums[j][k][v];
                pack.store_packed(sum, totals + k * stride, v);
            }
    });
}

FACTORKIT_INLINE float area_of(const float* mask, int64_t pixels) {
    Lanes sums[2] = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= pixels; i += 2 * kLanes) {
        sums[0] += load_lanes(mask + i);
        sums[1] += load_lanes(mask + i + kLanes);
    }
    float area = sum_lanes(sums[0] + sums[1]);
    for (; i < pixels; ++i) area += mask[i];
    return area;
}

template <class T>
FACTORKIT_INLINE void pool_images(const PoolProblem& p, float* to_tokens, int64_t begin, int64_t end) {
    const int64_t n = p.pixels, width = p.channels, tile = std::max<int64_t>(1, kTileNumbers / width);
    const int64_t stride = packed_size(width);
    Floats sums(p.regions * stride);
    for (int64_t image = begin; image < end; ++image) {
        const float* masks = p.masks + image * p.regions * n;
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t at = 0; at < n; at += tile) {
            const T* features = static_cast<const T*>(p.features) + (image * n + at) * width;
            const int64_t count = std::min(tile, n - at);
            int64_t k = 0;
            for (; k + 2 <= p.regions; k += 2)
                add_weighted<2>(features, masks + k * n + at, n, count, width, &sums[k * stride], stride);
            if (k < p.regions)
                add_weighted<1>(features, masks + k * n + at, n, count, width, &sums[k * stride], stride);
        }
        for (int64_t k = 0; k < p.regions; ++k) {
            const float factor = 1.0f / (area_of(masks + k * n, n) + p.floor);
            float* tokens = to_tokens + (image * p.regions + k) * width;
            for (int64_t i = 0; i < stride; ++i)
                tokens[channel_at(i, width, p.is_bf16)] = sums[k * stride + i] * factor;
        }
    }
}

// One image at a time: the packed `weights` [regions][stride] are the upstream gradients over the areas, by which the
// features' gradient is sum_k m_k weights_k and that of m_k is weights_k . f - offset_k, offset_k = weights_k . tokens_k.
template <class T>
struct PoolBackward {
    const PoolProblem& p;
    const PoolGradients& d;
    const int64_t stride;
    Floats weights, offsets;
    Floats products;  // [regions][kLanes][kLanes]: of some pixels weights_k . f before the sum over the last index

    PoolBackward(const PoolProblem& p, const PoolGradients& d)
        : p(p), d(d), stride(packed_size(p.channels)), weights(p.regions * stride), offsets(p.regions),
          products(p.regions * kLanes * kLanes) {}

    FACTORKIT_INLINE void run(int64_t image) {
        for (int64_t k = 0; k < p.regions; ++k) {
            const int64_t row = image * p.regions + k;
            const float factor = 1.0f / (area_of(p.masks + row * p.pixels, p.pixels) + p.floor);
            const float *on_tokens = d.on_tokens + row * p.channels, *tokens = d.tokens + row * p.channels;
            for (int64_t i = 0; i < stride; ++i)
                weights[k * stride + i] = on_tokens[channel_at(i, p.channels, p.is_bf16)] * factor;
            double offset = 0;
            for (int64_t c = 0; c < p.channels; ++c) offset += double(on_tokens[c]) * tokens[c];
            offsets[k] = float(offset) * factor;
        }
        for (int64_t i = 0; i < p.pixels; i += kLanes) run_pixels(image, i, std::min(kLanes, p.pixels - i));
    }

   private:
    FACTORKIT_INLINE void run_pixels(int64_t image, int64_t begin, int64_t count) {
        const int64_t n = p.pixels, width = p.channels, regions = p.regions;
        const float *masks = p.masks + image * regions * n + begin, *all_weights = weights.data();
        float* all_products = products.data();
        std::fill(products.begin(), products.end(), 0.0f);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t at = (image * n + begin + i) * width;
            const T* features = static_cast<const T*>(p.features) + at;
            T* on_features = static_cast<T*>(d.features) + at;
            for_row_packs<T>(width, [&](const auto pack) FACTORKIT_INLINE_LAMBDA {
                constexpr int V = decltype(pack)::kVectors;
                Lanes f[V], sums[V] = {};
                for (int v = 0; v < V; ++v) f[v] = pack.load(features, v);
                for (int64_t k = 0; k < regions; ++k) {
                    float* product = all_products + (k * kLanes + i) * kLanes;
                    Lanes total = load_lanes(product);
                    for (int v = 0; v < V; ++v) {
                        const Lanes w = pack.load_packed(all_weights + k * stride, v);
                        sums[v] += masks[k * n + i] * w;
                        total += pack.once(w * f[v]);
                    }
                    store_lanes(total, product);
                }
                pack.store(sums, on_features);
            });
        }
        for (int64_t k = 0; k < p.regions; ++k) {
            Lanes of_pixel[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) of_pixel[i] = load_lanes(&products[(k * kLanes + i) * kLanes]);
            const Lanes on_masks = sum_each(of_pixel) - offsets[k];
            std::memcpy(d.masks + (image * p.regions + k) * n + begin, &on_masks, count * sizeof(float));
        }
    }
};

template <class T>
FACTORKIT_INLINE void pool_gradients(const PoolProblem& p, const PoolGradients& d, int64_t begin, int64_t end) {
    PoolBackward<T> backward(p, d);
    for (int64_t image = begin; image < end; ++image) backward.run(image);
}

}  // namespace

FACTORKIT_CLONES void pool_float(const PoolProblem& p, float* tokens, int64_t begin, int64_t end) {
    pool_images<float>(p, tokens, begin, end);
}
FACTORKIT_CLONES void pool_bf16(const PoolProblem& p, float* tokens, int64_t begin, int64_t end) {
    pool_images<bf16>(p, tokens, begin, end);
}
FACTORKIT_CLONES void pool_gradients_float(const PoolProblem& p, const PoolGradients& d, int64_t begin, int64_t end) {
    pool_gradients<float>(p, d, begin, end);
}
FACTORKIT_CLONES void pool_gradients_bf16(const PoolProblem& p, const PoolGradients& d, int64_t begin, int64_t end) {
    pool_gradients<bf16>(p, d, begin, end);
}

void region_pool_forward(const PoolProblem& p, float* tokens, int threads) {
    const auto run = p.is_bf16 ? pool_bf16 : pool_float;
    parallel_for(p.batch, threads, [&](int64_t begin, int64_t end) { run(p, tokens, begin, end); });
}

void region_pool_backward(const PoolProblem& p, const PoolGradients& d, int threads) {
    const auto run = p.is_bf16 ? pool_gradients_bf16 : pool_gradients_float;
    parallel_for(p.batch, threads, [&](int64_t begin, int64_t end) { run(p, d, begin, end); });
}

}  // namespace factorkit
