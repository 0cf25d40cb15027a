// Runs the rendering ops on random and on hostile inputs, every array a heap block of exactly its size, so that
// sanitizers see any foreign access. With EMULATED_CUDA each is run through its CUDA kernel too, and the two must
// agree.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "composite.h"
#include "gaussians.h"
#include "march.h"
#include "resample.h"
#ifdef EMULATED_CUDA
#include "cuda_runtime.h"
#endif

using namespace factorkit;
using std::int64_t;
template <class T>
using Numbers = std::vector<T>;

std::uint64_t state = 88172645463325252ull;
double uniform() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return double(state >> 11) / 9007199254740992.0;
}

template <class T>
Numbers<T> random_numbers(int64_t count, double low, double high) {
    Numbers<T> out(count);
    for (T& x : out) store(wide_t<T>(low + (high - low) * uniform()), x);
    return out;
}

void require(bool holds, const char* what, double a = 0, double b = 0) {
    if (holds) return;
    std::fprintf(stderr, "%s: %.9g and %.9g\n", what, a, b);
    std::exit(1);
}

template <class T>
void agree(const Numbers<T>& a, const Numbers<T>& b, double tolerance, const char* what) {
    for (std::size_t i = 0; i < a.size(); ++i) {
        const double x = to_float(a[i]), y = to_float(b[i]);
        require(std::isfinite(x) && std::abs(x - y) <= tolerance * (1 + std::abs(x)), what, x, y);
    }
}

template <class T>
struct Answers {
    using S = wide_t<T>;
    Numbers<S> color, depth, opacity, weights, distortion, t_start, t_end, background;
    Numbers<T> sigma, rgb;
    Numbers<int64_t> used;
    static constexpr double nan = std::numeric_limits<double>::quiet_NaN();

    Answers(int64_t rays, int64_t n, int c)
        : color(rays * c, S(nan)), depth(rays, S(nan)), opacity(rays, S(nan)), weights(n, S(nan)),
          distortion(rays, S(nan)), t_start(n, S(nan)), t_end(n, S(nan)), background(rays * c, S(nan)), sigma(n), rgb(n * c), used(rays, -1) {
        for (T& x : sigma) store(S(nan), x);
        for (T& x : rgb) store(S(nan), x);
    }
    CompositeOutputs<S> outputs(bool all) {
        return {color.data(), depth.data(), opacity.data(), all ? weights.data() : nullptr,
                all ? distortion.data() : nullptr, used.data()};
    }
};

template <class T>
void check_composite(const Numbers<int64_t>& offsets, int64_t n, int channels, double stop, bool all,
                     double tolerance, double density = 0.5, int64_t per_ray = 0) {
    using S = wide_t<T>;
    const int64_t rays = per_ray ? n / per_ray : int64_t(offsets.size()) - 1;
    auto sigma = random_numbers<T>(n, 0, density), rgb = random_numbers<T>(n * channels, -1, 1);
    Numbers<S> t0(n), t1(n);
    for (int64_t i = 0; i < n; ++i) t0[i] = S(i) / 4, t1[i] = t0[i] + S(uniform() < 0.1 ? 0 : uniform() / 4);
    auto background = random_numbers<S>(rays * channels, 0, 1);
    const Composite<T> p{sigma.data(), rgb.data(), t0.data(), t1.data(), per_ray ? nullptr : offsets.data(), background.data(), rays, n, per_ray,
                         channels, false, S(stop)};
    Answers<T> cpu(rays, n, channels), cuda(rays, n, channels);
    auto g_color = random_numbers<S>(rays * channels, -1, 1), g_depth = random_numbers<S>(rays, -0.1, 0.1),
         g_opacity = random_numbers<S>(rays, -1, 1), g_weights = random_numbers<S>(n, -1, 1),
         g_spread = random_numbers<S>(rays, -0.1, 0.1);
    const auto gradients = [&](Answers<T>& a) {
        return CompositeGradients<T>{g_color.data(), all ? g_depth.data() : nullptr, all ? g_opacity.data() : nullptr,
                                     all ? g_weights.data() : nullptr, all ? g_spread.data() : nullptr, a.used.data(),
                                     a.sigma.data(), a.rgb.data(), all ? a.t_start.data() : nullptr,
                                     all ? a.t_end.data() : nullptr, all ? a.background.data() : nullptr};
    };
    composite_forward(p, cpu.outputs(all), 2);
    composite_backward(p, gradients(cpu), 2);
#ifdef EMULATED_CUDA
    composite_forward_cuda(p, cuda.outputs(all), nullptr);
    composite_backward_cuda(p, gradients(cuda), nullptr);
    for (int64_t r = 0; r < rays; ++r) require(cpu.used[r] == cuda.used[r], "used", cpu.used[r], cuda.used[r]);
    agree(cpu.color, cuda.color, tolerance, "color");
    agree(cpu.depth, cuda.depth, tolerance, "depth");
    agree(cpu.opacity, cuda.opacity, tolerance, "opacity");
    agree(cpu.sigma, cuda.sigma, 10 * tolerance, "gradient of sigma");
    agree(cpu.rgb, cuda.rgb, tolerance, "gradient of rgb");
    if (!all) return;
    agree(cpu.weights, cuda.weights, tolerance, "weights");
    agree(cpu.distortion, cuda.distortion, tolerance, "distortion");
    agree(cpu.t_start, cuda.t_start, 10 * tolerance, "gradient of t_start");
    agree(cpu.t_end, cuda.t_end, 10 * tolerance, "gradient of t_end");
    agree(cpu.background, cuda.background, tolerance, "gradient of background");
#else
    agree(cpu.color, cpu.color, tolerance, "color");
    agree(cpu.sigma, cpu.sigma, tolerance, "gradient of sigma");
    agree(cpu.rgb, cpu.rgb, tolerance, "gradient of rgb");
#endif
}

