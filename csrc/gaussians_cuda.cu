#include "cuda_launch.h"
#include "gaussians.h"

namespace factorkit {
namespace {

using std::int32_t;
using std::int64_t;

constexpr unsigned kAll = 0xFFFFFFFFu;
static_assert(kThreads == kTile * kTile, "one thread a pixel of a tile");

template <class S>
__device__ __forceinline__ S sum_lanes(S x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
    return x;
}

template <class S>
__global__ void __launch_bounds__(kThreads) project_all(const Projection<S> p, const ProjectionOutputs<S> out) {
    const int64_t n = thread_index();
    if (n < p.count) project_one(p, out, n);
}

// A warp sums what its Gaussians give to the camera.
template <class S>
__global__ void __launch_bounds__(kThreads) project_all_backward(const Projection<S> p, const ProjectionGradients<S> d) {
    const int64_t n = thread_index();
    S camera[kCameraGradients] = {};
    if (n < p.count) project_one_backward(p, d, n, d.camera ? camera : nullptr);
    if (!d.camera || n / kProjectionBlock * kProjectionBlock >= p.count) return;
#pragma unroll
    for (int i = 0; i < kCameraGradients; ++i) {
        const S sum = sum_lanes(camera[i]);
        if (n % kProjectionBlock == 0) d.camera[n / kProjectionBlock * kCameraGradients + i] = sum;
    }
}

// A block is a tile, a thread one of its pixels, a warp 8 x 4 of them.
struct Pixel {
    int x, y;
    bool inside;
    int64_t index, begin, end;
};

template <class S>
__device__ __forceinline__ Pixel this_pixel(const Splats<S>& p) {
    const int columns = tile_columns(p.width), tile = int(blockIdx.x), warp_index = int(threadIdx.x) / 32,
              lane = int(threadIdx.x) % 32;
    Pixel pixel;
    pixel.x = tile % columns * kTile + warp_index % 2 * 8 + lane % 8;
    pixel.y = tile / columns * kTile + warp_index / 2 * 4 + lane / 8;
    pixel.inside = pixel.x < p.width && pixel.y < p.height;
    pixel.index = int64_t(pixel.y) * p.width + pixel.x;
    pixel.begin = p.offsets[tile];
    pixel.end = p.offsets[tile + 1];
    return pixel;
}

template <class S, int C>
__global__ void __launch_bounds__(kThreads) forward(const Splats<S> p, const SplatOutputs<S> out) {
    const Pixel pixel = this_pixel(p);
    S color[C] = {}, depth = 0, transmittance = 1;
    int32_t used = 0;
    bool live = pixel.inside;
    for (int64_t m = pixel.begin; m < pixel.end; ++m) {
        if (!__any_sync(kAll, live)) break;
        const int64_t n = p.ids[m];
        const S dx = p.means2d[2 * n] - (S(pixel.x) + S(0.5)), dy = p.means2d[2 * n + 1] - (S(pixel.y) + S(0.5));
        const S falloff = gaussian_value(p.conics[3 * n], p.conics[3 * n + 1], p.conics[3 * n + 2], dx, dy);
        const S alpha = limit_alpha(p.opacities[n] * falloff), next = transmittance * (S(1) - alpha);
        if (!live || !(alpha >= S(kMinAlpha))) continue;
        live = next > S(kMinTransmittance);
        if (!live) continue;
        const S weight = alpha * transmittance;
#pragma unroll
        for (int c = 0; c < C; ++c)
            if (c < p.channels) color[c] += weight * p.colors[n * p.channels + c];
        depth += weight * p.depths[n];
        transmittance = next;
        used = int32_t(m - pixel.begin) + 1;
    }
    if (!pixel.inside) return;
#pragma unroll
    for (int c = 0; c < C; ++c)
        if (c < p.channels) out.color[pixel.index * p.channels + c] = color[c];
    out.depth[pixel.index] = depth;
    out.opacity[pixel.index] = S(1) - transmittance;
    out.transmittance[pixel.index] = transmittance;
    out.used[pixel.index] = used;
}

// From the last Gaussian of the warp's pixels to the first. The sums over a warp meet those of other warps and tiles in
// atomics, whose order changes the last bits from run to run.
template <class S>
__global__ void __launch_bounds__(kThreads) backward(const Splats<S> p, const SplatGradients<S> d) {
    const Pixel pixel = this_pixel(p);
    const bool first_lane = threadIdx.x % 32 == 0;
    const int32_t used = pixel.inside ? d.used[pixel.index] : 0;
    S transmittance = pixel.inside ? d.transmittance[pixel.index] : S(1), behind = 0;
    const S on_depth = pixel.inside && d.depth ? d.depth[pixel.index] : S(0);
    const S on_opacity = pixel.inside && d.opacity ? d.opacity[pixel.index] : S(0);
    int32_t most = used;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const int32_t other = __shfl_xor_sync(kAll, most, step);
        most = other > most ? other : most;
    }
    for (int32_t number = most; number > 0; --number) {
        const int64_t n = p.ids[pixel.begin + number - 1];
        const S a = p.conics[3 * n], b = p.conics[3 * n + 1], c = p.conics[3 * n + 2];
        const S dx = p.means2d[2 * n] - (S(pixel.x) + S(0.5)), dy = p.means2d[2 * n + 1] - (S(pixel.y) + S(0.5));
        const S falloff = gaussian_value(a, b, c, dx, dy), raw = p.opacities[n] * falloff, alpha = limit_alpha(raw);
        const bool adds = number <= used && alpha >= S(kMinAlpha);
        if (!__any_sync(kAll, adds)) continue;
        S weight = 0, on_raw = 0;
        if (adds) {
            S value = on_opacity + p.depths[n] * on_depth;
            for (int k = 0; k < p.channels && d.color; ++k)
                value += p.colors[n * p.channels + k] * d.color[pixel.index * p.channels + k];
            transmittance /= S(1) - alpha;
            weight = alpha * transmittance;
            if (raw <= S(kMaxAlpha)) on_raw = transmittance * (value - behind);
            behind = alpha * value + (S(1) - alpha) * behind;
        }
        const S on_sigma = -on_raw * raw;
        const S found[] = {on_sigma * (a * dx + b * dy), on_sigma * (b * dx + c * dy), S(0.5) * on_sigma * dx * dx,
                           on_sigma * dx * dy, S(0.5) * on_sigma * dy * dy, weight * on_depth, on_raw * falloff};
        S* const to[] = {d.means2d + 2 * n,    d.means2d + 2 * n + 1, d.conics + 3 * n, d.conics + 3 * n + 1,
                         d.conics + 3 * n + 2, d.depths + n,          d.opacities + n};
#pragma unroll
        for (int i = 0; i < 7; ++i) {
            const S sum = sum_lanes(found[i]);
            if (first_lane) atomicAdd(to[i], sum);
        }
        for (int k = 0; k < p.channels && d.color; ++k) {
            const S sum = sum_lanes(adds ? weight * d.color[pixel.index * p.channels + k] : S(0));
            if (first_lane) atomicAdd(d.colors + n * p.channels + k, sum);
        }
    }
}

template <class S, int C>
void launch_forward(const Splats<S>& p, const SplatOutputs<S>& out, unsigned tiles, cudaStream_t stream) {
    forward<S, C><<<tiles, kThreads, 0, stream>>>(p, out);
}

template <class S>
unsigned tile_blocks(const Splats<S>& p) {
    return blocks_for(int64_t(tile_columns(p.width)) * tile_columns(p.height), kThreads);
}

}  // namespace

