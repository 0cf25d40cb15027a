// Arithmetic that the compiler can vectorise, shared by the CPU implementations.
#pragma once

#include <cstdint>
#include <cstring>

#include "half.h"

// One copy of a function for each instruction set, chosen when the module is loaded. Needs ifunc: GCC on Linux.
#if defined(FACTORKIT_CLONES)  // tests that compile a program of their own want one copy
#elif defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FACTORKIT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FACTORKIT_CLONES
#endif
#define FACTORKIT_INLINE inline __attribute__((always_inline))
#define FACTORKIT_INLINE_LAMBDA __attribute__((always_inline))  // a lambda is compiled for the baseline unless inlined
#pragma GCC diagnostic ignored "-Wpsabi"                        // on how vectors are passed: none is, all is inlined

namespace factorkit {

// exp to about one unit in the last place for |x| < 40; beyond, the value at the end of that range. Not 87, where fp32
// ends: a compiler that computes both sides of the clamp would then multiply denormals, a hundred times slower.
FACTORKIT_INLINE float fast_exp(float x) {
    x = x < -40.0f ? -40.0f : x;
    x = x > 40.0f ? 40.0f : x;
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // nearest integer: adding 1.5 * 2^23 drops the fraction
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;   // x - n ln 2, with ln 2 in two parts
    float p = 1.0f / 5040 * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    std::int32_t power = (std::int32_t(n) + 127) << 23;
    float two_n;
    std::memcpy(&two_n, &power, 4);
    return p * two_n;
}

FACTORKIT_INLINE float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

// Eight floats, one AVX register; the compiler splits them where registers are smaller.
constexpr std::int64_t kLanes = 8;
using Lanes = float __attribute__((vector_size(4 * kLanes)));
using IntLanes = std::int32_t __attribute__((vector_size(4 * kLanes)));
using BitLanes = std::uint32_t __attribute__((vector_size(4 * kLanes)));
using HalfLanes = std::uint16_t __attribute__((vector_size(2 * kLanes)));

template <class To, class From>
FACTORKIT_INLINE To same_bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

FACTORKIT_INLINE Lanes load_lanes(const float* from) {
    Lanes x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
FACTORKIT_INLINE Lanes load_lanes(const bf16* from) {
    HalfLanes bits;
    std::memcpy(&bits, from, sizeof bits);
    return same_bits<Lanes>(__builtin_convertvector(bits, BitLanes) << 16);
}
FACTORKIT_INLINE void store_lanes(Lanes x, float* to) { std::memcpy(to, &x, sizeof x); }
FACTORKIT_INLINE void store_lanes(Lanes x, bf16* to) {  // as store() in half.h
    const BitLanes wide = same_bits<BitLanes>(x), rounded = wide + 0x7FFFu + ((wide >> 16) & 1u);
    const HalfLanes bits = __builtin_convertvector((x != x ? (wide | 0x400000u) : rounded) >> 16, HalfLanes);
    std::memcpy(to, &bits, sizeof bits);
}

// exp as above, with Cephes' polynomial of degree 6. The bits of `shifted` end in the integer n, which is added to the
// exponent: within |x| < 40 no result is near the ends of the range.
FACTORKIT_INLINE Lanes fast_exp(Lanes x) {
    x = x < -40.0f ? Lanes{} - 40.0f : x;
    x = x > 40.0f ? Lanes{} + 40.0f : x;
    const Lanes shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Lanes p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    return same_bits<Lanes>(same_bits<BitLanes>(p) + (same_bits<BitLanes>(shifted) << 23));
}

FACTORKIT_INLINE Lanes sigmoid(Lanes x) { return 1.0f / (1.0f + fast_exp(-x)); }

FACTORKIT_INLINE float sum_lanes(Lanes x) {
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// V vectors of a row of numbers from `at` on; of the last one only the first `lanes` are there, unless `Whole`.
template <int V, bool Whole>
struct Pack {
    static constexpr int kVectors = V;
    std::int64_t at, lanes;

    template <class T>
    FACTORKIT_INLINE Lanes load(const T* row, int v) const {
        if (Whole) return load_lanes(row + at + v * kLanes);
        T whole[kLanes] = {};
        std::memcpy(whole, row + at, lanes * sizeof(T));
        return load_lanes(whole);
    }
    template <class T>
    FACTORKIT_INLINE void store(Lanes x, T* row, int v) const {
        if (Whole) return store_lanes(x, row + at + v * kLanes);
        T whole[kLanes];
        store_lanes(x, whole);
        std::memcpy(row + at, whole, lanes * sizeof(T));
    }
};

// Calls run(pack) for packs that cover a row of `width` numbers: two vectors each, then what is left.
template <class Run>
FACTORKIT_INLINE void for_packs(std::int64_t width, const Run& run) {
    std::int64_t at = 0;
    for (; at + 2 * kLanes <= width; at += 2 * kLanes) run(Pack<2, true>{at, kLanes});
    if (at + kLanes <= width) {
        run(Pack<1, true>{at, kLanes});
        at += kLanes;
    }
    if (at < width) run(Pack<1, false>{at, width - at});
}

}  // namespace factorkit
