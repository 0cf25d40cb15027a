#include "hash_grid.h"

#include <algorithm>
#include <vector>

#include "simd.h"
#include "threads.h"

namespace factorkit {
namespace {

using std::int64_t;

constexpr int kBlock = 64;  // points handled at once: what is known of their vertices stays in L1
constexpr int64_t kChunk = 32 * kBlock;  // points that all levels pass over before the next ones: their outputs stay in L2

// The vertices around a block of points: corner c takes the upper vertex along axis d where bit d of c is set.
template <class T>
struct Corners {
    T slope[kMaxHashDims][kBlock];
    T share[1 << kMaxHashDims][kBlock];
    std::int32_t at[1 << kMaxHashDims][kBlock];  // where its features begin in the level's table

    FACTORKIT_INLINE void find(const HashGrid<T>& grid, const HashLevel& level, const T* x, int count) {
        T upper[kBlock];
        std::uint32_t below[kBlock];
        std::uint32_t joined[1 << kMaxHashDims][kBlock];
        for (int d = 0; d < grid.dims; ++d) {
            const std::uint32_t multiplier = level.multipliers[d];
#pragma omp simd
            for (int i = 0; i < count; ++i) {
                const T value = x[i * grid.dims + d];
                std::uint32_t cell;
                const T t = hash_cell(value, level.resolution, cell);
                upper[i] = hash_share(t, grid.quintic);
                slope[d][i] = hash_slope(value, t, level.resolution, grid.quintic);
                below[i] = cell * multiplier;
            }
            if (d == 0) {
#pragma omp simd
                for (int i = 0; i < count; ++i) {
                    joined[0][i] = below[i];
                    joined[1][i] = below[i] + multiplier;
                    share[0][i] = 1 - upper[i];
                    share[1][i] = upper[i];
                }
                continue;
            }
            for (int c = 0; c < 1 << d; ++c) {
                std::uint32_t *low = joined[c], *high = joined[c | 1 << d];
                T *low_share = share[c], *high_share = share[c | 1 << d];
#pragma omp simd
                for (int i = 0; i < count; ++i) {
                    high[i] = hash_join(level, low[i], below[i] + multiplier);
                    low[i] = hash_join(level, low[i], below[i]);
                    high_share[i] = low_share[i] * upper[i];
                    low_share[i] -= high_share[i];
                }
            }
        }
        for (int c = 0; c < 1 << grid.dims; ++c) {
#pragma omp simd
            for (int i = 0; i < count; ++i) at[c][i] = std::int32_t(hash_row(level, joined[c][i])) * grid.features;
        }
    }
};

template <class T>
FACTORKIT_INLINE void forward_points(const HashGrid<T>& grid, T* out, int64_t begin, int64_t end) {
    Corners<T> corners;
    T sum[kBlock];
    const int64_t width = grid.levels * grid.features;
    for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
        const int64_t chunk_end = std::min(chunk + kChunk, end);
        for (int l = 0; l < grid.levels; ++l) {
            const HashLevel level = hash_level(grid, l, grid.dims);
            const T weight = grid.weights[l];
            for (int64_t n = chunk; n < chunk_end; n += kBlock) {
                const int count = int(std::min<int64_t>(kBlock, chunk_end - n));
                T* to = out + n * width + l * grid.features;
                if (weight == 0) {  // annealed away: not even looked at
                    for (int i = 0; i < count; ++i)
                        for (int f = 0; f < grid.features; ++f) to[i * width + f] = 0;
                    continue;
                }
                corners.find(grid, level, grid.x + n * grid.dims, count);
                for (int f = 0; f < grid.features; ++f) {
                    const T* table = grid.table + l * grid.rows * grid.features + f;
                    std::fill(sum, sum + count, T(0));
                    for (int c = 0; c < 1 << grid.dims; ++c) {
                        const std::int32_t* at = corners.at[c];
                        const T* share = corners.share[c];
#pragma omp simd
                        for (int i = 0; i < count; ++i) sum[i] += share[i] * table[at[i]];
                    }
                    for (int i = 0; i < count; ++i) to[i * width + f] = weight * sum[i];
                }
            }
        }
    }
}

template <class T>
FACTORKIT_INLINE void backward_points(const HashGrid<T>& grid, const T* grad, T* d_x, int64_t begin, int64_t end) {
    Corners<T> corners;
    T dot[1 << kMaxHashDims][kBlock], upstream[kBlock], along[kBlock];
    const int64_t width = grid.levels * grid.features;
    std::fill(d_x + begin * grid.dims, d_x + end * grid.dims, T(0));
    for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
        const int64_t chunk_end = std::min(chunk + kChunk, end);
        for (int l = 0; l < grid.levels; ++l) {
            const HashLevel level = hash_level(grid, l, grid.dims);
            const T weight = grid.weights[l];
            for (int64_t n = chunk; weight != 0 && n < chunk_end; n += kBlock) {
                const int count = int(std::min<int64_t>(kBlock, chunk_end - n));
                const T* from = grad + n * width + l * grid.features;
                corners.find(grid, level, grid.x + n * grid.dims, count);
                for (int f = 0; f < grid.features; ++f) {
                    const T* table = grid.table + l * grid.rows * grid.features + f;
                    for (int i = 0; i < count; ++i) upstream[i] = weight * from[i * width + f];
                    for (int c = 0; c < 1 << grid.dims; ++c) {
                        const std::int32_t* at = corners.at[c];
                        T* product = dot[c];
                        if (f == 0) {
#pragma omp simd
                            for (int i = 0; i < count; ++i) product[i] = upstream[i] * table[at[i]];
                        } else {
#pragma omp simd
                            for (int i = 0; i < count; ++i) product[i] += upstream[i] * table[at[i]];
                        }
                    }
                }
                for (int d = 0; d < grid.dims; ++d) {
                    std::fill(along, along + count, T(0));
                    for (int c = 0; c < 1 << grid.dims; ++c) {
                        const int high = c | 1 << d;
                        if (c == high) continue;
                        // The two shares add up to the product of the other axes' shares.
#pragma omp simd
                        for (int i = 0; i < count; ++i)
                            along[i] += (corners.share[c][i] + corners.share[high][i]) * (dot[high][i] - dot[c][i]);
                    }
                    T* to = d_x + n * grid.dims + d;
                    for (int i = 0; i < count; ++i) to[i * grid.dims] += along[i] * corners.slope[d][i];
                }
            }
        }
    }
}