template <class S>
void project_gaussians_cuda(const Projection<S>& p, const ProjectionOutputs<S>& out, void* on) {
    if (p.count == 0) return;
    const auto stream = static_cast<cudaStream_t>(on);
    project_all<S><<<blocks_for(p.count), kThreads, 0, stream>>>(p, out);
    check_launch("project_gaussians");
}

template <class S>
void project_gaussians_backward_cuda(const Projection<S>& p, const ProjectionGradients<S>& d, void* on) {
    if (p.count == 0) return;
    const auto stream = static_cast<cudaStream_t>(on);
    project_all_backward<S><<<blocks_for(p.count), kThreads, 0, stream>>>(p, d);
    check_launch("the gradient of project_gaussians");
}

template <class S>
void rasterize_gaussians_cuda(const Splats<S>& p, const SplatOutputs<S>& out, void* on) {
    const int c = p.channels;
    const auto launch = c <= 3 ? launch_forward<S, 3> : c <= 8 ? launch_forward<S, 8> : launch_forward<S, kMaxChannels>;
    launch(p, out, tile_blocks(p), static_cast<cudaStream_t>(on));
    check_launch("rasterize_gaussians");
}

template <class S>
void rasterize_gaussians_backward_cuda(const Splats<S>& p, const SplatGradients<S>& d, void* on) {
    const auto stream = static_cast<cudaStream_t>(on);
    backward<S><<<tile_blocks(p), kThreads, 0, stream>>>(p, d);
    check_launch("the gradient of rasterize_gaussians");
}

#define FACTORKIT_INSTANTIATE(S)                                                                                \
    template void project_gaussians_cuda(const Projection<S>&, const ProjectionOutputs<S>&, void*);             \
    template void project_gaussians_backward_cuda(const Projection<S>&, const ProjectionGradients<S>&, void*);  \
    template void rasterize_gaussians_cuda(const Splats<S>&, const SplatOutputs<S>&, void*);                    \
    template void rasterize_gaussians_backward_cuda(const Splats<S>&, const SplatGradients<S>&, void*);
FACTORKIT_INSTANTIATE(float)
FACTORKIT_INSTANTIATE(double)

}  // namespace factorkit
