// Runs the norm on odd sizes, every array a heap block of exactly its size, so that sanitizers see any foreign access;
// values and gradients must agree with sums in double.
#include "norm.h"

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "random_numbers.h"

using Doubles = std::vector<double>;

template <class T>
Doubles widened(const std::vector<T>& values) {
    Doubles wide;
    for (const T& x : values) wide.push_back(to_float(x));
    return wide;
}

struct Inputs {
    Doubles u, skip, masks, scale, shift, weight, bias;
};

Doubles Inputs::*const kDifferentiable[] = {&Inputs::u,     &Inputs::skip,   &Inputs::masks, &Inputs::scale,
                                              &Inputs::shift, &Inputs::weight, &Inputs::bias};

// The output [rows][pixels][channels].
Doubles reference(const NormProblem& p, const Inputs& in) {
    const int64_t n = p.pixels, cu = p.channels_u, cs = p.channels_skip, channels = cu + cs, size = channels / p.groups;
    const bool pixel = p.kind == NormKind::pixel;
    Doubles out(p.batch * p.regions * n * channels);
    for (int64_t r = 0; r < p.batch * p.regions; ++r) {
        const int64_t image = r / p.regions;
        const auto value = [&](int64_t i, int64_t c) {
            if (c < cu) return in.u[((p.u_shared ? image : r) * n + i) * cu + c];
            return (in.masks.empty() ? 1.0 : in.masks[r * n + i]) * in.skip[(image * n + i) * cs + c - cu];
        };
        const int64_t sets = pixel ? n : p.groups;  // of values that are normalised together
        for (int64_t set = 0; set < sets; ++set) {
            const int64_t first = pixel ? 0 : set * size, last = pixel ? channels : first + size;
            const int64_t begin = pixel ? set : 0, end = pixel ? set + 1 : n;
            double total = 0, mean = 0, square = 0;
            for (int pass = 0; pass < 2; ++pass) {
                double sum = 0;
                total = square = 0;
                for (int64_t i = begin; i < end; ++i)
                    for (int64_t c = first; c < last; ++c) {
                        const double w = p.kind == NormKind::masked_group ? in.masks[r * n + i] + 1e-3 : 1, x = value(i, c);
                        total += w, sum += w * x, square += w * (x - mean) * (x - mean);
                    }
                if (!pixel && !pass) mean = sum / total;
            }
            for (int64_t i = begin; i < end; ++i)
                for (int64_t c = first; c < last; ++c) {
                    const double normal = (value(i, c) - mean) / std::sqrt(square / total + 1e-3);
                    const double factor = 1 + in.scale[r * channels + c];
                    const double z = (normal * in.weight[c] + in.bias[c]) * factor + in.shift[r * channels + c];
                    out[(r * n + i) * channels + c] = z / (1 + std::exp(-z));
                }
        }
    }
    return out;
}

// Within the rounding of bf16.
void expect_sums(const Doubles& sums, const Doubles& own, const Doubles& other) {
    for (std::size_t i = 0; i < sums.size(); ++i)
        if (!(std::abs(sums[i] - own[i] - other[i]) <= 8e-3 * (std::abs(own[i]) + std::abs(other[i]))))
            std::fprintf(stderr, "gradient %.7g with another of %.7g: %.7g\n", own[i], other[i], sums[i]), std::exit(1);
}

