// Gaussian splatting (Kerbl et al. 2023; EWA splatting, Zwicker et al. 2002): the projection of one Gaussian and its
// gradient, what it adds to one pixel and the gradient of that, and what walks Gaussians, tiles and pixels with them.
//
//   t = W mean + p,  (W, p) the world-to-camera matrix, x right, y down, z forward;  Sigma = (R S)(R S)^T
//   P = J W R S,  cov = P P^T + low_pass I,  conic = cov^-1,  mean2d = (fx t_x / t_z + c_x, fy t_y / t_z + c_y)
//   compensation = sqrt(|P P^T| / |cov|): what the low-pass term adds to a Gaussian's integral is taken off its opacity
//
//   sigma_i = (a dx^2 + c dy^2) / 2 + b dx dy,  alpha_i = min(0.999, opacity_i exp(-sigma_i)),  0 below 1/255
//   w_i = alpha_i prod_{j<i} (1 - alpha_j) in the order of depth;  color = sum w_i color_i,  depth = sum w_i depth_i,
//   opacity = 1 - prod_i (1 - alpha_i)
//
// A pixel stops before the Gaussian that would take its transmittance to 1e-4 or below. Ties of depth keep the order of
// the input. Not drawn, with outputs and gradients of zero: Gaussians not between the near and the far plane, outside the
// image, or with a number that is not finite. A quaternion of zero length is no rotation and has no gradient.
#pragma once

#include <cmath>
#include <cstdint>

#include "composite.h"  // attenuate: exp that vectorises; kMaxChannels

