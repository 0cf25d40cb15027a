// Multiresolution hash encoding (Müller et al. 2022): each level is a lattice of learned feature vectors over [0, 1]^dims;
// a point's features are interpolated from the 2^dims vertices of its cell. A level whose (resolution + 1)^dims vertices
// fit into the table's rows is stored densely, a finer one through a hash of the vertex.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace factorkit {

constexpr int kMaxHashDims = 4;
constexpr int kMaxHashLevels = 32;

// T is float or double.
template <class T>
struct HashGrid {
    const T* x;        // [points, dims]
    const T* table;    // [levels, rows, features]
    const T* weights;  // [levels], multiplied onto each level's features
    std::int64_t points, rows;  // rows: a power of two, rows * features < 2^31
    int dims, levels, features;
    bool quintic;               // else linear
    std::int32_t resolutions[kMaxHashLevels];  // cells along each axis
};

// What finding a vertex's row takes: the products of its coordinates and `multipliers` are added up or xor-ed.
struct HashLevel {
    std::uint32_t multipliers[kMaxHashDims];
    std::uint32_t mask;
    std::int32_t resolution;
    bool dense;
};

template <class T>
FACTORKIT_HOST_DEVICE HashLevel hash_level(const HashGrid<T>& grid, int level, int dims) {
    // The first is 1, so that neighbours along x lie close in memory; the others are the paper's primes.
    constexpr std::uint32_t primes[kMaxHashDims] = {1u, 2654435761u, 805459861u, 3674653429u};
    HashLevel out{};
    out.resolution = grid.resolutions[level];
    out.mask = std::uint32_t(grid.rows - 1);
    std::int64_t vertices = 1;
    for (int d = 0; d < kMaxHashDims; ++d) {  // to a constant bound: unrolled, the arrays stay in a GPU's registers
        if (d >= dims) continue;
        out.multipliers[d] = std::uint32_t(vertices);
        if (vertices <= grid.rows) vertices *= std::int64_t(out.resolution) + 1;
    }
    out.dense = vertices <= grid.rows;
    for (int d = 0; d < kMaxHashDims; ++d) out.multipliers[d] = out.dense ? out.multipliers[d] : primes[d];
    return out;
}

FACTORKIT_HOST_DEVICE std::uint32_t hash_join(const HashLevel& level, std::uint32_t a, std::uint32_t b) {
    return level.dense ? a + b : a ^ b;
}

FACTORKIT_HOST_DEVICE std::uint32_t hash_row(const HashLevel& level, std::uint32_t joined) {
    return level.dense ? joined : joined & level.mask;
}

// The cell along one axis and the place in it, 0 to 1. Outside [0, 1] the nearest face answers. A NaN finds cell 0 and
// stays NaN in the place, so it reaches the features and no address.
template <class T>
FACTORKIT_HOST_DEVICE T hash_cell(T x, std::int32_t resolution, std::uint32_t& cell) {
    T position = (x < T(0) ? T(0) : x > T(1) ? T(1) : x) * T(resolution);
    std::int32_t index = position > T(0) ? std::int32_t(position) : 0;
    index = index < resolution ? index : resolution - 1;
    cell = std::uint32_t(index);
    return position - T(index);
}

// Share of the upper vertex at place t: t, or 6t^5 - 15t^4 + 10t^3, whose first two derivatives vanish at both ends.
template <class T>
FACTORKIT_HOST_DEVICE T hash_share(T t, bool quintic) {
    return quintic ? t * t * t * (t * (t * T(6) - T(15)) + T(10)) : t;
}

// Derivative of the share by x: none outside [0, 1].
template <class T>
FACTORKIT_HOST_DEVICE T hash_slope(T x, T t, std::int32_t resolution, bool quintic) {
    T slope = quintic ? T(30) * t * t * (t - T(1)) * (t - T(1)) : T(1);
    return x < T(0) || x > T(1) ? T(0) : slope * T(resolution);
}

template <class T>
void hash_grid_forward(const HashGrid<T>& grid, T* out, int threads);  // out: [points, levels * features]

// Gradients of the sum of out * grad; a null d_x [points, dims] or d_table (like table) is left out. Every element is
// written by one thread, in the order of the points: the result does not depend on the number of threads.
template <class T>
void hash_grid_backward(const HashGrid<T>& grid, const T* grad, T* d_x, T* d_table, int threads);

// The same on the current CUDA device. Here d_table, which must hold zeros, is summed with atomics: its last digits may
// change from run to run. Throws std::runtime_error if the launch fails. Defined in builds with CUDA only.
template <class T>
void hash_grid_forward_cuda(const HashGrid<T>& grid, T* out, void* stream);
template <class T>
void hash_grid_backward_cuda(const HashGrid<T>& grid, const T* grad, T* d_x, T* d_table, void* stream);

}  // namespace factorkit
