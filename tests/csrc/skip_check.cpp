// Runs the masked skip on odd sizes, every array a heap block of exactly its size, so that sanitizers see any foreign
// access; values must agree with sums in double.
#include "skip.h"

#include <cstdio>
#include <vector>

#include "random_numbers.h"

template <class T>
void check(int64_t batch, int64_t regions, int64_t channels, int64_t n, bool shared, bool with_bias, bool with_residual) {
    const int64_t rows = batch * regions, size = n * channels;
    const auto base = random_numbers<T>((shared ? batch : rows) * size), skip = random_numbers<T>(batch * size);
    const auto residual = random_numbers<T>(with_residual ? rows * size : 0), grad = random_numbers<T>(rows * size);
    const auto masks = random_numbers(rows * n), bias = random_numbers(with_bias ? channels : 0);
    std::vector<T> out(rows * size), d_base(shared ? batch * size : 0), d_skip(batch * size);
    Floats d_masks(rows * n);
    const SkipProblem p{base.data(), skip.data(), masks.data(), with_bias ? bias.data() : nullptr,
                        with_residual ? residual.data() : nullptr, batch, regions, channels, n, shared, sizeof(T) == 2};
    masked_skip_add_forward(p, out.data(), 2);
    masked_skip_add_backward(p, {grad.data(), shared ? d_base.data() : nullptr, d_skip.data(), d_masks.data()}, 2);
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t i = 0; i < n; ++i) {
            std::vector<double> on_masks(regions);
            for (int64_t c = 0; c < channels; ++c) {
                const int64_t in_image = (b * n + i) * channels + c;
                const double s = to_float(skip[in_image]);
                double on_skip = 0, on_base = 0;
                for (int64_t k = 0; k < regions; ++k) {
                    const int64_t row = b * regions + k, at = (row * n + i) * channels + c;
                    const double m = masks[row * n + i], g = to_float(grad[at]);
                    const double rest = (with_bias ? bias[c] : 0) + (with_residual ? to_float(residual[at]) : 0);
                    agree(out[at], to_float(base[shared ? in_image : at]) + m * s + rest, "output");
                    on_skip += m * g, on_base += g, on_masks[k] += s * g;
                }
                agree(d_skip[in_image], on_skip, "gradient of the skip");
                if (shared) agree(d_base[in_image], on_base, "gradient of the base");
            }
            for (int64_t k = 0; k < regions; ++k)
                agree(d_masks[(b * regions + k) * n + i], on_masks[k], "gradient of a mask");
        }
}

int main() {
    for (int64_t regions : {1, 2, 5})
        for (int64_t channels : {8, 13, 16, 41, 300})
            for (int64_t n : {1, 15, 67})
                for (bool shared : {false, true})
                    for (int extra = 0; extra < 4; ++extra) {
                        check<float>(1, regions, channels, n, shared, extra & 1, extra & 2);
                        check<bf16>(3, regions, channels, n, shared, extra & 1, extra & 2);
                    }
    std::puts("passed");
}