namespace factorkit {

constexpr int kTile = 16;                   // pixels along each side of a tile
constexpr int kProjectionBlock = 32;        // Gaussians whose gradients of the camera are summed together: a warp
constexpr int kCameraGradients = 16;        // W [3, 3], p [3], fx, fy, cx, cy
constexpr double kMaxAlpha = 0.999;         // keeps 1 / (1 - alpha) finite, as 3DGS does
constexpr double kMinAlpha = 1.0 / 255;     // less changes no image of 8 bits
constexpr double kMinTransmittance = 1e-4;
constexpr double kFrustumMargin = 0.15;     // of the image, beyond which the Jacobian is that of the margin (gsplat)
constexpr double kMinCompensation = 1e-6;   // of its square: the root has no gradient at 0
constexpr double kMaxExtent = 3.3290429;    // sqrt(2 ln 255): standard deviations to where the opacity 1 falls to 1/255

template <class S>
struct Projection {
    const S *means, *quaternions, *scales;  // [N, 3], [N, 4] as (w, x, y, z) of any length, [N, 3]
    const S *viewmatrix, *intrinsics;       // [4, 4] world to camera, [3, 3] in pixels
    std::int64_t count;
    int width, height;
    S near, far, low_pass;
};

template <class S>
struct ProjectionOutputs {
    S *means2d, *conics, *depths, *compensations;  // [N, 2], [N, 3] as (a, b, c), [N], [N]
    std::int32_t* radii;                           // [N, 2], half sides in pixels of the box that holds it; 0: not visible
};

template <class S>
struct ProjectionGradients {
    const std::int32_t* radii;                               // as the forward pass wrote it
    const S *means2d, *conics, *depths, *compensations;      // upstream; null for zero
    S *means, *quaternions, *scales;                         // outputs
    S* camera;  // [ceil(N / kProjectionBlock), kCameraGradients], one row a block, to be summed; or null
};

template <class S>
struct Splats {
    const S *means2d, *conics, *depths, *colors, *opacities;  // [N, 2], [N, 3], [N], [N, channels], [N]
    std::int64_t count;
    int channels, width, height;
    const std::int64_t* offsets;  // [tiles + 1], row by row
    const std::int32_t* ids;      // the Gaussians of each tile, front to back
};

template <class S>
struct SplatOutputs {
    S *color, *depth, *opacity, *transmittance;  // [H, W, channels], [H, W], [H, W], [H, W]
    std::int32_t* used;                          // [H, W]: how many of its tile's Gaussians come before a pixel's end
};

template <class S>
struct SplatGradients {
    const S *color, *depth, *opacity;  // upstream; null for zero
    const S* transmittance;            // as the forward pass wrote it
    const std::int32_t* used;
    S *means2d, *conics, *depths, *colors, *opacities;  // outputs, zero before the call
};

template <class S>
void project_gaussians(const Projection<S>& p, const ProjectionOutputs<S>& out, int threads);
template <class S>
void project_gaussians_backward(const Projection<S>& p, const ProjectionGradients<S>& d, int threads);
template <class S>
void rasterize_gaussians(const Splats<S>& p, const SplatOutputs<S>& out, int threads);
template <class S>
void rasterize_gaussians_backward(const Splats<S>& p, const SplatGradients<S>& d, int threads);

// Sorts the visible Gaussians into tiles, front to back: first the number of each tile, offsets [tiles + 1], then,
// with the order that the first call wrote to [N] (-1 behind the last), the ids.
template <class S>
void count_tiles(const Splats<S>& p, const std::int32_t* radii, std::int32_t* order, std::int64_t* offsets);
template <class S>
void fill_tiles(const Splats<S>& p, const std::int32_t* radii, const std::int32_t* order, std::int32_t* ids);

template <class S>
void project_gaussians_cuda(const Projection<S>& p, const ProjectionOutputs<S>& out, void* stream);
template <class S>
void project_gaussians_backward_cuda(const Projection<S>& p, const ProjectionGradients<S>& d, void* stream);
template <class S>
void rasterize_gaussians_cuda(const Splats<S>& p, const SplatOutputs<S>& out, void* stream);
template <class S>
void rasterize_gaussians_backward_cuda(const Splats<S>& p, const SplatGradients<S>& d, void* stream);

// Everything that the projection of one Gaussian and its gradient share.
template <class S>
struct Projected {
    S t[3], m[3][3], r[3][3], k[3][3], pm[2][3];  // m = R S, k = J W (two rows), pm = k m
    S q[4], inverse_length;                       // of the quaternion; 0: no rotation
    S u, v;                                       // fx t_x / t_z and fy t_y / t_z within the margins
    int u_side, v_side;                           // 0: inside; else the margin's
    S a0, b0, c0, det0, det;                      // of P P^T, and its determinant and that of cov
    bool visible;
};

template <class S>
FACTORKIT_HOST_DEVICE bool is_finite(S x) {
    return x - x == S(0);
}

template <class S>
FACTORKIT_HOST_DEVICE S clamp_side(S x, S low, S high, int& side) {
    side = x < low ? -1 : x > high ? 1 : 0;
    return side < 0 ? low : side > 0 ? high : x;
}

template <class S>
FACTORKIT_HOST_DEVICE Projected<S> project(const Projection<S>& p, std::int64_t n) {
    Projected<S> g;
    const S *mean = p.means + 3 * n, *q = p.quaternions + 4 * n, *s = p.scales + 3 * n, *view = p.viewmatrix;
    for (int i = 0; i < 3; ++i)
        g.t[i] = view[4 * i] * mean[0] + view[4 * i + 1] * mean[1] + view[4 * i + 2] * mean[2] + view[4 * i + 3];
    g.visible = g.t[2] > p.near && g.t[2] < p.far;  // false for NaN
    if (!g.visible) return g;

    const S squared = q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3];
    g.inverse_length = squared > S(0) ? S(1) / std::sqrt(squared) : S(0);
    for (int i = 0; i < 4; ++i) g.q[i] = g.inverse_length > S(0) ? q[i] * g.inverse_length : S(i == 0);
    const S w = g.q[0], x = g.q[1], y = g.q[2], z = g.q[3];
    const S r[3][3] = {{1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)},
                       {2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)},
                       {2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)}};
    const S fx = p.intrinsics[0], fy = p.intrinsics[4], cx = p.intrinsics[2], cy = p.intrinsics[5];
    const S over = S(1) / g.t[2], margin_x = S(kFrustumMargin) * p.width, margin_y = S(kFrustumMargin) * p.height;
    g.u = clamp_side(fx * g.t[0] * over, -(cx + margin_x), S(p.width) + margin_x - cx, g.u_side);
    g.v = clamp_side(fy * g.t[1] * over, -(cy + margin_y), S(p.height) + margin_y - cy, g.v_side);
    const S j[2][3] = {{fx * over, 0, -g.u * over}, {0, fy * over, -g.v * over}};
    for (int i = 0; i < 3; ++i)
        for (int c = 0; c < 3; ++c) {
            g.r[i][c] = r[i][c];
            g.m[i][c] = r[i][c] * s[c];
        }
    for (int i = 0; i < 2; ++i)
        for (int c = 0; c < 3; ++c) g.k[i][c] = j[i][i] * view[4 * i + c] + j[i][2] * view[8 + c];
    for (int i = 0; i < 2; ++i)
        for (int c = 0; c < 3; ++c)
            g.pm[i][c] = g.k[i][0] * g.m[0][c] + g.k[i][1] * g.m[1][c] + g.k[i][2] * g.m[2][c];
    const S(*pm)[3] = g.pm;
    g.a0 = pm[0][0] * pm[0][0] + pm[0][1] * pm[0][1] + pm[0][2] * pm[0][2];
    g.b0 = pm[0][0] * pm[1][0] + pm[0][1] * pm[1][1] + pm[0][2] * pm[1][2];
    g.c0 = pm[1][0] * pm[1][0] + pm[1][1] * pm[1][1] + pm[1][2] * pm[1][2];
    // |P P^T| as the squared area that the rows of P span: no difference of large numbers.
    const S n0 = pm[0][1] * pm[1][2] - pm[0][2] * pm[1][1], n1 = pm[0][2] * pm[1][0] - pm[0][0] * pm[1][2],
            n2 = pm[0][0] * pm[1][1] - pm[0][1] * pm[1][0];
    g.det0 = n0 * n0 + n1 * n1 + n2 * n2;
    g.det = g.det0 + p.low_pass * (g.a0 + g.c0 + p.low_pass);
    g.visible = g.det > S(0) && is_finite(squared) && is_finite(g.det) && is_finite(g.a0 / g.det) && is_finite(g.c0 / g.det);
    return g;
}

