#include "gaussians.h"

#include <algorithm>
#include <vector>

#include "simd.h"
#include "threads.h"

namespace factorkit {
namespace {

using std::int32_t;
using std::int64_t;

constexpr int kLanes = 8;     // pixels of a row are computed in multiples of it: whole vectors, no rest
constexpr int kGeometry = 7;  // gradients of a Gaussian besides its colour: mean 2, conic 3, depth, opacity

int64_t tile_count(int width, int height) { return int64_t(tile_columns(width)) * tile_columns(height); }

// The tiles from (x0, y0) up to (x1, y1) that a box of pixels touches.
PixelBox tile_box(const PixelBox& box) {
    return {box.x0 / kTile, box.y0 / kTile, (box.x1 + kTile - 1) / kTile, (box.y1 + kTile - 1) / kTile};
}

template <class S>
std::vector<PixelBox> pixel_boxes(const Splats<S>& p, int threads) {
    std::vector<PixelBox> boxes(p.count);
    parallel_for(p.count, threads, [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; ++n) boxes[n] = pixel_box(p, nullptr, n);
    });
    return boxes;
}

// One tile's pixels, row by row.
template <class S>
struct Tile {
    alignas(64) S pixels[kTile * kTile];
    S* row(int y, int x) { return pixels + y * kTile + x; }
};

template <class S>
struct TilePlace {
    int x, y, width, height;  // of its part of the image
    int64_t begin, end;       // of its Gaussians

    TilePlace(const Splats<S>& p, int64_t tile) {
        const int columns = tile_columns(p.width);
        x = int(tile % columns) * kTile;
        y = int(tile / columns) * kTile;
        width = std::min(kTile, p.width - x);
        height = std::min(kTile, p.height - y);
        begin = p.offsets[tile];
        end = p.offsets[tile + 1];
    }
};

// A Gaussian as the pixels of a tile see it: positions from the tile's corner, and the rows and lanes it reaches.
template <class S>
struct Splat {
    S x, y, a, b, c, opacity, depth;
    int first_row, last_row, column, lanes;