// Rays of few samples share a warp on CUDA: each width, with rays that are empty, end early, or are longer than a warp.
void check_short_rays() {
    constexpr int rays = 61;
    for (int bits = 2; bits <= 5; ++bits)
        for (const double stop : {0.0, 0.1})
            for (const int64_t longest : {0, 70}) {
                const double density = 80 >> bits;
                const int channels = longest ? 32 : 3;
                const bool all = longest || stop == 0;
                Numbers<int64_t> offsets{0};
                for (int r = 0; r < rays; ++r) {
                    int64_t count = int64_t(uniform() * (1 << bits));
                    if (r % 5 == 1) count = 0;
                    if (r % 5 == 2) count = std::min(2 << bits, 32) - r % 2;
                    if (r == 13) count = longest;
                    offsets.push_back(offsets.back() + count);
                }
                const int64_t n = (rays << bits) - 1, per_ray = (1 << bits) - 1;  // a tail belongs to no ray
                require(offsets[rays] < n && lane_bits(n, rays) == bits, "width of packed rays", offsets[rays], n);
                require(lane_bits(45 * per_ray, 45) == bits, "width of dense rays", bits);
                check_composite<double>(offsets, n, channels, stop, all, 1e-11, density);
                check_composite<float>(offsets, n, channels, stop, all, 3e-5, density);
                check_composite<fp16>({}, 45 * per_ray, channels, stop, all, 4e-3, density, per_ray);
            }
#ifdef EMULATED_CUDA
    // 8, 4 and 2 rays a warp: so many times fewer shuffles than one ray a warp, and fewer still in each scan.
    const auto shuffles = [](int64_t per_ray) {
        const long before = warp.all_meetings;
        check_composite<float>({}, 64 * per_ray, 3, 0, true, 3e-5, 1, per_ray);
        return double(warp.all_meetings - before);
    };
    const double one = shuffles(32);
    for (const int per_ray : {4, 8, 16}) {
        const double shared = shuffles(per_ray);
        require(shared < one / (32 / per_ray), "shuffles of short rays", shared, one);
    }
#endif
}

