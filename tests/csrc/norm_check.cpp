// Runs the norm on odd sizes, every array a heap block of exactly its size, so that sanitizers see any foreign access;
// values must agree with sums in double.
#include "norm.h"

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "random_numbers.h"

template <class T>
void finite(const std::vector<T>& values, const char* what) {
    for (const T& x : values)
        if (!std::isfinite(to_float(x))) std::fprintf(stderr, "%s is not finite\n", what), std::exit(1);
}

template <class T>
void check(NormKind kind, int64_t batch, int64_t regions, int64_t cu, int64_t cs, int64_t n, int64_t groups, bool shared) {
    const int64_t rows = batch * regions, channels = cu + cs, size = channels / groups;
    const bool with_masks = regions > 1 || kind == NormKind::masked_group, pixel = kind == NormKind::pixel;
    const auto u = random_numbers<T>((shared ? batch : rows) * n * cu, 99, 101), skip = random_numbers<T>(batch * n * cs, -1, 1);
    const auto masks = random_numbers(with_masks ? rows * n : 0, 0, 1), weight = random_numbers(channels, 0, 1),
               bias = random_numbers(channels, 0, 1), scale = random_numbers(rows * channels, -1, 1),
               shift = random_numbers(rows * channels, -1, 1);
    const NormProblem p{u.data(), cs ? skip.data() : nullptr, with_masks ? masks.data() : nullptr, weight.data(),
                        bias.data(), scale.data(), shift.data(), batch, regions, cu, cs, n, groups, kind, shared, true,
                        sizeof(T) == 2, 1e-3f, 1e-3f};
    std::vector<T> out(rows * n * channels);
    Floats moments((pixel ? 0 : kind == NormKind::masked_group ? 3 : 2) * rows * groups);
    norm_silu_forward(p, out.data(), moments.data(), 2);

    const auto value = [&](int64_t r, int64_t i, int64_t c) {
        const int64_t image = r / regions;
        if (c < cu) return double(to_float(u[((shared ? image : r) * n + i) * cu + c]));
        return double(with_masks ? masks[r * n + i] : 1) * to_float(skip[(image * n + i) * cs + c - cu]);
    };
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < n; ++i)
            for (int64_t c = 0; c < channels; ++c) {
                double total = 0, mean = 0, square = 0;
                const int64_t first = pixel ? 0 : c / size * size, last = pixel ? channels : first + size;
                for (int64_t pass = 0; pass < 2; ++pass) {
                    total = square = 0;
                    double sum = 0;
                    for (int64_t j = pixel ? i : 0; j < (pixel ? i + 1 : n); ++j)
                        for (int64_t d = first; d < last; ++d) {
                            const double w = kind == NormKind::masked_group ? masks[r * n + j] + 1e-3 : 1, x = value(r, j, d);
                            total += w, sum += w * x, square += w * (x - mean) * (x - mean);
                        }
                    if (!pixel && !pass) mean = sum / total;
                }
                const double factor = 1 + scale[r * channels + c], normal = (value(r, i, c) - mean) / std::sqrt(square / total + 1e-3);
                const double z = (normal * weight[c] + bias[c]) * factor + shift[r * channels + c], want = z / (1 + std::exp(-z));
                const double got = to_float(out[(r * n + i) * channels + c]);
                if (!(std::abs(got - want) <= (sizeof(T) == 2 ? 8e-3 : 2e-4) * (1 + std::abs(want))))
                    std::fprintf(stderr, "kind %d: %.7g for %.7g\n", int(kind), got, want), std::exit(1);
            }

    const auto grad = random_numbers<T>(out.size(), -1, 1);
    std::vector<T> d_u(u.size()), d_skip(skip.size());
    Floats d_masks(masks.size()), summed(rows * channels), moment(rows * channels);
    norm_silu_backward(p, {grad.data(), moments.data(), d_u.data(), cs ? d_skip.data() : nullptr,
                           with_masks ? d_masks.data() : nullptr, summed.data(), moment.data()}, 2);
    finite(d_u, "gradient of u"), finite(d_skip, "gradient of the skip"), finite(d_masks, "gradient of the masks");
    finite(summed, "sums"), finite(moment, "moments");
}

int main() {
    for (NormKind kind : {NormKind::group, NormKind::masked_group, NormKind::pixel})
        for (const auto& [cu, cs, groups] : {std::array<int64_t, 3>{3, 0, 1}, {16, 16, 4}, {8, 25, 3}})
            for (int64_t n : {1, 66})
                for (bool shared : {false, true}) {
                    check<float>(kind, 2, 2, cu, cs, n, groups, shared);
                    check<bf16>(kind, 2, 2, cu, cs, n, groups, shared);
                    if (!shared) check<float>(kind, 3, 1, cu, cs, n, groups, false);
                }
    std::puts("passed");
}
