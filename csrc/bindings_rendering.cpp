// Rendering in factorkit._C: addresses and numbers in, see csrc/intersect.h, march.h, resample.h, composite.h and
// gaussians.h.
//
// Addresses travel as integers (tensor.data_ptr()), 0 for what is absent. `place` is the number of threads on the CPU
// and the stream on CUDA, whose functions end in _cuda.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "composite.h"
#include "gaussians.h"
#include "march.h"
#include "resample.h"

namespace py = pybind11;

namespace {

template <std::size_t N>
using Addresses = std::array<std::uintptr_t, N>;
template <std::size_t N>
using Sizes = std::array<std::int64_t, N>;
using Vector = std::array<double, 3>;

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Calls run(T{}) with the type that torch names so.
template <class Run>
void for_type(const std::string& dtype, bool halves, const Run& run) {
    if (dtype == "float32") return run(float{});
    if (dtype == "float64") return run(double{});
    if (halves && dtype == "bfloat16") return run(factorkit::bf16{});
    if (halves && dtype == "float16") return run(factorkit::fp16{});
    throw std::invalid_argument("no kernel for " + dtype);
}

template <class S>
factorkit::Box<S> box(const Vector& lower, const Vector& upper) {
    return {{S(lower[0]), S(lower[1]), S(lower[2])}, {S(upper[0]), S(upper[1]), S(upper[2])}};
}

template <bool Cuda>  // (origins, directions, near, far)
void intersect(const std::string& dtype, const Addresses<4>& a, std::int64_t count, const Vector& lower,
               const Vector& upper, std::uintptr_t place) {
    py::gil_scoped_release released;
    for_type(dtype, false, [&](auto type) {
        using S = factorkit::wide_t<decltype(type)>;
        const factorkit::Rays<S> rays{at<S>(a[0]), at<S>(a[1]), count};
        const auto corners = box<S>(lower, upper);
        if constexpr (Cuda)
            factorkit::intersect_cuda(rays, corners, at<S>(a[2]), at<S>(a[3]), at<void>(place));
        else
            factorkit::intersect(rays, corners, at<S>(a[2]), at<S>(a[3]), int(place));
    });
}

template <bool Cuda>  // (origins, directions, d_near, d_far, d_origins, d_directions)
void intersect_backward(const std::string& dtype, const Addresses<6>& a, std::int64_t count,
                        const Vector& lower, const Vector& upper, std::uintptr_t place) {
    py::gil_scoped_release released;
    for_type(dtype, false, [&](auto type) {
        using S = factorkit::wide_t<decltype(type)>;
        const factorkit::Rays<S> rays{at<S>(a[0]), at<S>(a[1]), count};
        const auto corners = box<S>(lower, upper);
        const S *d_near = at<S>(a[2]), *d_far = at<S>(a[3]);
        S *d_origins = at<S>(a[4]), *d_directions = at<S>(a[5]);
        if constexpr (Cuda)
            factorkit::intersect_backward_cuda(rays, corners, d_near, d_far, d_origins, d_directions, at<void>(place));
        else
            factorkit::intersect_backward(rays, corners, d_near, d_far, d_origins, d_directions, int(place));
    });
}

// (origins, directions, near, far, occupancy, blocks, seed), (rays, levels, resolution), the box's centre and half its
// size, (step_min, step_max, cone)
template <class S>
factorkit::March<S> march(const Addresses<7>& a, const Sizes<3>& sizes, const Vector& centre, const Vector& half,
                          const Vector& steps) {
    return {{at<S>(a[0]), at<S>(a[1]), sizes[0]},
            at<S>(a[2]),
            at<S>(a[3]),
            at<std::uint8_t>(a[4]),
            at<std::uint8_t>(a[5]),
            int(sizes[1]),
            int(sizes[2]),
            {S(centre[0]), S(centre[1]), S(centre[2])},
            {S(half[0]), S(half[1]), S(half[2])},
            S(steps[0]),
            S(steps[1]),
            S(steps[2]),
            at<std::int64_t>(a[6])};
}

template <bool Cuda>
void march_count(const std::string& dtype, const Addresses<7>& a, const Sizes<3>& sizes, const Vector& centre,
                 const Vector& half, const Vector& steps, std::uintptr_t counts, std::uintptr_t place) {
    py::gil_scoped_release released;
    for_type(dtype, false, [&](auto type) {
        using S = factorkit::wide_t<decltype(type)>;
        const auto problem = march<S>(a, sizes, centre, half, steps);
        if constexpr (Cuda)
            factorkit::march_count_cuda(problem, at<std::int64_t>(counts), at<void>(place));
        else
            factorkit::march_count(problem, at<std::int64_t>(counts), int(place));
    });
}

template <bool Cuda>  // and (offsets, t_start, t_end, ray), size
void march_write(const std::string& dtype, const Addresses<7>& a, const Sizes<3>& sizes, const Vector& centre,
                 const Vector& half, const Vector& steps, const Addresses<4>& to, std::int64_t size,
                 std::uintptr_t place) {
    py::gil_scoped_release released;
    for_type(dtype, false, [&](auto type) {
        using S = factorkit::wide_t<decltype(type)>;
        const auto problem = march<S>(a, sizes, centre, half, steps);
        const factorkit::MarchOutputs<S> out{at<std::int64_t>(to[0]), size, at<S>(to[1]), at<S>(to[2]),
                                             at<std::int64_t>(to[3])};
        if constexpr (Cuda)
            factorkit::march_write_cuda(problem, out, at<void>(place));
        else
            factorkit::march_write(problem, out, int(place));
    });
}

template <bool Cuda>  // (t_start, t_end, weights, offsets, seed, edges), (rays, samples, per_ray, count)
void resample(const std::string& dtype, const Addresses<6>& a, const Sizes<4>& sizes, std::uintptr_t place) {
    py::gil_scoped_release released;
    for_type(dtype, false, [&](auto type) {
        using S = factorkit::wide_t<decltype(type)>;
        const factorkit::Resample<S> problem{at<S>(a[0]), at<S>(a[1]), at<S>(a[2]), at<std::int64_t>(a[3]),
                                             sizes[0],    sizes[1],    sizes[2],    sizes[3],
                                             at<std::int64_t>(a[4])};
        if constexpr (Cuda)
            factorkit::resample_cuda(problem, at<S>(a[5]), at<void>(place));
        else
            factorkit::resample(problem, at<S>(a[5]), int(place));
    });
}

// (sigma, rgb, t_start, t_end, offsets, background), (rays, samples, per_ray, channels)
template <class T>
factorkit::Composite<T> composite(const Addresses<6>& a, const Sizes<4>& sizes, bool background_shared,
                                  double early_stop) {
    using S = factorkit::wide_t<T>;
    if (sizes[3] < 1 || sizes[3] > factorkit::kMaxChannels) throw std::invalid_argument("composite: 1 to 32 channels");
    return {at<T>(a[0]), at<T>(a[1]), at<S>(a[2]), at<S>(a[3]), at<std::int64_t>(a[4]), at<S>(a[5]),
            sizes[0],    sizes[1],    sizes[2],    int(sizes[3]), background_shared,      S(early_stop)};
}

template <bool Cuda>  // and (color, depth, opacity, weights, distortion, used)
void composite_forward(const std::string& dtype, const Addresses<6>& a, const Sizes<4>& sizes, bool background_shared,
                       double early_stop, const Addresses<6>& to, std::uintptr_t place) {
    py::gil_scoped_release released;
    for_type(dtype, true, [&](auto type) {
        using T = decltype(type);
        using S = factorkit::wide_t<T>;
        const auto problem = composite<T>(a, sizes, background_shared, early_stop);
        const factorkit::CompositeOutputs<S> out{at<S>(to[0]), at<S>(to[1]), at<S>(to[2]),
                                                 at<S>(to[3]), at<S>(to[4]), at<std::int64_t>(to[5])};
        if constexpr (Cuda)
            factorkit::composite_forward_cuda(problem, out, at<void>(place));
        else
            factorkit::composite_forward(problem, out, int(place));
    });
}

// and (color, depth, opacity, weights, distortion, used; sigma, rgb, t_start, t_end, background)
template <bool Cuda>
void composite_backward(const std::string& dtype, const Addresses<6>& a, const Sizes<4>& sizes, bool background_shared,
                        const Addresses<11>& d, std::uintptr_t place) {
    py::gil_scoped_release released;
    for_type(dtype, true, [&](auto type) {
        using T = decltype(type);
        using S = factorkit::wide_t<T>;
        const auto problem = composite<T>(a, sizes, background_shared, 0.0);
        const factorkit::CompositeGradients<T> gradients{
            at<S>(d[0]), at<S>(d[1]), at<S>(d[2]), at<S>(d[3]), at<S>(d[4]), at<std::int64_t>(d[5]),
            at<T>(d[6]), at<T>(d[7]), at<S>(d[8]), at<S>(d[9]), at<S>(d[10])};
        if constexpr (Cuda)
            factorkit::composite_backward_cuda(problem, gradients, at<void>(place));
        else
            factorkit::composite_backward(problem, gradients, int(place));
    });
}

// (means, quaternions, scales, viewmatrix, intrinsics), (count, width, height), (near, far, low_pass)
template <class S>
factorkit::Projection<S> projection(const Addresses<5>& a, const Sizes<3>& sizes, const Vector& numbers) {
    return {at<S>(a[0]), at<S>(a[1]),   at<S>(a[2]),   at<S>(a[3]),   at<S>(a[4]),  sizes[0],
            int(sizes[1]), int(sizes[2]), S(numbers[0]), S(numbers[1]), S(numbers[2])};
}

template <bool Cuda>  // and (means2d, conics, depths, compensations, radii)
void project_gaussians(const std::string& dtype, const Addresses<5>& a, const Sizes<3>& sizes, const Vector& numbers,
                       const Addresses<5>& to, std::uintptr_t place) {
    py::gil_scoped_release released;
    for_type(dtype, false, [&](auto type) {
        using S = factorkit::wide_t<decltype(type)>;
        const auto problem = projection<S>(a, sizes, numbers);
        const factorkit::ProjectionOutputs<S> out{at<S>(to[0]), at<S>(to[1]), at<S>(to[2]), at<S>(to[3]),
                                                  at<std::int32_t>(to[4])};
        if constexpr (Cuda)
            factorkit::project_gaussians_cuda(problem, out, at<void>(place));
        else
            factorkit::project_gaussians(problem, out, int(place));
    });
}

template <bool Cuda>  // and (radii; means2d, conics, depths, compensations; means, quaternions, scales, camera)
void project_gaussians_backward(const std::string& dtype, const Addresses<5>& a, const Sizes<3>& sizes,
                                const Vector& numbers, const Addresses<9>& d, std::uintptr_t place) {
    py::gil_scoped_release released;
    for_type(dtype, false, [&](auto type) {
        using S = factorkit::wide_t<decltype(type)>;
        const auto problem = projection<S>(a, sizes, numbers);
        const factorkit::ProjectionGradients<S> gradients{at<std::int32_t>(d[0]), at<S>(d[1]), at<S>(d[2]),
                                                          at<S>(d[3]), at<S>(d[4]), at<S>(d[5]), at<S>(d[6]),
                                                          at<S>(d[7]), at<S>(d[8])};
        if constexpr (Cuda)
            factorkit::project_gaussians_backward_cuda(problem, gradients, at<void>(place));
        else
            factorkit::project_gaussians_backward(problem, gradients, int(place));
    });
}

// (means2d, conics, depths, colors, opacities, offsets, ids), (count, channels, width, height)
template <class S>
factorkit::Splats<S> splats(const Addresses<7>& a, const Sizes<4>& sizes) {
    if (sizes[1] < 1 || sizes[1] > factorkit::kMaxChannels) throw std::invalid_argument("gaussians: 1 to 32 channels");
    return {at<S>(a[0]), at<S>(a[1]),   at<S>(a[2]),   at<S>(a[3]),   at<S>(a[4]),
            sizes[0],    int(sizes[1]), int(sizes[2]), int(sizes[3]), at<std::int64_t>(a[5]), at<std::int32_t>(a[6])};
}

template <bool Cuda>  // and (color, depth, opacity, transmittance, used)
void rasterize_gaussians(const std::string& dtype, const Addresses<7>& a, const Sizes<4>& sizes, const Addresses<5>& to,
                         std::uintptr_t place) {
    py::gil_scoped_release released;
    for_type(dtype, false, [&](auto type) {
        using S = factorkit::wide_t<decltype(type)>;
        const auto problem = splats<S>(a, sizes);
        const factorkit::SplatOutputs<S> out{at<S>(to[0]), at<S>(to[1]), at<S>(to[2]), at<S>(to[3]),
                                             at<std::int32_t>(to[4])};
        if constexpr (Cuda)
            factorkit::rasterize_gaussians_cuda(problem, out, at<void>(place));
        else
            factorkit::rasterize_gaussians(problem, out, int(place));
    });
}

// and (color, depth, opacity, transmittance, used; means2d, conics, depths, colors, opacities)
template <bool Cuda>
void rasterize_gaussians_backward(const std::string& dtype, const Addresses<7>& a, const Sizes<4>& sizes,
                                  const Addresses<10>& d, std::uintptr_t place) {
    py::gil_scoped_release released;
    for_type(dtype, false, [&](auto type) {
        using S = factorkit::wide_t<decltype(type)>;
        const auto problem = splats<S>(a, sizes);
        const factorkit::SplatGradients<S> gradients{at<S>(d[0]), at<S>(d[1]), at<S>(d[2]), at<S>(d[3]),
                                                     at<std::int32_t>(d[4]), at<S>(d[5]), at<S>(d[6]), at<S>(d[7]),
                                                     at<S>(d[8]), at<S>(d[9])};
        if constexpr (Cuda)
            factorkit::rasterize_gaussians_backward_cuda(problem, gradients, at<void>(place));
        else
            factorkit::rasterize_gaussians_backward(problem, gradients, int(place));
    });
}

// and (radii, order, offsets) to count, (radii, order, ids) to fill; on the CPU only: torch sorts on CUDA.
template <bool Fill>
void gaussian_tiles(const std::string& dtype, const Addresses<7>& a, const Sizes<4>& sizes, const Addresses<3>& to,
                    std::uintptr_t) {
    py::gil_scoped_release released;
    for_type(dtype, false, [&](auto type) {
        using S = factorkit::wide_t<decltype(type)>;
        const auto* radii = at<std::int32_t>(to[0]);
        auto* order = at<std::int32_t>(to[1]);
        if constexpr (Fill)
            factorkit::fill_tiles(splats<S>(a, sizes), radii, order, at<std::int32_t>(to[2]));
        else
            factorkit::count_tiles(splats<S>(a, sizes), radii, order, at<std::int64_t>(to[2]));
    });
}

template <bool Cuda>
void bind(py::module_& m, const std::string& suffix) {
    const auto def = [&](const char* name, auto function, const char* doc) {
        m.def((name + suffix).c_str(), function, doc);
    };
    def("intersect", &intersect<Cuda>, "Intervals of rays in a box; called by factorkit.ops, see csrc/intersect.h.");
    def("intersect_backward", &intersect_backward<Cuda>, "Gradients of intersect; called by factorkit.ops.");
    def("march_count", &march_count<Cuda>, "Samples of each ray; called by factorkit.ops, see csrc/march.h.");
    def("march_write", &march_write<Cuda>, "The samples; called by factorkit.ops, see csrc/march.h.");
    def("resample", &resample<Cuda>, "Inverse-CDF sampling; called by factorkit.ops, see csrc/resample.h.");
    def("composite_forward", &composite_forward<Cuda>, "Rendering; called by factorkit.ops, see csrc/composite.h.");
    def("composite_backward", &composite_backward<Cuda>, "Gradients of composite_forward; called by factorkit.ops.");
    def("project_gaussians", &project_gaussians<Cuda>, "Called by factorkit.ops, see csrc/gaussians.h.");
    def("project_gaussians_backward", &project_gaussians_backward<Cuda>, "Its gradients; called by factorkit.ops.");
    def("rasterize_gaussians", &rasterize_gaussians<Cuda>, "Called by factorkit.ops, see csrc/gaussians.h.");
    def("rasterize_gaussians_backward", &rasterize_gaussians_backward<Cuda>, "Its gradients; called by factorkit.ops.");
}

}  // namespace

void bind_rendering(py::module_& m) {
    bind<false>(m, "");
    m.def("count_tiles", &gaussian_tiles<false>, "Gaussians of each tile; called by factorkit.ops.");
    m.def("fill_tiles", &gaussian_tiles<true>, "The Gaussians of each tile; called by factorkit.ops.");
#ifdef FACTORKIT_CUDA_TARGETS
    bind<true>(m, "_cuda");
#endif
}
