// Arithmetic that the compiler can vectorise, shared by the CPU implementations.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "half.h"

// One copy of a function for each instruction set, chosen when the module is loaded. Needs ifunc: GCC on Linux.
#if defined(FACTORKIT_CLONES)  // tests that compile a program of their own want one copy
#elif defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FACTORKIT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define FACTORKIT_LEVELS
#else
#define FACTORKIT_CLONES
#endif
#ifndef FACTORKIT_LANES
#define FACTORKIT_LANES 8  // floats in a vector of run_baseline; tests set 16, as AVX-512 has
#endif
#define FACTORKIT_INLINE inline __attribute__((always_inline))
#define FACTORKIT_INLINE_LAMBDA __attribute__((always_inline))  // a lambda is compiled for the baseline unless inlined
#pragma GCC diagnostic ignored "-Wpsabi"                        // on how vectors are passed: none is, all is inlined

namespace factorkit {

// N floats and their bits. The compiler splits vectors that are longer than the registers.
template <int N>
struct VectorTypes {
    typedef float Floats __attribute__((vector_size(4 * N)));  // GCC ignores the attribute in a using declaration
    typedef std::uint32_t Bits __attribute__((vector_size(4 * N)));
    typedef std::int32_t Integers __attribute__((vector_size(4 * N)));
    typedef std::uint16_t Halves __attribute__((vector_size(2 * N)));
};
constexpr std::int64_t kLanes = 8;
using Lanes = VectorTypes<kLanes>::Floats;  // one AVX register
template <class V>
constexpr std::int64_t kLanesOf = sizeof(V) / sizeof(float);
template <class V>
using BitsOf = typename VectorTypes<kLanesOf<V>>::Bits;
template <class V>
using HalvesOf = typename VectorTypes<kLanesOf<V>>::Halves;

template <class To, class From>
FACTORKIT_INLINE To same_bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class V = Lanes>
FACTORKIT_INLINE V load_lanes(const float* from) {
    V x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
template <class V = Lanes>
FACTORKIT_INLINE V load_lanes(const bf16* from) {
#ifdef FACTORKIT_LEVELS
    if constexpr (kLanesOf<V> == 16) {  // AVX-512: GCC 12 converts in five instructions
        struct Sixteen {
            bf16 values[16];
        };
        BitsOf<V> wide;
        asm("vpmovzxwd %1, %0" : "=v"(wide) : "m"(*reinterpret_cast<const Sixteen*>(from)));
        return same_bits<V>(wide << 16);
    }
#endif
    HalvesOf<V> bits;
    std::memcpy(&bits, from, sizeof bits);
    return same_bits<V>(__builtin_convertvector(bits, BitsOf<V>) << 16);
}
template <class V>
FACTORKIT_INLINE void store_lanes(V x, float* to) {
    std::memcpy(to, &x, sizeof x);
}
template <class V>
FACTORKIT_INLINE void store_lanes(V x, bf16* to) {  // as store() in half.h
    const BitsOf<V> wide = same_bits<BitsOf<V>>(x), rounded = wide + 0x7FFFu + ((wide >> 16) & 1u);
    const HalvesOf<V> bits = __builtin_convertvector((x != x ? (wide | 0x400000u) : rounded) >> 16, HalvesOf<V>);
    std::memcpy(to, &bits, sizeof bits);
}

// bf16 that the processor itself rounds to (AVX512-BF16; subnormals become zero), for run_avx512_bf16.
struct rounded_bf16 : bf16 {};
template <class V>
FACTORKIT_INLINE void store_lanes(V x, rounded_bf16* to) {
#ifdef FACTORKIT_LEVELS
    if constexpr (kLanesOf<V> == 16) {
        HalvesOf<V> bits;
        asm("vcvtneps2bf16 %1, %0" : "=v"(bits) : "v"(x));
        std::memcpy(to, &bits, sizeof bits);
        return;
    }
#endif
    store_lanes(x, static_cast<bf16*>(to));
}

// exp for |x| <= 40: with Cephes' polynomial of degree 6 to about one unit in the last place; where T has 16 bits with the
// one of degree 3 whose greatest relative error is least, to 8e-5. The bits of `shifted` end in the integer n, which is added
// to the exponent: no result is near the ends of the range.
template <class T = float, class V>
FACTORKIT_INLINE V exp_in_range(V x) {
    const V shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    V p;
    if constexpr (sizeof(T) == 2) {
        const V r = x - n * 0.693147181f;
        p = 1.65668226e-1f * r + 5.04964255e-1f;
        p = (p * r + 1.00016425f) * r + 9.99928045e-1f;
    } else {
        const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
        p = 1.9875691500e-4f * r + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        p = p * (r * r) + (r + 1.0f);
    }
    return same_bits<V>(same_bits<BitsOf<V>>(p) + (same_bits<BitsOf<V>>(shifted) << 23));
}

// 1 / x for 1 <= x < 1e18, with AVX-512 from the processor's estimate: to 6e-5 where T has 16 bits, else by one step of
// Newton's method to about one unit in the last place.
template <class T, class V>
FACTORKIT_INLINE V reciprocal(V x) {
#ifdef FACTORKIT_LEVELS
    if constexpr (kLanesOf<V> == 16) {
        V y;
        asm("vrcp14ps %1, %0" : "=v"(y) : "v"(x));
        if constexpr (sizeof(T) == 2) return y;
        return y + y * (1.0f - x * y);
    }
#endif
    return 1.0f / x;
}

// The same; beyond 40 the value at the end of that range.
template <class V>
FACTORKIT_INLINE V fast_exp(V x) {
    x = x < -40.0f ? V{} - 40.0f : x;
    return exp_in_range(x > 40.0f ? V{} + 40.0f : x);
}

// x with at most 40 as its absolute value; NaN gives some number.
template <class V>
FACTORKIT_INLINE V clamp_to_range(V x) {
#ifdef FACTORKIT_LEVELS
    if constexpr (kLanesOf<V> == 16) {  // AVX-512: the lesser absolute value, with the sign of x
        V y;
        asm("vrangeps $2, %2, %1, %0" : "=v"(y) : "v"(x), "v"(V{} + 40.0f));
        return y;
    }
#endif
    // As integers, one instruction for each bound: unsigned, negative floats are above the positive ones; signed, below.
    using Integers = typename VectorTypes<kLanesOf<V>>::Integers;
    const BitsOf<V> bits = same_bits<BitsOf<V>>(x), lowest = same_bits<BitsOf<V>>(V{} - 40.0f);
    const Integers above = same_bits<Integers>(bits < lowest ? bits : lowest);
    const Integers highest = same_bits<Integers>(V{} + 40.0f);
    return same_bits<V>(above < highest ? above : highest);
}

// Of NaN some number: callers multiply by x.
template <class T, class V>
FACTORKIT_INLINE V sigmoid(V x) {
    return reciprocal<T>(1.0f + exp_in_range<T>(-clamp_to_range(x)));
}

template <class V>
FACTORKIT_INLINE float sum_lanes(V x) {
    for (std::int64_t half = kLanesOf<V> / 2; half > 0; half /= 2)
        for (std::int64_t i = 0; i < half; ++i) x[i] += x[i + half];
    return x[0];
}

// Adds to a sum of as many lanes or more.
template <class V, class W>
FACTORKIT_INLINE void add_lanes(V& sum, W x) {
    if constexpr (std::is_same<V, W>::value) {
        sum += x;
    } else {
        V wide = {};
        std::memcpy(&wide, &x, sizeof x);
        sum += wide;
    }
}

// A vector of a row of numbers from `at` on, of which only the first `lanes` are there, unless `Whole`.
template <class V, bool Whole>
struct Pack {
    using Floats = V;
    static constexpr bool kWhole = Whole;
    std::int64_t at, lanes;

    template <class T>
    FACTORKIT_INLINE V load(const T* row) const {
        if (Whole) return load_lanes<V>(row + at);
        T whole[kLanesOf<V>] = {};
        std::memcpy(whole, row + at, lanes * sizeof(T));
        return load_lanes<V>(whole);
    }
    template <class T>
    FACTORKIT_INLINE void store(V x, T* row) const {
        if (Whole) return store_lanes(x, row + at);
        T whole[kLanesOf<V>];
        store_lanes(x, whole);
        std::memcpy(row + at, whole, lanes * sizeof(T));
    }
};

// Calls run(pack) for packs that cover a row of `width` numbers: vectors V, then shorter ones for what is left.
template <class V = Lanes, class Run>
FACTORKIT_INLINE void for_packs(std::int64_t width, const Run& run) {
    std::int64_t at = 0;
    for (; at + kLanesOf<V> <= width; at += kLanesOf<V>) run(Pack<V, true>{at, kLanesOf<V>});
    if constexpr (kLanesOf<V> > kLanes) {
        if (at + kLanes <= width) {
            run(Pack<Lanes, true>{at, kLanes});
            at += kLanes;
        }
    }
    if (at < width) run(Pack<Lanes, false>{at, width - at});
}

// Calls run(scaled, weighted) with constants for the two decisions, so that a loop in it decides nothing. A vector that
// is not whole, which is rare, is always scaled and weighted, by ones if need be.
template <class Pack, class Run>
FACTORKIT_INLINE void with_factors(Pack, bool scaled, bool weighted, const Run& run) {
    if (weighted || !Pack::kWhole)
        run(std::true_type{}, std::true_type{});
    else if (scaled)
        run(std::true_type{}, std::false_type{});
    else
        run(std::false_type{}, std::false_type{});
}

// --- vectors as long as the registers of the processor ---
// Run::run<V, B>(arguments...) for the V that fits and the bf16 that is rounded best, compiled for that instruction set.

template <class Run, class... Arguments>
void run_baseline(const Arguments&... arguments) {
    Run::template run<VectorTypes<FACTORKIT_LANES>::Floats, bf16>(arguments...);
}

#ifdef FACTORKIT_LEVELS
template <class Run, class... Arguments>
__attribute__((target("avx2,fma,bmi2"))) void run_avx2(const Arguments&... arguments) {
    Run::template run<VectorTypes<8>::Floats, bf16>(arguments...);
}
template <class Run, class... Arguments>
__attribute__((target("avx2,fma,bmi2,avx512f,avx512bw,avx512cd,avx512dq,avx512vl"))) void run_avx512(const Arguments&... arguments) {
    Run::template run<VectorTypes<16>::Floats, bf16>(arguments...);
}
template <class Run, class... Arguments>
__attribute__((target("avx2,fma,bmi2,avx512f,avx512bw,avx512cd,avx512dq,avx512vl"))) void run_avx512_bf16(const Arguments&... arguments) {
    Run::template run<VectorTypes<16>::Floats, rounded_bf16>(arguments...);
}

// 1: run_avx2 can run, 2: run_avx512, 3: run_avx512_bf16; at most what FACTORKIT_SIMD_LEVEL says, which tests set.
inline int instruction_level() {
    const auto has = [](auto... present) { return (... && present); };
    int level = 0;
    if (has(__builtin_cpu_supports("avx2"), __builtin_cpu_supports("fma"), __builtin_cpu_supports("bmi2"))) level = 1;
    if (level && has(__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"), __builtin_cpu_supports("avx512cd"),
                     __builtin_cpu_supports("avx512dq"), __builtin_cpu_supports("avx512vl")))
        level = __builtin_cpu_supports("avx512bf16") ? 3 : 2;
    const char* most = std::getenv("FACTORKIT_SIMD_LEVEL");
    return most ? std::min(level, std::atoi(most)) : level;
}
#endif

template <class Run, class... Arguments>
void run_fastest(const Arguments&... arguments) {
#ifdef FACTORKIT_LEVELS
    static const int level = instruction_level();
    if (level == 3) return run_avx512_bf16<Run>(arguments...);
    if (level == 2) return run_avx512<Run>(arguments...);
    if (level == 1) return run_avx2<Run>(arguments...);
#endif
    run_baseline<Run>(arguments...);
}

}  // namespace factorkit