    FACTORKIT_INLINE Splat(const Splats<S>& p, const TilePlace<S>& place, const PixelBox& box, int64_t n) {
        x = p.means2d[2 * n] - S(place.x);
        y = p.means2d[2 * n + 1] - S(place.y);
        a = p.conics[3 * n];
        b = p.conics[3 * n + 1];
        c = p.conics[3 * n + 2];
        opacity = p.opacities[n];
        depth = p.depths[n];
        first_row = std::max(0, box.y0 - place.y);
        last_row = std::min(place.height, box.y1 - place.y);
        column = std::max(0, box.x0 - place.x) / kLanes * kLanes;
        lanes = (std::min(place.width, box.x1 - place.x) - column + kLanes - 1) / kLanes * kLanes;
    }
};

template <class S, int C>
FACTORKIT_INLINE void forward_tiles(const Splats<S>& p, const SplatOutputs<S>& out, const PixelBox* boxes,
                                    int64_t first, int64_t last) {
    const int channels = C ? C : p.channels;
    std::vector<Tile<S>> colors(channels);
    Tile<S> transmittance, depths, live;  // live: 0 where a pixel has ended, else 1
    Tile<int32_t> used;
    for (int64_t tile = first; tile < last; ++tile) {
        const TilePlace<S> place(p, tile);
        for (Tile<S>& color : colors) std::fill_n(color.pixels, kTile * kTile, S(0));
        std::fill_n(transmittance.pixels, kTile * kTile, S(1));
        std::fill_n(depths.pixels, kTile * kTile, S(0));
        std::fill_n(used.pixels, kTile * kTile, 0);
        std::fill_n(live.pixels, kTile * kTile, S(0));
        for (int y = 0; y < place.height; ++y) std::fill_n(live.row(y, 0), place.width, S(1));
        for (int64_t m = place.begin; m < place.end; ++m) {
            const int64_t n = p.ids[m];
            const Splat<S> g(p, place, boxes[n], n);
            const int32_t number = int32_t(m - place.begin) + 1;
            const S* color = p.colors + n * channels;
            for (int y = g.first_row; y < g.last_row; ++y) {
                const S dy = g.y - (S(y) + S(0.5));
                S *t = transmittance.row(y, g.column), *on = live.row(y, g.column), *depth = depths.row(y, g.column);
                int32_t* count = used.row(y, g.column);
                S weight[kTile];
                // One condition a select, and no mask of two: what compilers vectorise.
#pragma omp simd
                for (int l = 0; l < g.lanes; ++l) {
                    const S dx = g.x - (S(g.column + l) + S(0.5));
                    const S alpha = limit_alpha(g.opacity * gaussian_value(g.a, g.b, g.c, dx, dy));
                    const S visible = (alpha >= S(kMinAlpha) ? alpha : S(0)) * on[l], next = t[l] * (S(1) - visible);
                    const bool ends = next <= S(kMinTransmittance);
                    weight[l] = ends ? S(0) : visible * t[l];
                    on[l] = ends ? S(0) : on[l];
                    t[l] = ends ? t[l] : next;
                    depth[l] += weight[l] * g.depth;
                }
#pragma omp simd
                for (int l = 0; l < g.lanes; ++l) count[l] = weight[l] > S(0) ? number : count[l];
                for (int c = 0; c < channels; ++c) {
                    S* sum = colors[c].row(y, g.column);
#pragma omp simd
                    for (int l = 0; l < g.lanes; ++l) sum[l] += weight[l] > S(0) ? weight[l] * color[c] : S(0);
                }
            }
            if (number % 16 == 0 && std::find(live.pixels, live.pixels + kTile * kTile, S(1)) == live.pixels + kTile * kTile)
                break;
        }
        for (int y = 0; y < place.height; ++y)
            for (int x = 0; x < place.width; ++x) {
                const int64_t i = int64_t(place.y + y) * p.width + place.x + x;
                for (int c = 0; c < channels; ++c) out.color[i * channels + c] = *colors[c].row(y, x);
                out.depth[i] = *depths.row(y, x);
                out.transmittance[i] = *transmittance.row(y, x);
                out.opacity[i] = S(1) - out.transmittance[i];
                out.used[i] = *used.row(y, x);
            }
    }
}

template <class S>
FACTORKIT_INLINE S sum_lanes(const S* x) {
    S eight[kLanes];
    for (int l = 0; l < kLanes; ++l) eight[l] = x[l] + x[l + kLanes];
    return ((eight[0] + eight[4]) + (eight[2] + eight[6])) + ((eight[1] + eight[5]) + (eight[3] + eight[7]));
}

// Writes the gradient of every Gaussian of every tile to `found`, [kGeometry + channels] each, in the order of the ids.
template <class S, int C>
FACTORKIT_INLINE void backward_tiles(const Splats<S>& p, const SplatGradients<S>& d, const PixelBox* boxes, S* found,
                                     int64_t first, int64_t last) {
    const int channels = C ? C : p.channels, size = kGeometry + channels;
    std::vector<Tile<S>> on_colors(channels);
    Tile<S> transmittance, on_depths, on_opacities, behind;
    Tile<int32_t> used;
    S sums[kGeometry + (C ? C : kMaxChannels)][kTile];
    for (int64_t tile = first; tile < last; ++tile) {
        const TilePlace<S> place(p, tile);
        std::fill_n(used.pixels, kTile * kTile, 0);
        std::fill_n(transmittance.pixels, kTile * kTile, S(1));
        std::fill_n(behind.pixels, kTile * kTile, S(0));
        for (Tile<S>* x : {&on_depths, &on_opacities}) std::fill_n(x->pixels, kTile * kTile, S(0));
        for (Tile<S>& color : on_colors) std::fill_n(color.pixels, kTile * kTile, S(0));
        int32_t most = 0;
        for (int y = 0; y < place.height; ++y)
            for (int x = 0; x < place.width; ++x) {
                const int64_t i = int64_t(place.y + y) * p.width + place.x + x;
                most = std::max(most, *used.row(y, x) = d.used[i]);
                *transmittance.row(y, x) = d.transmittance[i];
                if (d.depth) *on_depths.row(y, x) = d.depth[i];
                if (d.opacity) *on_opacities.row(y, x) = d.opacity[i];
                for (int c = 0; c < channels && d.color; ++c) *on_colors[c].row(y, x) = d.color[i * channels + c];
            }
        most = int32_t(std::min<int64_t>(most, place.end - place.begin));
        std::fill(found + (place.begin + most) * size, found + place.end * size, S(0));
        for (int32_t number = most; number > 0; --number) {
            const int64_t m = place.begin + number - 1, n = p.ids[m];
            const Splat<S> g(p, place, boxes[n], n);
            const S* color = p.colors + n * channels;
            for (int k = 0; k < size; ++k) std::fill_n(sums[k], kTile, S(0));
            for (int y = g.first_row; y < g.last_row; ++y) {
                const S dy = g.y - (S(y) + S(0.5));
                S *t = transmittance.row(y, g.column), *later = behind.row(y, g.column);
                const S *on_depth = on_depths.row(y, g.column), *on_opacity = on_opacities.row(y, g.column);
                const int32_t* count = used.row(y, g.column);
                S value[kTile], weight[kTile], counted[kTile];
#pragma omp simd
                for (int l = 0; l < g.lanes; ++l) counted[l] = number <= count[l] ? S(1) : S(0);
#pragma omp simd
                for (int l = 0; l < g.lanes; ++l) value[l] = on_opacity[l] + g.depth * on_depth[l];
                for (int c = 0; c < channels; ++c) {
                    const S* on_color = on_colors[c].row(y, g.column);
#pragma omp simd
                    for (int l = 0; l < g.lanes; ++l) value[l] += color[c] * on_color[l];
                }
#pragma omp simd
                for (int l = 0; l < g.lanes; ++l) {
                    const S dx = g.x - (S(g.column + l) + S(0.5));
                    const S falloff = gaussian_value(g.a, g.b, g.c, dx, dy), raw = g.opacity * falloff;
                    const S limited = limit_alpha(raw), alpha = (limited >= S(kMinAlpha) ? limited : S(0)) * counted[l];
                    const S passed = S(1) - alpha, before = t[l] / passed;
                    const S free = (raw > S(kMaxAlpha) ? S(0) : before) * (alpha > S(0) ? S(1) : S(0));
                    const S on_raw = free * (value[l] - later[l]);
                    t[l] = before;
                    weight[l] = alpha * before;
                    later[l] = alpha * value[l] + passed * later[l];
                    const S on_sigma = -on_raw * raw;
                    sums[0][l] += on_sigma * (g.a * dx + g.b * dy);
                    sums[1][l] += on_sigma * (g.b * dx + g.c * dy);
                    sums[2][l] += S(0.5) * on_sigma * dx * dx;
                    sums[3][l] += on_sigma * dx * dy;
                    sums[4][l] += S(0.5) * on_sigma * dy * dy;
                    sums[5][l] += weight[l] * on_depth[l];
                    sums[6][l] += on_raw * falloff;
                }
                for (int c = 0; c < channels; ++c) {
                    const S* on_color = on_colors[c].row(y, g.column);
                    S* sum = sums[kGeometry + c];
#pragma omp simd
                    for (int l = 0; l < g.lanes; ++l) sum[l] += weight[l] * on_color[l];
                }
            }
            for (int k = 0; k < size; ++k) found[m * size + k] = sum_lanes(sums[k]);
        }
    }
}

// target_clones does not go with templates, so both types and the common channel counts are spelled out.
#define FACTORKIT_GAUSSIANS(NAME, S, C)                                                                              \
    FACTORKIT_CLONES void NAME(const Splats<S>& p, const SplatOutputs<S>& out, const PixelBox* boxes, int64_t a,     \
                               int64_t b) {                                                                          \
        forward_tiles<S, C>(p, out, boxes, a, b);                                                                    \
    }                                                                                                                \
    FACTORKIT_CLONES void NAME(const Splats<S>& p, const SplatGradients<S>& d, const PixelBox* boxes, S* found,      \
                               int64_t a, int64_t b) {                                                               \
        backward_tiles<S, C>(p, d, boxes, found, a, b);                                                              \
    }
FACTORKIT_GAUSSIANS(three, float, 3)
FACTORKIT_GAUSSIANS(any, float, 0)
FACTORKIT_GAUSSIANS(any, double, 0)

template <class S, class... Other>
void run_tiles(const Splats<S>& p, int threads, const Other&... other) {
    parallel_for_uneven(tile_count(p.width, p.height), 1, threads, [&](int64_t first, int64_t last) {
        if constexpr (sizeof(S) == sizeof(float))
            if (p.channels == 3) return three(p, other..., first, last);
        any(p, other..., first, last);
    });
}

}  // namespace

