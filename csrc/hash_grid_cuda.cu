#include <type_traits>

#include "cuda_launch.h"
#include "hash_grid.h"

namespace factorkit {
namespace {

using std::int64_t;

// The vertices around one point, as in Corners of the CPU loops.
template <class T, int D>
struct Vertices {
    T slope[D];
    T share[1 << D];
    std::uint32_t row[1 << D];

    __device__ __forceinline__ Vertices(const HashGrid<T>& grid, const HashLevel& level, int64_t n) {
        share[0] = T(1);
        row[0] = 0;
#pragma unroll
        for (int d = 0; d < D; ++d) {
            const T value = grid.x[n * D + d];
            std::uint32_t cell;
            const T t = hash_cell(value, level.resolution, cell);
            const T upper = hash_share(t, grid.quintic);
            slope[d] = hash_slope(value, t, level.resolution, grid.quintic);
            const std::uint32_t below = cell * level.multipliers[d];
#pragma unroll
            for (int c = 0; c < 1 << (D - 1); ++c) {
                if (c >= 1 << d) break;  // not the loop's bound: only a constant one is unrolled for certain
                row[c | 1 << d] = hash_join(level, row[c], below + level.multipliers[d]);
                row[c] = hash_join(level, row[c], below);
                share[c | 1 << d] = share[c] * upper;
                share[c] -= share[c | 1 << d];
            }
        }
#pragma unroll
        for (int c = 0; c < 1 << D; ++c) row[c] = hash_row(level, row[c]);
    }
};

// F features that lie together: one load where F * sizeof(T) allows it.
template <class T, int F>
struct alignas(F * sizeof(T) < 16 ? F * sizeof(T) : 16) Features {
    T value[F];
};

template <class T, int F>
__device__ __forceinline__ const Features<T, F>* level_table(const HashGrid<T>& grid, int level) {
    return reinterpret_cast<const Features<T, F>*>(grid.table) + level * grid.rows;
}

// One thread a point and level; a block stays on one level, whose part of the table it keeps in cache.
template <class T, int D, int F>
__global__ void __launch_bounds__(kThreads) encode(const HashGrid<T> grid, Features<T, F>* out) {
    const int64_t n = thread_index();
    const int l = blockIdx.y;
    if (n >= grid.points) return;
    const T weight = grid.weights[l];
    Features<T, F> sum{};
    if (weight != T(0)) {
        const Vertices<T, D> vertices(grid, hash_level(grid, l, D), n);
        const Features<T, F>* table = level_table<T, F>(grid, l);
#pragma unroll
        for (int c = 0; c < 1 << D; ++c) {
            const Features<T, F> at = table[vertices.row[c]];
#pragma unroll
            for (int f = 0; f < F; ++f) sum.value[f] += weight * vertices.share[c] * at.value[f];
        }
    }
    out[n * grid.levels + l] = sum;
}

// One thread a point, over all levels: no two threads meet.
template <class T, int D, int F>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 0)  // in fp64 ptxas spills if it chooses: sm_100
    encode_d_x(const HashGrid<T> grid, const Features<T, F>* grad, T* d_x) {
    const int64_t n = thread_index();
    if (n >= grid.points) return;
    T total[D] = {};
    for (int l = 0; l < grid.levels; ++l) {
        const T weight = grid.weights[l];
        if (weight == T(0)) continue;
        const Features<T, F> upstream = grad[n * grid.levels + l];
        const Vertices<T, D> vertices(grid, hash_level(grid, l, D), n);
        const Features<T, F>* table = level_table<T, F>(grid, l);
        T dot[1 << D];
#pragma unroll
        for (int c = 0; c < 1 << D; ++c) {
            const Features<T, F> at = table[vertices.row[c]];
            dot[c] = T(0);
#pragma unroll
            for (int f = 0; f < F; ++f) dot[c] += upstream.value[f] * at.value[f];
        }
#pragma unroll
        for (int d = 0; d < D; ++d) {
            T along = T(0);
#pragma unroll
            for (int c = 0; c < 1 << D; ++c) {
                const int high = c | 1 << d;
                // The two shares add up to the product of the other axes' shares.
                if (c != high) along += (vertices.share[c] + vertices.share[high]) * (dot[high] - dot[c]);
            }
            total[d] += weight * vertices.slope[d] * along;
        }
    }
#pragma unroll
    for (int d = 0; d < D; ++d) d_x[n * D + d] = total[d];
}

// Adds to a row of the table around a point of D dimensions: as vectors where the hardware can, which is for fp32 from
// sm_90 on, and where the registers suffice, which is below four dimensions.
template <int D, class T, int F>
__device__ __forceinline__ void add_to_row(T* row, const Features<T, F>& add) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    constexpr bool as_vectors = std::is_same_v<T, float> && F % 2 == 0 && D < 4;
#else
    constexpr bool as_vectors = false;
#endif
    if constexpr (as_vectors) {
        using Vector = std::conditional_t<F == 2, float2, float4>;
#pragma unroll
        for (int f = 0; f < F; f += sizeof(Vector) / sizeof(float))
            atomicAdd(reinterpret_cast<Vector*>(row + f), reinterpret_cast<const Vector&>(add.value[f]));
    } else {
#pragma unroll
        for (int f = 0; f < F; ++f) atomicAdd(row + f, add.value[f]);
    }
}

