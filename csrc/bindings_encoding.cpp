// The encodings in factorkit._C: addresses and numbers in, see csrc/hash_grid.h.
//
// Addresses travel as integers (tensor.data_ptr()), 0 for what is absent. `place` is the number of threads on the CPU and
// the stream on CUDA, whose functions end in _cuda.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "hash_grid.h"

namespace py = pybind11;

namespace {

using Addresses = std::array<std::uintptr_t, 3>;  // x, table, weights; of gradients: grad, d_x, d_table
using Sizes = std::array<std::int64_t, 4>;        // points, rows, dims, features
using Resolutions = std::vector<std::int32_t>;

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Calls run(T{}) with the type that torch names so.
template <class Run>
void for_type(const std::string& dtype, const Run& run) {
    if (dtype == "float32") return run(float{});
    if (dtype == "float64") return run(double{});
    throw std::invalid_argument("no kernel for " + dtype);
}

template <class T>
factorkit::HashGrid<T> hash_grid(const Addresses& in, const Sizes& sizes, const Resolutions& resolutions, bool quintic) {
    if (resolutions.size() > factorkit::kMaxHashLevels) throw std::invalid_argument("too many levels");
    factorkit::HashGrid<T> grid{};
    grid.x = at<T>(in[0]);
    grid.table = at<T>(in[1]);
    grid.weights = at<T>(in[2]);
    grid.points = sizes[0];
    grid.rows = sizes[1];
    grid.dims = int(sizes[2]);
    grid.levels = int(resolutions.size());
    grid.features = int(sizes[3]);
    grid.quintic = quintic;
    std::copy(resolutions.begin(), resolutions.end(), grid.resolutions);
    return grid;
}

template <bool Cuda>
void forward(const std::string& dtype, const Addresses& in, const Sizes& sizes, const Resolutions& resolutions,
             bool quintic, std::uintptr_t out, std::uintptr_t place) {
    py::gil_scoped_release released;
    for_type(dtype, [&](auto type) {
        using T = decltype(type);
        const auto grid = hash_grid<T>(in, sizes, resolutions, quintic);
        if constexpr (Cuda)
            factorkit::hash_grid_forward_cuda(grid, at<T>(out), at<void>(place));
        else
            factorkit::hash_grid_forward(grid, at<T>(out), int(place));
    });
}

template <bool Cuda>
void backward(const std::string& dtype, const Addresses& in, const Sizes& sizes, const Resolutions& resolutions,
              bool quintic, const Addresses& d, std::uintptr_t place) {
    py::gil_scoped_release released;
    for_type(dtype, [&](auto type) {
        using T = decltype(type);
        const auto grid = hash_grid<T>(in, sizes, resolutions, quintic);
        if constexpr (Cuda)
            factorkit::hash_grid_backward_cuda(grid, at<const T>(d[0]), at<T>(d[1]), at<T>(d[2]), at<void>(place));
        else
            factorkit::hash_grid_backward(grid, at<const T>(d[0]), at<T>(d[1]), at<T>(d[2]), int(place));
    });
}

}  // namespace

void bind_encoding(py::module_& m) {
    const char* doc = "Multiresolution hash encoding; called by factorkit.ops, see csrc/hash_grid.h.";
    m.def("hash_grid_forward", &forward<false>, doc);
    m.def("hash_grid_backward", &backward<false>, doc);
#ifdef FACTORKIT_CUDA_TARGETS
    m.def("hash_grid_forward_cuda", &forward<true>, doc);
    m.def("hash_grid_backward_cuda", &backward<true>, doc);
#endif
}
