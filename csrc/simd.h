// Arithmetic that the compiler can vectorise, and the loop over threads; shared by the CPU implementations.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

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

// Runs body(begin, end) over [0, count) in as many contiguous pieces as there are threads.
inline void parallel_for(std::int64_t count, int threads, const std::function<void(std::int64_t, std::int64_t)>& body) {
    std::int64_t pieces = std::min<std::int64_t>(count, std::max(1, threads));
    if (pieces <= 1) {
        if (count > 0) body(0, count);
        return;
    }
    std::vector<std::thread> workers;
    for (std::int64_t i = 1; i < pieces; ++i)
        workers.emplace_back(body, count * i / pieces, count * (i + 1) / pieces);
    body(0, count / pieces);
    for (std::thread& worker : workers) worker.join();
}

// The same where the work per index varies, as over ragged rays: threads take the next `block` indices when they are
// free.
inline void parallel_for_uneven(std::int64_t count, std::int64_t block, int threads,
                                const std::function<void(std::int64_t, std::int64_t)>& body) {
    const std::int64_t blocks = (count + block - 1) / block;
    std::atomic<std::int64_t> next{0};
    parallel_for(std::min<std::int64_t>(blocks, std::max(1, threads)), threads, [&](std::int64_t, std::int64_t) {
        for (std::int64_t i = next++; i < blocks; i = next++) body(i * block, std::min(count, (i + 1) * block));
    });
}

}  // namespace factorkit