template <class S>
void check_march(int levels, int resolution, bool hostile, double cone, int64_t seed) {
    const int64_t rays = 150, cells = int64_t(resolution) * resolution * resolution, side = resolution / 8;
    auto origins = random_numbers<S>(rays * 3, -3, 3), directions = random_numbers<S>(rays * 3, -1, 1);
    auto near = random_numbers<S>(rays, 0, 1), far = random_numbers<S>(rays, 1, 9);
    if (hostile) {
        const S odd[] = {S(NAN), S(INFINITY), -S(INFINITY), S(0), S(1e30), S(-1e30), S(1e-30)};
        for (int64_t i = 0; i < rays; ++i) {
            if (i % 2) origins[3 * i + i % 3] = odd[i % 7];
            if (i % 3) directions[3 * i + i % 2] = odd[(i / 2) % 7];
            if (i % 5 == 0) near[i] = odd[i / 5 % 7];
            if (i % 7 == 0) far[i] = odd[i / 7 % 7];
        }
    }
    Numbers<std::uint8_t> occupancy(levels * cells / 8), blocks(levels * side * side * side);
    for (auto& byte : occupancy) byte = uniform() < 0.1 ? std::uint8_t(256 * uniform()) : 0;
    for (int64_t i = 0; i < int64_t(occupancy.size()); ++i) {
        const int64_t z = i % side, y = i / side % resolution, x = i / side / resolution % resolution,
                      l = i / side / resolution / resolution;
        blocks[((l * side + x / 8) * side + y / 8) * side + z] |= occupancy[i];
    }
    const March<S> p{{origins.data(), directions.data(), rays}, near.data(), far.data(), occupancy.data(),
                     resolution >= 32 ? blocks.data() : nullptr, levels, resolution, {0, 0, 0}, {1, 1, 2}, S(0.05),
                     S(0.4), S(cone), seed ? &seed : nullptr};
    Numbers<int64_t> counts(rays, -1), offsets(rays + 1, 0);
    march_count(p, counts.data(), 2);
    for (int64_t i = 0; i < rays; ++i) offsets[i + 1] = offsets[i] + counts[i];
    for (const int64_t size : {offsets[rays], offsets[rays] / 2, offsets[rays] + 9}) {
        Numbers<S> t0(size, S(NAN)), t1(size, S(NAN));
        Numbers<int64_t> ray(size, -1);
        march_write(p, {offsets.data(), size, t0.data(), t1.data(), ray.data()}, 2);
        for (int64_t i = 0; i < size; ++i) {
            const bool real = i < offsets[rays];
            const bool own = real && i >= offsets[ray[i]] && i < offsets[ray[i] + 1];
            require(real ? own && t1[i] > t0[i] : t1[i] == 0, "sample", i, ray[i]);
        }
#ifdef EMULATED_CUDA
        Numbers<int64_t> counts_too(rays, -1), ray_too(size, -1);
        Numbers<S> t0_too(size, S(NAN)), t1_too(size, S(NAN));
        march_count_cuda(p, counts_too.data(), nullptr);
        march_write_cuda(p, {offsets.data(), size, t0_too.data(), t1_too.data(), ray_too.data()}, nullptr);
        const bool same = counts == counts_too && ray == ray_too && t0 == t0_too && t1 == t1_too;
        require(same, "march is not the same to the bit");
#endif
    }
    const Box<S> box{{S(-1), S(-1), S(-1)}, {S(1), S(2), S(1)}};
    const auto run = [&](bool on_cuda) {
        Numbers<S> out(rays * 8, S(-1));
        S *n = out.data(), *f = n + rays, *d_o = f + rays, *d_d = d_o + 3 * rays;
#ifdef EMULATED_CUDA
        if (on_cuda) {
            intersect_cuda(p.rays, box, n, f, nullptr);
            intersect_backward_cuda(p.rays, box, near.data(), near.data(), d_o, d_d, nullptr);
            return out;
        }
#endif
        (void)on_cuda;
        intersect(p.rays, box, n, f, 2);
        intersect_backward(p.rays, box, near.data(), near.data(), d_o, d_d, 2);
        return out;
    };
    const auto found = run(false), again = run(true);
    for (std::size_t i = 0; i < found.size(); ++i)
        require(found[i] == again[i] || std::isnan(found[i] + again[i]), "intersect", found[i], again[i]);
}

template <class S>
void check_resample(const Numbers<int64_t>& offsets, int64_t n, int64_t count, int64_t seed) {
    const int64_t rays = int64_t(offsets.size()) - 1;
    auto t0 = random_numbers<S>(n, 0, 1), weights = random_numbers<S>(n, -0.5, 1);
    Numbers<S> t1(n);
    for (int64_t i = 0; i < n; ++i) t0[i] += S(i), t1[i] = t0[i] + S(0.1);
    const Resample<S> p{t0.data(), t1.data(), weights.data(), offsets.data(), rays, n, 0, count, seed ? &seed : nullptr};
    Numbers<S> edges(rays * (count + 1), S(NAN)), again(edges);
    resample(p, edges.data(), 2);
#ifdef EMULATED_CUDA
    resample_cuda(p, again.data(), nullptr);
    agree(edges, again, 0, "resample");
#else
    agree(edges, edges, 0, "resample");
#endif
}