template <class S>
void project_gaussians(const Projection<S>& p, const ProjectionOutputs<S>& out, int threads) {
    parallel_for(p.count, threads, [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; ++n) project_one(p, out, n);
    });
}

template <class S>
void project_gaussians_backward(const Projection<S>& p, const ProjectionGradients<S>& d, int threads) {
    const int64_t blocks = (p.count + kProjectionBlock - 1) / kProjectionBlock;
    parallel_for(blocks, threads, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) {
            S camera[kCameraGradients] = {};
            const int64_t end = std::min(p.count, (block + 1) * kProjectionBlock);
            for (int64_t n = block * kProjectionBlock; n < end; ++n)
                project_one_backward(p, d, n, d.camera ? camera : nullptr);
            if (d.camera) std::copy_n(camera, kCameraGradients, d.camera + block * kCameraGradients);
        }
    });
}

template <class S>
void count_tiles(const Splats<S>& p, const int32_t* radii, int32_t* order, int64_t* offsets) {
    std::vector<std::pair<S, int32_t>> visible;
    const int columns = tile_columns(p.width);
    const int64_t tiles = tile_count(p.width, p.height);
    std::fill_n(offsets, tiles + 1, int64_t(0));
    for (int64_t n = 0; n < p.count; ++n) {
        const PixelBox box = tile_box(pixel_box(p, radii, n));
        if (box.x0 >= box.x1 || box.y0 >= box.y1) continue;
        visible.emplace_back(p.depths[n], int32_t(n));
        for (int y = box.y0; y < box.y1; ++y)
            for (int x = box.x0; x < box.x1; ++x) ++offsets[int64_t(y) * columns + x + 1];
    }
    std::sort(visible.begin(), visible.end());
    for (int64_t tile = 0; tile < tiles; ++tile) offsets[tile + 1] += offsets[tile];
    std::fill_n(order, p.count, -1);
    for (std::size_t i = 0; i < visible.size(); ++i) order[i] = visible[i].second;
}