// Writes Gaussian n.
template <class S>
FACTORKIT_HOST_DEVICE void project_one(const Projection<S>& p, const ProjectionOutputs<S>& out, std::int64_t n) {
    Projected<S> g = project(p, n);
    S x = 0, y = 0, radius_x = 0, radius_y = 0;
    if (g.visible) {
        x = p.intrinsics[0] * g.t[0] / g.t[2] + p.intrinsics[2];
        y = p.intrinsics[4] * g.t[1] / g.t[2] + p.intrinsics[5];
        radius_x = std::ceil(S(kMaxExtent) * std::sqrt(g.a0 + p.low_pass));
        radius_y = std::ceil(S(kMaxExtent) * std::sqrt(g.c0 + p.low_pass));
        g.visible = x + radius_x > S(0) && x - radius_x < S(p.width) && y + radius_y > S(0) &&
                    y - radius_y < S(p.height) && radius_x < S(1 << 30) && radius_y < S(1 << 30);
    }
    const bool v = g.visible;
    const S a = g.a0 + p.low_pass, c = g.c0 + p.low_pass;
    const S ratio = v ? g.det0 / g.det : S(0);
    out.means2d[2 * n] = v ? x : S(0);
    out.means2d[2 * n + 1] = v ? y : S(0);
    out.conics[3 * n] = v ? c / g.det : S(0);
    out.conics[3 * n + 1] = v ? -g.b0 / g.det : S(0);
    out.conics[3 * n + 2] = v ? a / g.det : S(0);
    out.depths[n] = v ? g.t[2] : S(0);
    out.compensations[n] = v ? std::sqrt(ratio > S(kMinCompensation) ? ratio : S(kMinCompensation)) : S(0);
    out.radii[2 * n] = v ? std::int32_t(radius_x) : 0;
    out.radii[2 * n + 1] = v ? std::int32_t(radius_y) : 0;
}