// Adds the points' gradients to the elements [first, last) of one level's table.
template <class T>
FACTORKIT_INLINE void backward_rows(const HashGrid<T>& grid, const T* grad, T* d_table, int l, int64_t chunk,
                                    int64_t chunk_end, int64_t first, int64_t last) {
    Corners<T> corners;
    const HashLevel level = hash_level(grid, l, grid.dims);
    const int64_t width = grid.levels * grid.features;
    const int features = grid.features, vertices = 1 << grid.dims;
    const T weight = grid.weights[l];
    T upstream[8];
    for (int64_t n = chunk; weight != 0 && n < chunk_end; n += kBlock) {
        const int count = int(std::min<int64_t>(kBlock, chunk_end - n));
        corners.find(grid, level, grid.x + n * grid.dims, count);
        for (int i = 0; i < count; ++i) {
            const T* from = grad + (n + i) * width + l * features;
            for (int f = 0; f < features; ++f) upstream[f] = weight * from[f];
            for (int c = 0; c < vertices; ++c) {
                const std::int32_t at = corners.at[c][i];
                if (at < first || at >= last) continue;
                const T share = corners.share[c][i];
                for (int f = 0; f < features; ++f) d_table[at + f] += share * upstream[f];
            }
        }
    }
}

}  // namespace

// One pair for each direction, because target_clones takes no templates.
FACTORKIT_CLONES void encode(const HashGrid<float>& grid, float* out, int64_t begin, int64_t end) {
    forward_points(grid, out, begin, end);
}
FACTORKIT_CLONES void encode(const HashGrid<double>& grid, double* out, int64_t begin, int64_t end) {
    forward_points(grid, out, begin, end);
}
FACTORKIT_CLONES void encode_d_x(const HashGrid<float>& grid, const float* grad, float* d_x, int64_t begin, int64_t end) {
    backward_points(grid, grad, d_x, begin, end);
}
FACTORKIT_CLONES void encode_d_x(const HashGrid<double>& grid, const double* grad, double* d_x, int64_t begin,
                                 int64_t end) {
    backward_points(grid, grad, d_x, begin, end);
}
FACTORKIT_CLONES void encode_d_table(const HashGrid<float>& grid, const float* grad, float* d_table, int level,
                                     int64_t begin, int64_t end, int64_t first, int64_t last) {
    backward_rows(grid, grad, d_table, level, begin, end, first, last);
}
FACTORKIT_CLONES void encode_d_table(const HashGrid<double>& grid, const double* grad, double* d_table, int level,
                                     int64_t begin, int64_t end, int64_t first, int64_t last) {
    backward_rows(grid, grad, d_table, level, begin, end, first, last);
}

template <class T>
void hash_grid_forward(const HashGrid<T>& grid, T* out, int threads) {
    parallel_for(grid.points, threads, [&](int64_t begin, int64_t end) { encode(grid, out, begin, end); });
}

template <class T>
void hash_grid_backward(const HashGrid<T>& grid, const T* grad, T* d_x, T* d_table, int threads) {
    if (d_x)
        parallel_for(grid.points, threads, [&](int64_t begin, int64_t end) { encode_d_x(grid, grad, d_x, begin, end); });
    if (!d_table) return;
    // A piece of the table has one owner: levels dealt out in turn, each cut into ranges once there are more threads.
    const int64_t workers = std::max(1, threads), parts = (workers + grid.levels - 1) / grid.levels;
    const int64_t tasks = grid.levels * parts;
    parallel_for(std::min(workers, tasks), int(std::min(workers, tasks)), [&](int64_t worker, int64_t) {
        const auto each = [&](auto body) {
            for (int64_t task = worker; task < tasks; task += std::min(workers, tasks)) {
                const int64_t part = task / grid.levels;
                body(int(task % grid.levels), grid.rows * part / parts * grid.features,
                     grid.rows * (part + 1) / parts * grid.features);
            }
        };
        const auto table_of = [&](int level) { return d_table + level * grid.rows * grid.features; };
        each([&](int level, int64_t first, int64_t last) {
            std::fill(table_of(level) + first, table_of(level) + last, T(0));
        });
        for (int64_t chunk = 0; chunk < grid.points; chunk += kChunk) {
            const int64_t chunk_end = std::min(chunk + kChunk, grid.points);
            each([&](int level, int64_t first, int64_t last) {
                encode_d_table(grid, grad, table_of(level), level, chunk, chunk_end, first, last);
            });
        }
    });
}

template void hash_grid_forward(const HashGrid<float>&, float*, int);
template void hash_grid_forward(const HashGrid<double>&, double*, int);
template void hash_grid_backward(const HashGrid<float>&, const float*, float*, float*, int);
template void hash_grid_backward(const HashGrid<double>&, const double*, double*, double*, int);

}  // namespace factorkit
