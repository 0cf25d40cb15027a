// The Python module factorkit._C. It is independent of torch: ops take addresses, sizes, strides and a stream.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <vector>

#include "norm.h"
#include "projection.h"
#include "region.h"
#include "region_pool.h"
#include "skip.h"
#include "system.h"

namespace py = pybind11;

void bind_encoding(py::module_& m);
void bind_rendering(py::module_& m);

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

py::dict build_info() {
    py::dict info;
    info["version"] = FACTORKIT_VERSION;
    info["compiler"] = kCompiler;
    info["simd"] = factorkit::simd_level();
#ifdef FACTORKIT_CUDA_TARGETS
    info["cuda"] = true;
    info["cuda_version"] = factorkit::cuda_version();
    info["cuda_targets"] = py::list(py::str(FACTORKIT_CUDA_TARGETS).attr("split")(","));
#else
    info["cuda"] = false;
    info["cuda_version"] = py::none();
    info["cuda_targets"] = py::list();
#endif
    return info;
}

py::list cuda_devices() {
    py::list devices;
#ifdef FACTORKIT_CUDA_TARGETS
    for (const factorkit::CudaDevice& device : factorkit::cuda_devices()) {
        py::dict entry;
        entry["name"] = device.name;
        entry["capability"] = py::make_tuple(device.major, device.minor);
        entry["memory_bytes"] = device.memory_bytes;
        devices.append(entry);
    }
#endif
    return devices;
}

// Addresses travel as integers (tensor.data_ptr()), 0 for what is absent.
template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// (u, skip, masks, weight, bias, scale, shift), (modulation_stride, batch, regions, channels_u, channels_skip, pixels,
// groups, kind), (u_shared, activate, is_bf16, modulation_is_bf16), eps, mask_floor
using NormAddresses = std::array<std::uintptr_t, 7>;
using NormSizes = std::array<std::int64_t, 8>;
using NormFlags = std::array<bool, 4>;
factorkit::NormProblem norm_problem(const NormAddresses& in, const NormSizes& sizes, const NormFlags& flags, float eps,
                                    float mask_floor) {
    const auto kind = static_cast<factorkit::NormKind>(sizes[7]);
    return {at<void>(in[0]), at<void>(in[1]), at<float>(in[2]), at<float>(in[3]), at<float>(in[4]), at<void>(in[5]),
            at<void>(in[6]), sizes[0],        sizes[1],         sizes[2],         sizes[3],         sizes[4],
            sizes[5],        sizes[6],        kind,             flags[0],         flags[1],         flags[2],
            flags[3],        eps,             mask_floor};
}

// (logits, branches), (batch, regions, channels, pixels), (channels_last, is_bf16)
factorkit::BlendProblem blend_problem(const std::array<std::uintptr_t, 2>& in, const std::array<std::int64_t, 4>& sizes,
                                      const std::array<bool, 2>& flags) {
    return {at<float>(in[0]), at<void>(in[1]), sizes[0], sizes[1], sizes[2], sizes[3], flags[0], flags[1]};
}

// (base, skip, masks, bias, residual), (batch, regions, channels, pixels), (base_shared, is_bf16)
factorkit::SkipProblem skip_problem(const std::array<std::uintptr_t, 5>& in, const std::array<std::int64_t, 4>& sizes,
                                    const std::array<bool, 2>& flags) {
    return {at<void>(in[0]), at<void>(in[1]), at<float>(in[2]), at<float>(in[3]), at<void>(in[4]), sizes[0],
            sizes[1],        sizes[2],        sizes[3],         flags[0],         flags[1]};
}

// (u, skip, masks, weight, bias, residual), (batch, regions, channels_u, channels_skip, channels_out, pixels),
// (u_shared, is_bf16)
factorkit::ProjectionProblem projection_problem(const std::array<std::uintptr_t, 6>& in, const std::array<std::int64_t, 6>& sizes,
                                                const std::array<bool, 2>& flags) {
    return {at<void>(in[0]), at<void>(in[1]), at<float>(in[2]), at<float>(in[3]), at<float>(in[4]), at<void>(in[5]), sizes[0],
            sizes[1],        sizes[2],        sizes[3],         sizes[4],         sizes[5],         flags[0],        flags[1]};
}

