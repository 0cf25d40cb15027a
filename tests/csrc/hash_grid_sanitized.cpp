// Runs the hash grid's CPU loops over awkward sizes, for the sanitizers to watch; prints "passed".
// Built and run by test_sanitizers.py; what the numbers should be is tested in tests/ops.
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <vector>

#include "../../csrc/hash_grid.h"

namespace {

template <class T>
bool run(int dims, int features, std::int64_t points, int threads, bool quintic) {
    factorkit::HashGrid<T> grid{};
    grid.dims = dims;
    grid.features = features;
    grid.points = points;
    grid.rows = 32;  // level 0 is dense, the finest hashed
    grid.levels = 3;
    grid.quintic = quintic;
    const std::int32_t resolutions[] = {1, 2, (1 << 24) - 1};
    std::copy(resolutions, resolutions + 3, grid.resolutions);

    // Of exact size and each on its own, so that one element too many is caught.
    std::vector<T> x(points * dims), table(3 * 32 * features, T(0.5)), weights{1, 0, 2};
    const T special[] = {0, 1, -3, 7, T(1e30), std::numeric_limits<T>::infinity(), std::numeric_limits<T>::quiet_NaN()};
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = i < 14 ? special[i / 2] : T(0.37) * T(i) - std::floor(T(0.37) * T(i));
    grid.x = x.data();
    grid.table = table.data();
    grid.weights = weights.data();
    const std::size_t size = points * grid.levels * features;
    std::unique_ptr<T[]> out(new T[size]), d_x(new T[x.size()]), d_table(new T[table.size()]);
    const std::vector<T> grad(size, T(1));
    factorkit::hash_grid_forward(grid, out.get(), threads);
    factorkit::hash_grid_backward(grid, grad.data(), d_x.get(), d_table.get(), threads);
    factorkit::hash_grid_backward<T>(grid, grad.data(), nullptr, nullptr, threads);
    // A constant table interpolates to its constant, whatever the vertices.
    for (std::size_t i = 14 * 3 * features; i < size; ++i) {
        const T want = weights[i / features % 3] * T(0.5);
        if (!(std::abs(out[i] - want) < T(1e-4))) return false;
    }
    return true;
}

}  // namespace

int main() {
    for (int dims : {2, 3, 4})
        for (int features : {1, 2, 8})
            for (std::int64_t points : {0, 1, 64, 65, 2049})
                for (int threads : {1, 2, 7})
                    for (bool quintic : {false, true})
                        if (!run<float>(dims, features, points, threads, quintic) ||
                            !run<double>(dims, features, points, threads, quintic)) {
                            std::printf("wrong at dims=%d features=%d points=%ld\n", dims, features, long(points));
                            return 1;
                        }
    std::puts("passed");
}