// Writes the gradients of Gaussian n; adds those of the camera to `camera`.
template <class S>
FACTORKIT_HOST_DEVICE void project_one_backward(const Projection<S>& p, const ProjectionGradients<S>& d,
                                                std::int64_t n, S* camera) {
    S *d_mean = d.means + 3 * n, *d_q = d.quaternions + 4 * n, *d_s = d.scales + 3 * n;
    for (int i = 0; i < 3; ++i) d_mean[i] = d_s[i] = S(0);
    for (int i = 0; i < 4; ++i) d_q[i] = S(0);
    if (d.radii[2 * n] == 0) return;
    const Projected<S> g = project(p, n);
    const S *mean = p.means + 3 * n, *s = p.scales + 3 * n, *view = p.viewmatrix;
    const S fx = p.intrinsics[0], fy = p.intrinsics[4], over = S(1) / g.t[2];

    // cov: D = -conic G conic, with G of the conic as a symmetric matrix.
    const S a = (g.c0 + p.low_pass) / g.det, b = -g.b0 / g.det, c = (g.a0 + p.low_pass) / g.det;
    const S ga = d.conics ? d.conics[3 * n] : S(0), gb = d.conics ? S(0.5) * d.conics[3 * n + 1] : S(0),
            gc = d.conics ? d.conics[3 * n + 2] : S(0);
    const S e00 = a * ga + b * gb, e01 = a * gb + b * gc, e10 = b * ga + c * gb, e11 = b * gb + c * gc;
    S d00 = -(e00 * a + e01 * b), d01 = -(e00 * b + e01 * c), d11 = -(e10 * b + e11 * c);
    const S ratio = g.det0 / g.det;
    if (d.compensations && ratio > S(kMinCompensation)) {
        const S d_ratio = S(0.5) * d.compensations[n] / std::sqrt(ratio), on_det0 = d_ratio / g.det,
                on_det = -d_ratio * ratio / g.det;
        d00 += on_det0 * g.c0 + on_det * (g.c0 + p.low_pass);
        d01 -= (on_det0 + on_det) * g.b0;
        d11 += on_det0 * g.a0 + on_det * (g.a0 + p.low_pass);
    }

    // P, then K = J W and M = R S, then J, W, R and S.
    S d_pm[2][3], d_k[2][3], d_m[3][3], d_r[3][3], d_t[3];
    for (int i = 0; i < 3; ++i) {
        d_pm[0][i] = 2 * (d00 * g.pm[0][i] + d01 * g.pm[1][i]);
        d_pm[1][i] = 2 * (d01 * g.pm[0][i] + d11 * g.pm[1][i]);
    }
    for (int i = 0; i < 2; ++i)
        for (int k = 0; k < 3; ++k)
            d_k[i][k] = d_pm[i][0] * g.m[k][0] + d_pm[i][1] * g.m[k][1] + d_pm[i][2] * g.m[k][2];
    for (int k = 0; k < 3; ++k)
        for (int i = 0; i < 3; ++i) {
            d_m[k][i] = g.k[0][k] * d_pm[0][i] + g.k[1][k] * d_pm[1][i];
            d_r[k][i] = d_m[k][i] * s[i];
            d_s[i] += d_m[k][i] * g.r[k][i];
        }
    S d_j[2][2];  // of J's diagonal and of its last column
    for (int i = 0; i < 2; ++i) {
        d_j[i][0] = d_k[i][0] * view[4 * i] + d_k[i][1] * view[4 * i + 1] + d_k[i][2] * view[4 * i + 2];
        d_j[i][1] = d_k[i][0] * view[8] + d_k[i][1] * view[9] + d_k[i][2] * view[10];
    }
    const S gx = d.means2d ? d.means2d[2 * n] : S(0), gy = d.means2d ? d.means2d[2 * n + 1] : S(0);
    const S gu = -d_j[0][1] * over, gv = -d_j[1][1] * over;  // of u and v
    const S on_u = gx + (g.u_side ? S(0) : gu), on_v = gy + (g.v_side ? S(0) : gv);  // of fx t_x / t_z
    d_t[0] = on_u * fx * over;
    d_t[1] = on_v * fy * over;
    d_t[2] = (d.depths ? d.depths[n] : S(0)) - (on_u * fx * g.t[0] + on_v * fy * g.t[1]) * over * over -
             (d_j[0][0] * fx + d_j[1][0] * fy - d_j[0][1] * g.u - d_j[1][1] * g.v) * over * over;
    for (int i = 0; i < 3; ++i) d_mean[i] = view[i] * d_t[0] + view[4 + i] * d_t[1] + view[8 + i] * d_t[2];
    if (camera) {
        const S j[2][2] = {{fx * over, -g.u * over}, {fy * over, -g.v * over}};
        for (int i = 0; i < 3; ++i)
            for (int k = 0; k < 3; ++k)
                camera[3 * i + k] += d_t[i] * mean[k] + (i < 2 ? j[i][0] * d_k[i][k]
                                                                : j[0][1] * d_k[0][k] + j[1][1] * d_k[1][k]);
        for (int i = 0; i < 3; ++i) camera[9 + i] += d_t[i];
        camera[12] += on_u * g.t[0] * over + d_j[0][0] * over;
        camera[13] += on_v * g.t[1] * over + d_j[1][0] * over;
        camera[14] += gx - (g.u_side ? gu : S(0));
        camera[15] += gy - (g.v_side ? gv : S(0));
    }
    if (g.inverse_length == S(0)) return;
    const S w = g.q[0], x = g.q[1], y = g.q[2], z = g.q[3];
    const S(*r)[3] = d_r;
    const S on_q[4] = {
        2 * (z * (r[1][0] - r[0][1]) + y * (r[0][2] - r[2][0]) + x * (r[2][1] - r[1][2])),
        2 * (y * (r[0][1] + r[1][0]) + z * (r[0][2] + r[2][0]) + w * (r[2][1] - r[1][2]) - 2 * x * (r[1][1] + r[2][2])),
        2 * (x * (r[0][1] + r[1][0]) + z * (r[1][2] + r[2][1]) + w * (r[0][2] - r[2][0]) - 2 * y * (r[0][0] + r[2][2])),
        2 * (x * (r[0][2] + r[2][0]) + y * (r[1][2] + r[2][1]) + w * (r[1][0] - r[0][1]) - 2 * z * (r[0][0] + r[1][1]))};
    const S along = on_q[0] * w + on_q[1] * x + on_q[2] * y + on_q[3] * z;
    for (int i = 0; i < 4; ++i) d_q[i] = (on_q[i] - along * g.q[i]) * g.inverse_length;
}

