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

}  // namespace factorkit
