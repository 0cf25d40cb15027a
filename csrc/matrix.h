// Products of small matrices of floats, whose rows are padded to whole vectors.
#pragma once

#include <vector>

#include "simd.h"

namespace factorkit {

constexpr std::int64_t kRowBlock = 8;  // rows of a product at a time, each in a register or two

inline std::int64_t round_up(std::int64_t x, std::int64_t step) { return (x + step - 1) / step * step; }

// [rows][stride], zeros where nothing was written. Both are padded, for `multiply`.
struct Matrix {
    std::vector<float> values;
    std::int64_t stride = 0;

    void resize(std::int64_t rows, std::int64_t width) {
        stride = round_up(width, 16);
        values.assign(round_up(rows, kRowBlock) * stride, 0.0f);
    }
    float* row(std::int64_t i) { return values.data() + i * stride; }
    const float* row(std::int64_t i) const { return values.data() + i * stride; }
};

template <class V, int C, bool Transposed>
FACTORKIT_INLINE void multiply_block(std::int64_t inner, const float* a, std::int64_t stride_a, const float* b,
                                     std::int64_t stride_b, bool add, float* c, std::int64_t stride_c) {
    V sums[kRowBlock][C] = {};
    if (add)
        for (int i = 0; i < kRowBlock; ++i)
            for (int j = 0; j < C; ++j) sums[i][j] = load_lanes<V>(c + i * stride_c + j * kLanesOf<V>);
    for (std::int64_t l = 0; l < inner; ++l, b += stride_b) {
        V of_b[C];
        for (int j = 0; j < C; ++j) of_b[j] = load_lanes<V>(b + j * kLanesOf<V>);
        for (int i = 0; i < kRowBlock; ++i)
            for (int j = 0; j < C; ++j) sums[i][j] += (Transposed ? a[l * stride_a + i] : a[i * stride_a + l]) * of_b[j];
    }
    for (int i = 0; i < kRowBlock; ++i)
        for (int j = 0; j < C; ++j) store_lanes(sums[i][j], c + i * stride_c + j * kLanesOf<V>);
}

// c = A b, or c += A b, where A [rows][inner] is a, or if `Transposed` lies in a as [inner][rows].
template <class V, bool Transposed = false>
FACTORKIT_INLINE void multiply(std::int64_t rows, std::int64_t inner, const Matrix& a, const Matrix& b, Matrix& c, bool add = false) {
    for (std::int64_t i = 0; i < rows; i += kRowBlock) {
        const float* from = a.values.data() + (Transposed ? i : i * a.stride);
        std::int64_t j = 0;
        if constexpr (kLanesOf<V> == 16)  // AVX-512 has registers for two vectors of each row
            for (; j + 32 <= c.stride; j += 32)
                multiply_block<V, 2, Transposed>(inner, from, a.stride, b.row(0) + j, b.stride, add, c.row(i) + j, c.stride);
        for (; j < c.stride; j += kLanesOf<V>)
            multiply_block<V, 1, Transposed>(inner, from, a.stride, b.row(0) + j, b.stride, add, c.row(i) + j, c.stride);
    }
}

}  // namespace factorkit