template <class S>
void check_gaussians(int64_t n, int channels, int width, int height, bool hostile, double tolerance) {
    auto means = random_numbers<S>(n * 3, -2, 2), quaternions = random_numbers<S>(n * 4, -1, 1),
         scales = random_numbers<S>(n * 3, 0.02, 0.4), colors = random_numbers<S>(n * channels, 0, 1),
         opacities = random_numbers<S>(n, 0, 1.1);
    if (hostile) {
        const S odd[] = {S(NAN), S(INFINITY), -S(INFINITY), S(0), S(1e30), S(-1e30), S(1e-30)};
        for (int64_t i = 0; i < n; ++i) {
            if (i % 2) means[3 * i + i % 3] = odd[i % 7];
            if (i % 3 == 0) quaternions[4 * i + i % 4] = odd[i / 2 % 7];
            if (i % 5 == 0) scales[3 * i + i % 3] = odd[i / 3 % 7];
            if (i % 7 == 0) opacities[i] = odd[i / 7 % 7];
            if (i % 11 == 0) colors[i * channels] = odd[i / 5 % 7];
        }
    }
    const Numbers<S> view{1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 0, 0, 0, 1},
        lens{S(width), 0, S(width) / 2, 0, S(width), S(height) / 2, 0, 0, 1};
    const Projection<S> p{means.data(), quaternions.data(), scales.data(), view.data(), lens.data(), n,
                          width,        height,             S(0.01),       S(INFINITY), S(0.3)};
    const auto projected = [&](bool cuda) {
        Numbers<S> out(n * 7, S(NAN));
        Numbers<std::int32_t> radii(2 * n, -1);
        const ProjectionOutputs<S> to{out.data(), out.data() + 2 * n, out.data() + 5 * n, out.data() + 6 * n, radii.data()};
#ifdef EMULATED_CUDA
        if (cuda) project_gaussians_cuda(p, to, nullptr);
        else
#endif
            project_gaussians(p, to, cuda ? 1 : 2);
        return std::make_pair(out, radii);
    };
    const auto [flat, radii] = projected(false);
    const auto [flat_too, radii_too] = projected(true);
    agree(flat, flat_too, tolerance, "projection");
    require(radii == radii_too, "radii");
    const Numbers<S> means2d(flat.begin(), flat.begin() + 2 * n), conics(flat.begin() + 2 * n, flat.begin() + 5 * n),
        depths(flat.begin() + 5 * n, flat.begin() + 6 * n);
    const int64_t tiles = int64_t(tile_columns(width)) * tile_columns(height), pixels = int64_t(width) * height;
    Numbers<int64_t> offsets(tiles + 1, -1);
    Numbers<std::int32_t> order(n, -7);
    Splats<S> q{means2d.data(), conics.data(), depths.data(), colors.data(), opacities.data(), n, channels,
                width,          height,        offsets.data(), nullptr};
    count_tiles(q, radii.data(), order.data(), offsets.data());
    Numbers<std::int32_t> ids(offsets[tiles], -1);
    fill_tiles(q, radii.data(), order.data(), ids.data());
    q.ids = ids.data();
    for (const auto id : ids) require(id >= 0 && id < n, "id", id, n);
    const auto on_color = random_numbers<S>(pixels * channels, -1, 1), on_depth = random_numbers<S>(pixels, -0.1, 0.1),
               on_opacity = random_numbers<S>(pixels, -1, 1), on_factor = random_numbers<S>(n, -1, 1);
    const auto drawn = [&](bool cuda) {
        Numbers<S> image(pixels * (channels + 3), S(NAN)), found(n * (7 + channels), S(0)), on_scene(n * 10, S(NAN)),
            on_camera((n + kProjectionBlock - 1) / kProjectionBlock * kCameraGradients, S(NAN));
        Numbers<std::int32_t> used(pixels, -1);
        S *color = image.data(), *depth = color + pixels * channels, *opacity = depth + pixels, *end = opacity + pixels;
        S* f = found.data();
        const SplatOutputs<S> out{color, depth, opacity, end, used.data()};
        const SplatGradients<S> d{on_color.data(), on_depth.data(), on_opacity.data(), end,       used.data(),
                                  f,               f + 2 * n,       f + 5 * n,         f + 7 * n, f + 6 * n};
        S* g = on_scene.data();
        const ProjectionGradients<S> e{radii.data(), f, f + 2 * n, f + 5 * n, on_factor.data(),
                                       g,            g + 3 * n, g + 7 * n, on_camera.data()};
#ifdef EMULATED_CUDA
        if (cuda) {
            rasterize_gaussians_cuda(q, out, nullptr);
            rasterize_gaussians_backward_cuda(q, d, nullptr);
            project_gaussians_backward_cuda(p, e, nullptr);
        } else
#endif
        {
            rasterize_gaussians(q, out, cuda ? 1 : 2);
            rasterize_gaussians_backward(q, d, cuda ? 1 : 2);
            project_gaussians_backward(p, e, cuda ? 1 : 2);
        }
        Numbers<S> camera(kCameraGradients, S(0));
        for (std::size_t i = 0; i < on_camera.size(); ++i) camera[i % kCameraGradients] += on_camera[i];
        return std::array<Numbers<S>, 4>{image, found, on_scene, camera};
    };
    const auto cpu = drawn(false), again = drawn(true);
    const char* names[] = {"image", "gradients of splats", "gradients of Gaussians", "gradients of the camera"};
    for (int i = 0; i < 4; ++i)
        if (!(hostile && i > 0)) agree(cpu[i], again[i], i < 2 ? tolerance : 1000 * tolerance, names[i]);
}

