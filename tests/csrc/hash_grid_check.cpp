// Runs the hash grid over awkward sizes and hostile points, every array a heap block of exactly its size, so that
// sanitizers see any foreign access. With EMULATED_CUDA the CUDA kernels must answer what the CPU does.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "hash_grid.h"

namespace {

struct Sizes {
    int dims, features;
    std::int64_t points;
    int threads;
    bool quintic;
};

constexpr int kLevels = 3, kRows = 32;  // level 0 is dense, the finest hashed
constexpr int kHostile = 14;            // elements of x, in as many points or fewer, that are no ordinary coordinates
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

template <class T>
bool near(const std::vector<T>& a, const std::vector<T>& b, T tolerance) {
    T largest = 0;
    for (T x : a) largest = std::isfinite(x) ? std::max(largest, std::abs(x)) : largest;
    for (std::size_t i = 0; i < a.size(); ++i)
        if (std::isnan(a[i]) ? !std::isnan(b[i]) : !(std::abs(a[i] - b[i]) <= tolerance * largest)) return false;
    return true;
}

template <class T>
const char* check(const Sizes& s) {
    factorkit::HashGrid<T> grid{};
    grid.dims = s.dims;
    grid.features = s.features;
    grid.points = s.points;
    grid.rows = kRows;
    grid.levels = kLevels;
    grid.quintic = s.quintic;
    const std::int32_t resolutions[] = {1, 2, (1 << 24) - 1};
    std::copy(resolutions, resolutions + kLevels, grid.resolutions);

    std::vector<T> x(s.points * s.dims), table(kLevels * kRows * s.features, T(0.5)), weights{1, 0, 2};
    const T hostile[] = {0, 1, -3, 7, T(1e30), std::numeric_limits<T>::infinity(), T(kNan)};
    const auto between = [](std::size_t i) { return T(0.37) * T(i % 1000) - std::floor(T(0.37) * T(i % 1000)); };
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = i < kHostile ? hostile[i / 2] : between(i);
    grid.x = x.data();
    grid.table = table.data();
    grid.weights = weights.data();
    const std::size_t size = s.points * kLevels * s.features;
    std::vector<T> out(size, T(kNan)), grad(size), d_x(x.size(), T(kNan)), d_table(table.size(), T(kNan));
    for (std::size_t i = 0; i < size; ++i) grad[i] = between(7 * i + 3);

    factorkit::hash_grid_forward(grid, out.data(), s.threads);
    // A constant table interpolates to its constant, whatever the vertices.
    for (std::size_t i = kHostile * kLevels * s.features; i < size; ++i)
        if (!(std::abs(out[i] - weights[i / s.features % kLevels] * T(0.5)) < T(1e-4))) return "a constant table";

    for (std::size_t i = 0; i < table.size(); ++i) table[i] = between(3 * i + 1);
    factorkit::hash_grid_forward(grid, out.data(), s.threads);
    factorkit::hash_grid_backward(grid, grad.data(), d_x.data(), d_table.data(), s.threads);
    factorkit::hash_grid_backward<T>(grid, grad.data(), nullptr, nullptr, s.threads);
    for (std::size_t i = kHostile * s.dims; i < x.size(); ++i)
        if (!std::isfinite(d_x[i])) return "an unwritten gradient for x";
#ifdef EMULATED_CUDA
    std::vector<T> out_cuda(size, T(kNan)), d_x_cuda(x.size(), T(kNan)), d_table_cuda(table.size(), T(0));
    factorkit::hash_grid_forward_cuda(grid, out_cuda.data(), nullptr);
    factorkit::hash_grid_backward_cuda(grid, grad.data(), d_x_cuda.data(), d_table_cuda.data(), nullptr);
    const T tolerance = sizeof(T) == 4 ? T(2e-5) : T(1e-12);
    if (!near(out, out_cuda, tolerance)) return "CUDA's features";
    if (!near(d_x, d_x_cuda, tolerance)) return "CUDA's gradient for x";
    if (!near(d_table, d_table_cuda, tolerance)) return "CUDA's gradient for the table";
#endif
    return nullptr;
}

}  // namespace

int main() {
#ifdef EMULATED_CUDA
    const std::vector<std::int64_t> counts{0, 1, 300};
    const std::vector<int> threads{1};
#else
    const std::vector<std::int64_t> counts{0, 1, 64, 65, 2049};
    const std::vector<int> threads{1, 2, 7};
#endif
    for (int dims : {2, 3, 4})
        for (int features : {1, 2, 4, 8})
            for (std::int64_t points : counts)
                for (int count : threads)
                    for (bool quintic : {false, true}) {
                        const Sizes s{dims, features, points, count, quintic};
                        const char* in_float = check<float>(s);
                        const char* wrong = in_float ? in_float : check<double>(s);
                        if (!wrong) continue;
                        std::printf("%s is wrong: dims=%d features=%d points=%ld threads=%d quintic=%d %s\n", wrong, dims,
                                    features, long(points), count, int(quintic), in_float ? "float" : "double");
                        return 1;
                    }
    std::puts("passed");
}