// The pixels [x0, x1) x [y0, y1) that a Gaussian can reach; empty where it is not visible. Its opacity makes the box of
// its radii smaller.
struct PixelBox {
    int x0, y0, x1, y1;
};

template <class S>
FACTORKIT_HOST_DEVICE PixelBox pixel_box(const Splats<S>& p, const std::int32_t* radii, std::int64_t n) {
    const S x = p.means2d[2 * n], y = p.means2d[2 * n + 1], opacity = p.opacities[n], depth = p.depths[n];
    const S a = p.conics[3 * n], b = p.conics[3 * n + 1], c = p.conics[3 * n + 2], det = a * c - b * b;
    const PixelBox none{0, 0, 0, 0};
    if (radii && (radii[2 * n] <= 0 || radii[2 * n + 1] <= 0)) return none;
    if (!(a > S(0) && c > S(0) && det > S(0) && opacity >= S(kMinAlpha)) || !is_finite(det) || !is_finite(x) ||
        !is_finite(y) || !is_finite(depth) || !is_finite(opacity))
        return none;
    for (int k = 0; k < p.channels; ++k)
        if (!is_finite(p.colors[n * p.channels + k])) return none;
    // Half a pixel of slack: the last bits of the conic must not decide what is drawn.
    const S reach = 2 * std::log(opacity * S(255)), slack = S(0.5);
    const S half_x = std::sqrt(reach * c / det) + slack, half_y = std::sqrt(reach * a / det) + slack;
    const S left = x - half_x, right = x + half_x, top = y - half_y, bottom = y + half_y;
    if (!(right > S(0) && left < S(p.width) && bottom > S(0) && top < S(p.height))) return none;
    return {left > S(0) ? int(left) : 0, top > S(0) ? int(top) : 0, right < S(p.width) ? int(right) + 1 : p.width,
            bottom < S(p.height) ? int(bottom) + 1 : p.height};
}

// exp(-sigma) of a Gaussian at (dx, dy) from its mean; 0 where the conic is not one.
template <class S>
FACTORKIT_HOST_DEVICE S gaussian_value(S a, S b, S c, S dx, S dy) {
    const S sigma = S(0.5) * (a * dx * dx + c * dy * dy) + b * dx * dy;
    return attenuate(sigma >= S(0) ? sigma : S(INFINITY)).passed;
}

template <class S>
FACTORKIT_HOST_DEVICE S limit_alpha(S raw) {
    return raw > S(kMaxAlpha) ? S(kMaxAlpha) : raw;
}

FACTORKIT_HOST_DEVICE int tile_columns(int width) { return (width + kTile - 1) / kTile; }

}  // namespace factorkit
