// Runs the projection of the masked skip on odd sizes, every array a heap block of exactly its size, so that sanitizers see
// any foreign access; values must agree with sums in double.
#include "projection.h"

#include <cstdio>
#include <vector>

#include "random_numbers.h"

enum class Kind { own, shared, plain };  // u by branch, u shared by the branches, no masks

template <class T>
void check(int64_t batch, int64_t regions, int64_t c_u, int64_t c_skip, int64_t c_out, int64_t n, Kind kind, bool with_residual) {
    if (kind == Kind::plain) regions = 1;
    const bool shared = kind == Kind::shared && regions > 1, masked = kind != Kind::plain;
    const int64_t rows = batch * regions, c_in = c_u + c_skip;
    const auto u = random_numbers<T>((shared ? batch : rows) * n * c_u), skip = random_numbers<T>(batch * n * c_skip);
    const auto residual = random_numbers<T>(with_residual ? rows * n * c_out : 0), grad = random_numbers<T>(rows * n * c_out);
    const auto masks = random_numbers(masked ? rows * n : 0), bias = random_numbers(c_out);
    const auto weight = random_numbers(c_out * c_in, -1.0 / c_in, 1.0 / c_in);
    std::vector<T> out(rows * n * c_out), d_u(u.size()), d_skip(skip.size());
    Floats d_masks(masks.size()), d_weight(weight.size()), d_bias(c_out);
    const ProjectionProblem p{u.data(), skip.data(), masked ? masks.data() : nullptr, weight.data(), bias.data(),
                              with_residual ? residual.data() : nullptr, batch, regions, c_u, c_skip, c_out, n, shared,
                              sizeof(T) == 2};
    projection_forward(p, out.data(), 2);
    projection_backward(p, {grad.data(), d_u.data(), d_skip.data(), masked ? d_masks.data() : nullptr, d_weight.data(),
                            d_bias.data()}, 2);
    std::vector<double> on_u(u.size()), on_skip(skip.size()), on_weight(weight.size()), on_bias(c_out);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < n; ++i) {
            const int64_t image = row / regions, at_u = ((shared ? image : row) * n + i) * c_u, at_skip = (image * n + i) * c_skip;
            const double m = masked ? masks[row * n + i] : 1;
            double on_mask = 0;
            for (int64_t o = 0; o < c_out; ++o) {
                const int64_t at = (row * n + i) * c_out + o;
                const double g = to_float(grad[at]);
                double sum = bias[o] + (with_residual ? to_float(residual[at]) : 0);
                for (int64_t c = 0; c < c_u; ++c) {
                    sum += weight[o * c_in + c] * to_float(u[at_u + c]);
                    on_u[at_u + c] += weight[o * c_in + c] * g;
                    on_weight[o * c_in + c] += to_float(u[at_u + c]) * g;
                }
                for (int64_t c = 0; c < c_skip; ++c) {
                    const double w = weight[o * c_in + c_u + c], s = to_float(skip[at_skip + c]);
                    sum += w * m * s;
                    on_skip[at_skip + c] += w * m * g;
                    on_weight[o * c_in + c_u + c] += m * s * g;
                    on_mask += w * s * g;
                }
                on_bias[o] += g;
                agree(out[at], sum, "output");
            }
            if (masked) agree(d_masks[row * n + i], on_mask, "gradient of a mask");
        }
    for (std::size_t i = 0; i < u.size(); ++i) agree(d_u[i], on_u[i], "gradient of u");
    for (std::size_t i = 0; i < skip.size(); ++i) agree(d_skip[i], on_skip[i], "gradient of the skip");
    for (std::size_t i = 0; i < weight.size(); ++i) agree(d_weight[i], on_weight[i], "gradient of the weight");
    for (int64_t o = 0; o < c_out; ++o) agree(d_bias[o], on_bias[o], "gradient of the bias");
}

int main() {
    for (int64_t regions : {1, 2, 5})
        for (int64_t n : {1, 15, 67})
            for (Kind kind : {Kind::own, Kind::shared, Kind::plain})
                for (bool residual : {false, true}) {
                    check<float>(1, regions, 8, 8, 8, n, kind, residual);
                    check<bf16>(3, regions, 17, 9, 24, n, kind, residual);
                    check<bf16>(2, regions, 16, 32, 16, n, kind, residual);
                    check<float>(34, regions, 9, 12, 33, n % 16, kind, residual);  // more images than sums of weights
                }
    std::puts("passed");
}