void check_halves() {
    for (int bits = 0; bits < 65536; ++bits) {
        fp16 out, in{std::uint16_t(bits)};
        const float x = to_float(in);
        store(x, out);
        require(std::isnan(x) ? (out.bits & 0x7FFF) > 0x7C00 : out.bits == bits, "fp16 there and back", bits, out.bits);
    }
    const float values[] = {65519.9f, 65520.0f, 2049.0f, 2051.0f, 0x1p-25f, 0x1.8p-24f, 0x1.8p-25f, 1e-9f};
    const float rounded[] = {65504.0f, INFINITY, 2048.0f, 2052.0f, 0.0f, 0x1p-23f, 0x1p-24f, 0.0f};
    for (int i = 0; i < 8; ++i) {
        fp16 out;
        store(values[i], out);
        require(to_float(out) == rounded[i], "rounding to fp16", values[i], to_float(out));
    }
}

int main() {
    check_halves();
    const Numbers<int64_t> ragged{0, 10, 14, 14, 20, 53, 53, 1200, 3300, 3301};
    for (const int channels : {1, 2, 3, 4, 7, 32})
        for (const double stop : {0.0, 0.3})
            for (const bool all : {false, true}) {
                check_composite<double>(ragged, 3305, channels, stop, all, 1e-11);
                check_composite<float>(ragged, 3305, channels, stop, all, 3e-5);
                check_composite<bf16>(ragged, 3305, channels, stop, all, 2e-2);
                check_composite<fp16>(ragged, 3305, channels, stop, all, 4e-3);
            }
    check_short_rays();
    check_composite<float>({0, 0, 0}, 0, 3, 0, true, 1e-5);
    check_composite<float>({0}, 4, 3, 0, true, 1e-5);
    check_composite<float>({-7, 3, 2, 1000000, 5, -2}, 20, 3, 0, true, 1e-4);
    check_gaussians<double>(40, 3, 20, 18, false, 1e-11);
    check_gaussians<double>(30, 32, 17, 9, false, 1e-11);
    check_gaussians<float>(60, 3, 18, 16, true, 1e-4);
    check_gaussians<double>(0, 3, 16, 33, false, 0);
    for (const bool hostile : {false, true})
        for (const double cone : {0.0, 0.1})
            for (const int64_t seed : {0, 77}) {
                check_march<float>(1, 8, hostile, cone, seed);
                check_march<float>(3, 32, hostile, cone, seed);
                check_march<double>(2, 16, hostile, cone, seed);
            }
    for (const int64_t seed : {0, 5}) {
        check_resample<float>(ragged, 3305, 1, seed);
        check_resample<double>(ragged, 3305, 65, seed);
        check_resample<float>({-7, 3, 2, 1000000, 5, -2}, 20, 8, seed);
    }
    std::puts("passed");
}