template <class T, int D, int F>
__global__ void __launch_bounds__(kThreads)
    encode_d_table(const HashGrid<T> grid, const Features<T, F>* grad, T* d_table) {
    const int64_t n = thread_index();
    const int l = blockIdx.y;
    if (n >= grid.points) return;
    const T weight = grid.weights[l];
    if (weight == T(0)) return;
    const Features<T, F> upstream = grad[n * grid.levels + l];
    bool any = false;  // behind a surface most gradients are zero, and an atomic costs more than the test
#pragma unroll
    for (int f = 0; f < F; ++f) any |= upstream.value[f] != T(0);
    if (!any) return;
    const Vertices<T, D> vertices(grid, hash_level(grid, l, D), n);
    T* table = d_table + l * grid.rows * F;
#pragma unroll
    for (int c = 0; c < 1 << D; ++c) {
        Features<T, F> part;
#pragma unroll
        for (int f = 0; f < F; ++f) part.value[f] = weight * vertices.share[c] * upstream.value[f];
        add_to_row<D>(table + int64_t(vertices.row[c]) * F, part);
    }
}

// Calls body.run<dims, features>() for those of the grid.
template <class Body, int D>
void for_features(int features, const Body& body) {
    switch (features) {
        case 1: return body.template run<D, 1>();
        case 2: return body.template run<D, 2>();
        case 4: return body.template run<D, 4>();
        case 8: return body.template run<D, 8>();
    }
    throw std::runtime_error("hash_grid has no kernel for " + std::to_string(features) + " features a level");
}

template <class Body>
void for_sizes(int dims, int features, const Body& body) {
    switch (dims) {
        case 2: return for_features<Body, 2>(features, body);
        case 3: return for_features<Body, 3>(features, body);
        case 4: return for_features<Body, 4>(features, body);
    }
    throw std::runtime_error("hash_grid has no kernel for " + std::to_string(dims) + " dimensions");
}

template <class T>
dim3 point_blocks(const HashGrid<T>& grid, bool by_level) {
    return dim3(blocks_for(grid.points), by_level ? grid.levels : 1);
}

template <class T>
struct Forward {
    const HashGrid<T>& grid;
    T* out;
    cudaStream_t stream;

    template <int D, int F>
    void run() const {
        encode<T, D, F><<<point_blocks(grid, true), kThreads, 0, stream>>>(grid, reinterpret_cast<Features<T, F>*>(out));
        check_launch("hash_grid forward");
    }
};

template <class T>
struct Backward {
    const HashGrid<T>& grid;
    const T* grad;
    T *d_x, *d_table;
    cudaStream_t stream;

    template <int D, int F>
    void run() const {
        const auto* upstream = reinterpret_cast<const Features<T, F>*>(grad);
        if (d_x) {
            encode_d_x<T, D, F><<<point_blocks(grid, false), kThreads, 0, stream>>>(grid, upstream, d_x);
            check_launch("hash_grid gradient for x");
        }
        if (d_table) {
            encode_d_table<T, D, F><<<point_blocks(grid, true), kThreads, 0, stream>>>(grid, upstream, d_table);
            check_launch("hash_grid gradient for the table");
        }
    }
};

}  // namespace

template <class T>
void hash_grid_forward_cuda(const HashGrid<T>& grid, T* out, void* stream) {
    if (grid.points == 0) return;
    for_sizes(grid.dims, grid.features, Forward<T>{grid, out, static_cast<cudaStream_t>(stream)});
}

template <class T>
void hash_grid_backward_cuda(const HashGrid<T>& grid, const T* grad, T* d_x, T* d_table, void* stream) {
    if (grid.points == 0) return;
    for_sizes(grid.dims, grid.features, Backward<T>{grid, grad, d_x, d_table, static_cast<cudaStream_t>(stream)});
}

template void hash_grid_forward_cuda(const HashGrid<float>&, float*, void*);
template void hash_grid_forward_cuda(const HashGrid<double>&, double*, void*);
template void hash_grid_backward_cuda(const HashGrid<float>&, const float*, float*, float*, void*);
template void hash_grid_backward_cuda(const HashGrid<double>&, const double*, double*, double*, void*);

}  // namespace factorkit