// (features, masks), (batch, regions, channels, pixels)
factorkit::PoolProblem pool_problem(const std::array<std::uintptr_t, 2>& in, const std::array<std::int64_t, 4>& sizes,
                                    bool is_bf16, float floor) {
    return {at<void>(in[0]), at<float>(in[1]), sizes[0], sizes[1], sizes[2], sizes[3], is_bf16, floor};
}

// (batch, regions, height, width), and (address, stride_b, stride_k) of each level from the masks on
template <class Run>
void run_pyramid(const Run& run, const std::array<std::int64_t, 4>& sizes, bool is_bf16,
                 const std::vector<std::array<std::int64_t, 3>>& levels, int threads) {
    py::gil_scoped_release released;
    std::vector<factorkit::Planes> planes;
    for (const auto& level : levels) planes.push_back({at<void>(std::uintptr_t(level[0])), level[1], level[2]});
    run({sizes[0], sizes[1], sizes[2], sizes[3], int(levels.size()) - 1, is_bf16}, planes.data(), threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "factorkit's compiled operations (C++, and CUDA where built with it).";
    m.def("build_info", &build_info, R"(What this module was built with, and the SIMD level of this machine.

Returns a dict: version (str, factorkit's), compiler (str), simd ("avx512", "avx2", "sse2", "neon" or "scalar",
found at run time), cuda (bool), cuda_version (str or None), cuda_targets (list of nvcc's names: "sm_90" is
machine code, "compute_90" is PTX, which the driver compiles for any newer GPU).)");
    m.def("cuda_devices", &cuda_devices, R"(The CUDA devices this module sees.

Returns a list of dicts: name (str), capability ((major, minor)), memory_bytes (int). Empty without CUDA in the
build, without a driver and without a device. Raises RuntimeError with the cause if the driver cannot be used.)");

    m.def(
        "norm_silu_forward",
        [](const NormAddresses& in, const NormSizes& sizes, const NormFlags& flags, float eps, float floor,
           std::uintptr_t out, std::uintptr_t moments, int threads) {
            py::gil_scoped_release released;
            const auto problem = norm_problem(in, sizes, flags, eps, floor);
            factorkit::norm_silu_forward(problem, at<void>(out), at<float>(moments), threads);
        },
        "SiLU(norm([u_k ; m_k*skip])*(1+scale)+shift) on the CPU; called by factorkit.ops, see csrc/norm.h.");
    m.def(
        "norm_silu_backward",
        [](const NormAddresses& in, const NormSizes& sizes, const NormFlags& flags, float eps, float floor,
           const std::array<std::uintptr_t, 11>& d, int threads) {
            py::gil_scoped_release released;
            factorkit::NormGradients gradients{at<void>(d[0]), at<float>(d[1]), at<void>(d[2]),  at<void>(d[3]),
                                               at<void>(d[4]), at<void>(d[5]),  at<float>(d[6]), at<float>(d[7]),
                                               at<float>(d[8]), at<void>(d[9]), at<void>(d[10])};
            factorkit::norm_silu_backward(norm_problem(in, sizes, flags, eps, floor), gradients, threads);
        },
        "Gradients of norm_silu_forward on the CPU; called by factorkit.ops, see csrc/norm.h.");

    m.def(
        "region_blend_forward",
        [](const std::array<std::uintptr_t, 2>& in, const std::array<std::int64_t, 4>& sizes,
           const std::array<bool, 2>& flags, std::uintptr_t masks, std::uintptr_t prediction, int threads) {
            py::gil_scoped_release released;
            const auto problem = blend_problem(in, sizes, flags);
            factorkit::region_blend_forward(problem, at<float>(masks), at<float>(prediction), threads);
        },
        "Softmax of the masks and blend of the branches on the CPU; called by factorkit.ops, see csrc/region.h.");
    m.def(
        "region_blend_backward",
        [](const std::array<std::uintptr_t, 2>& in, const std::array<std::int64_t, 4>& sizes,
           const std::array<bool, 2>& flags, const std::array<std::uintptr_t, 5>& d, int threads) {
            py::gil_scoped_release released;
            const factorkit::BlendGradients gradients{at<float>(d[0]), at<float>(d[1]), at<float>(d[2]), at<float>(d[3]),
                                                      at<void>(d[4])};
            factorkit::region_blend_backward(blend_problem(in, sizes, flags), gradients, threads);
        },
        "Gradients of region_blend_forward on the CPU; called by factorkit.ops, see csrc/region.h.");
    using Levels = std::vector<std::array<std::int64_t, 3>>;
    m.def(
        "mask_pyramid_forward",
        [](const std::array<std::int64_t, 4>& sizes, bool is_bf16, const Levels& levels, int threads) {
            run_pyramid(factorkit::mask_pyramid_forward, sizes, is_bf16, levels, threads);
        },
        "Area averages of the masks on the CPU; called by factorkit.ops, see csrc/region.h.");
    m.def(
        "mask_pyramid_backward",
        [](const std::array<std::int64_t, 4>& sizes, bool is_bf16, const Levels& levels, int threads) {
            run_pyramid(factorkit::mask_pyramid_backward, sizes, is_bf16, levels, threads);
        },
        "Gradient of mask_pyramid_forward on the CPU; called by factorkit.ops, see csrc/region.h.");

    m.def(
        "region_pool_forward",
        [](const std::array<std::uintptr_t, 2>& in, const std::array<std::int64_t, 4>& sizes, bool is_bf16, float floor,
           std::uintptr_t tokens, int threads) {
            py::gil_scoped_release released;
            factorkit::region_pool_forward(pool_problem(in, sizes, is_bf16, floor), at<float>(tokens), threads);
        },
        "Averages of the features over the regions on the CPU; called by factorkit.ops, see csrc/region_pool.h.");
    m.def(
        "region_pool_backward",
        [](const std::array<std::uintptr_t, 2>& in, const std::array<std::int64_t, 4>& sizes, bool is_bf16, float floor,
           const std::array<std::uintptr_t, 4>& d, int threads) {
            py::gil_scoped_release released;
            const factorkit::PoolGradients gradients{at<float>(d[0]), at<float>(d[1]), at<void>(d[2]), at<float>(d[3])};
            factorkit::region_pool_backward(pool_problem(in, sizes, is_bf16, floor), gradients, threads);
        },
        "Gradients of region_pool_forward on the CPU; called by factorkit.ops, see csrc/region_pool.h.");
    m.def(
        "masked_skip_add_forward",
        [](const std::array<std::uintptr_t, 5>& in, const std::array<std::int64_t, 4>& sizes,
           const std::array<bool, 2>& flags, std::uintptr_t out, int threads) {
            py::gil_scoped_release released;
            factorkit::masked_skip_add_forward(skip_problem(in, sizes, flags), at<void>(out), threads);
        },
        "base_k + m_k*skip + bias + residual_k on the CPU; called by factorkit.ops, see csrc/skip.h.");
    m.def(
        "masked_skip_add_backward",
        [](const std::array<std::uintptr_t, 5>& in, const std::array<std::int64_t, 4>& sizes,
           const std::array<bool, 2>& flags, const std::array<std::uintptr_t, 4>& d, int threads) {
            py::gil_scoped_release released;
            const factorkit::SkipGradients gradients{at<void>(d[0]), at<void>(d[1]), at<void>(d[2]), at<float>(d[3])};
            factorkit::masked_skip_add_backward(skip_problem(in, sizes, flags), gradients, threads);
        },
        "Gradients of masked_skip_add_forward on the CPU; called by factorkit.ops, see csrc/skip.h.");
    m.def(
        "masked_skip_projection_forward",
        [](const std::array<std::uintptr_t, 6>& in, const std::array<std::int64_t, 6>& sizes,
           const std::array<bool, 2>& flags, std::uintptr_t out, int threads) {
            py::gil_scoped_release released;
            factorkit::projection_forward(projection_problem(in, sizes, flags), at<void>(out), threads);
        },
        "W [u_k ; m_k*skip] + bias + residual_k on the CPU; called by factorkit.ops, see csrc/projection.h.");
    m.def(
        "masked_skip_projection_backward",
        [](const std::array<std::uintptr_t, 6>& in, const std::array<std::int64_t, 6>& sizes,
           const std::array<bool, 2>& flags, const std::array<std::uintptr_t, 6>& d, int threads) {
            py::gil_scoped_release released;
            const factorkit::ProjectionGradients gradients{at<void>(d[0]),  at<void>(d[1]),  at<void>(d[2]),
                                                           at<float>(d[3]), at<float>(d[4]), at<float>(d[5])};
            factorkit::projection_backward(projection_problem(in, sizes, flags), gradients, threads);
        },
        "Gradients of masked_skip_projection_forward on the CPU; called by factorkit.ops, see csrc/projection.h.");

    bind_encoding(m);
    bind_rendering(m);
}