template <class S>
void fill_tiles(const Splats<S>& p, const int32_t* radii, const int32_t* order, int32_t* ids) {
    const int columns = tile_columns(p.width);
    std::vector<int64_t> next(p.offsets, p.offsets + tile_count(p.width, p.height));
    for (int64_t i = 0; i < p.count && order[i] >= 0; ++i) {
        const PixelBox box = tile_box(pixel_box(p, radii, order[i]));
        for (int y = box.y0; y < box.y1; ++y)
            for (int x = box.x0; x < box.x1; ++x) ids[next[int64_t(y) * columns + x]++] = order[i];
    }
}

template <class S>
void rasterize_gaussians(const Splats<S>& p, const SplatOutputs<S>& out, int threads) {
    run_tiles(p, threads, out, pixel_boxes(p, threads).data());
}

// Each tile writes what its Gaussians get from it, and each Gaussian adds up its tiles in their order: no atomics, and
// one result for any number of threads.
template <class S>
void rasterize_gaussians_backward(const Splats<S>& p, const SplatGradients<S>& d, int threads) {
    const int64_t pairs = p.offsets[tile_count(p.width, p.height)];
    const int size = kGeometry + p.channels;
    std::vector<S> found(pairs * size);
    run_tiles(p, threads, d, pixel_boxes(p, threads).data(), found.data());
    parallel_for(p.count, threads, [&](int64_t first, int64_t last) {
        for (int64_t m = 0; m < pairs; ++m) {
            const int64_t n = p.ids[m];
            if (n < first || n >= last) continue;
            const S* from = found.data() + m * size;
            for (int k = 0; k < 2; ++k) d.means2d[2 * n + k] += from[k];
            for (int k = 0; k < 3; ++k) d.conics[3 * n + k] += from[2 + k];
            d.depths[n] += from[5];
            d.opacities[n] += from[6];
            for (int c = 0; c < p.channels; ++c) d.colors[n * p.channels + c] += from[kGeometry + c];
        }
    });
}

#define FACTORKIT_INSTANTIATE(S)                                                                          \
    template void project_gaussians(const Projection<S>&, const ProjectionOutputs<S>&, int);              \
    template void project_gaussians_backward(const Projection<S>&, const ProjectionGradients<S>&, int);   \
    template void count_tiles(const Splats<S>&, const int32_t*, int32_t*, int64_t*);                      \
    template void fill_tiles(const Splats<S>&, const int32_t*, const int32_t*, int32_t*);                 \
    template void rasterize_gaussians(const Splats<S>&, const SplatOutputs<S>&, int);                     \
    template void rasterize_gaussians_backward(const Splats<S>&, const SplatGradients<S>&, int);
FACTORKIT_INSTANTIATE(float)
FACTORKIT_INSTANTIATE(double)

}  // namespace factorkit
