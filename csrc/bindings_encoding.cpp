// The encodings in factorkit._C: addresses and numbers in, see csrc/hash_grid.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "hash_grid.h"

namespace py = pybind11;

namespace {

using Addresses = std::array<std::uintptr_t, 3>;  // x, table, weights; gradients: grad, d_x, d_table
using Sizes = std::array<std::int64_t, 4>;        // points, rows, dims, features
using Resolutions = std::vector<std::int32_t>;

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

template <class T>
factorkit::HashGrid<T> hash_grid(const Addresses& in, const Sizes& sizes, const Resolutions& resolutions, bool quintic) {
    if (resolutions.size() > factorkit::kMaxHashLevels) throw std::invalid_argument("too many levels");
    factorkit::HashGrid<T> grid{at<T>(in[0]),   at<T>(in[1]),    at<T>(in[2]),            sizes[0],
                                sizes[1],       int(sizes[2]),   int(resolutions.size()), int(sizes[3]),
                                quintic,        {}};
    std::copy(resolutions.begin(), resolutions.end(), grid.resolutions);
    return grid;
}

template <class T>
void forward(const Addresses& in, const Sizes& sizes, const Resolutions& resolutions, bool quintic, std::uintptr_t out,
             int threads) {
    const auto grid = hash_grid<T>(in, sizes, resolutions, quintic);
    py::gil_scoped_release released;
    factorkit::hash_grid_forward(grid, at<T>(out), threads);
}

template <class T>
void backward(const Addresses& in, const Sizes& sizes, const Resolutions& resolutions, bool quintic, const Addresses& d,
              int threads) {
    const auto grid = hash_grid<T>(in, sizes, resolutions, quintic);
    py::gil_scoped_release released;
    factorkit::hash_grid_backward(grid, at<const T>(d[0]), at<T>(d[1]), at<T>(d[2]), threads);
}

#ifdef FACTORKIT_CUDA_TARGETS
template <class T>
void forward_cuda(const Addresses& in, const Sizes& sizes, const Resolutions& resolutions, bool quintic,
                  std::uintptr_t out, std::uintptr_t stream) {
    const auto grid = hash_grid<T>(in, sizes, resolutions, quintic);
    py::gil_scoped_release released;
    factorkit::hash_grid_forward_cuda(grid, at<T>(out), at<void>(stream));
}

template <class T>
void backward_cuda(const Addresses& in, const Sizes& sizes, const Resolutions& resolutions, bool quintic,
                   const Addresses& d, std::uintptr_t stream) {
    const auto grid = hash_grid<T>(in, sizes, resolutions, quintic);
    py::gil_scoped_release released;
    factorkit::hash_grid_backward_cuda(grid, at<const T>(d[0]), at<T>(d[1]), at<T>(d[2]), at<void>(stream));
}
#endif

}  // namespace

void bind_encoding(py::module_& m) {
    const char* doc = "Multiresolution hash encoding; called by factorkit.ops, see csrc/hash_grid.h.";
    m.def("hash_grid_forward_f32", &forward<float>, doc);
    m.def("hash_grid_forward_f64", &forward<double>, doc);
    m.def("hash_grid_backward_f32", &backward<float>, doc);
    m.def("hash_grid_backward_f64", &backward<double>, doc);
#ifdef FACTORKIT_CUDA_TARGETS
    m.def("hash_grid_forward_f32_cuda", &forward_cuda<float>, doc);
    m.def("hash_grid_forward_f64_cuda", &forward_cuda<double>, doc);
    m.def("hash_grid_backward_f32_cuda", &backward_cuda<float>, doc);
    m.def("hash_grid_backward_f64_cuda", &backward_cuda<double>, doc);
#endif
}