template <class T>
void check(NormKind kind, int64_t batch, int64_t regions, int64_t cu, int64_t cs, int64_t n, int64_t groups, bool shared,
           float steepness) {
    const int64_t rows = batch * regions, channels = cu + cs;
    const bool with_masks = regions > 1 || kind == NormKind::masked_group, pixel = kind == NormKind::pixel;
    const auto u = random_numbers<T>((shared ? batch : rows) * n * cu, 99, 101), skip = random_numbers<T>(batch * n * cs, -1, 1);
    const auto masks = random_numbers(with_masks ? rows * n : 0, 0, 1), weight = random_numbers(channels, 0, steepness),
               bias = random_numbers(channels, 0, 1);
    const auto modulation = random_numbers<T>(rows * 2 * channels, -1, 1);  // scale and shift of a row beside each other
    const NormProblem p{u.data(), cs ? skip.data() : nullptr, with_masks ? masks.data() : nullptr, weight.data(),
                        bias.data(), modulation.data(), modulation.data() + channels, 2 * channels, batch, regions, cu, cs,
                        n, groups, kind, shared, true, sizeof(T) == 2, sizeof(T) == 2, 1e-3f, 1e-3f};
    std::vector<T> out(rows * n * channels);
    Floats moments((pixel ? 0 : kind == NormKind::masked_group ? 3 : 2) * rows * groups);
    norm_silu_forward(p, out.data(), moments.data(), 2);

    Inputs inputs{widened(u), widened(skip), widened(masks), {}, {}, widened(weight), widened(bias)};
    for (int64_t i = 0; i < rows * 2 * channels; ++i)
        (i / channels % 2 ? inputs.shift : inputs.scale).push_back(to_float(modulation[i]));
    const Doubles wanted = reference(p, inputs), found = widened(out);
    for (std::size_t i = 0; i < wanted.size(); ++i)
        if (!(std::abs(found[i] - wanted[i]) <= (sizeof(T) == 2 ? 8e-3 : 2e-4) * (steepness + std::abs(wanted[i]))))
            std::fprintf(stderr, "kind %d: %.7g for %.7g\n", int(kind), found[i], wanted[i]), std::exit(1);

    const auto grad = random_numbers<T>(out.size(), -1, 1);
    std::vector<T> d_u(u.size()), d_skip(skip.size()), d_scale(rows * channels), d_shift(rows * channels);
    Floats d_masks(masks.size()), d_weight(channels), d_bias(channels);
    const auto backward = [&](const T* other_u, const T* other_skip) {
        norm_silu_backward(p, {grad.data(), moments.data(), other_u, other_skip, d_u.data(), cs ? d_skip.data() : nullptr,
                               with_masks ? d_masks.data() : nullptr, d_weight.data(), d_bias.data(), d_scale.data(),
                               d_shift.data()}, 2);
    };
    const auto other_u = random_numbers<T>(u.size(), -1, 1), other_skip = random_numbers<T>(skip.size(), -1, 1);
    backward(other_u.data(), cs ? other_skip.data() : nullptr);
    const Doubles sums_u = widened(d_u), sums_skip = widened(d_skip);
    backward(nullptr, nullptr);
    expect_sums(sums_u, widened(d_u), widened(other_u));
    expect_sums(sums_skip, widened(d_skip), widened(other_skip));
    const Inputs gradients{widened(d_u), widened(d_skip), widened(d_masks), widened(d_scale), widened(d_shift),
                           widened(d_weight), widened(d_bias)};
    // Along one random direction for each input, against the difference quotient.
    for (const auto& input : kDifferentiable) {
        const Doubles &gradient = gradients.*input, &values = inputs.*input;
        const auto direction = random_numbers(values.size(), -1, 1);
        Inputs ahead = inputs, behind = inputs;
        double along = 0, square = 0, quotient = 0;
        for (std::size_t i = 0; i < values.size(); ++i) {
            (ahead.*input)[i] += 1e-5 * direction[i];
            (behind.*input)[i] -= 1e-5 * direction[i];
            along += gradient[i] * direction[i], square += gradient[i] * gradient[i];
        }
        const Doubles after = reference(p, ahead), before = reference(p, behind);
        for (std::size_t i = 0; i < after.size(); ++i) quotient += to_float(grad[i]) * (after[i] - before[i]) / 2e-5;
        if (!(std::abs(along - quotient) <= (sizeof(T) == 2 ? 0.02 : 2e-3) * (1e-2 + std::sqrt(square))))
            std::fprintf(stderr, "kind %d, input %td: derivative %.7g for %.7g\n", int(kind), &input - kDifferentiable, along, quotient), std::exit(1);
    }
}

int main() {
    for (NormKind kind : {NormKind::group, NormKind::masked_group, NormKind::pixel})
        for (const auto& [cu, cs, groups] : {std::array<int64_t, 3>{3, 0, 1}, {16, 16, 4}, {24, 25, 7}})
            for (int64_t n : {1, 66})
                for (bool shared : {false, true}) {
                    check<float>(kind, 2, 2, cu, cs, n, groups, shared, 1);
                    check<bf16>(kind, 2, 2, cu, cs, n, groups, shared, 1);
                    if (!shared) check<float>(kind, 3, 1, cu, cs, n, groups, false, 1);
                }
    for (NormKind kind : {NormKind::group, NormKind::pixel}) check<float>(kind, 2, 2, 16, 16, 66, 4, false, 300);
    std::puts("passed");
}
