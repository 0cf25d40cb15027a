// Rows of at least eight channels, in whole vectors, and the sums of eight rows at once.
#pragma once

#include "simd.h"

namespace factorkit {

// The packs of a row have an order of their own ("packed"): two vectors of bf16 are eight words, whose lower halves are
// one vector and the upper halves the other, which needs fewer instructions than vectors of neighbours. Floats by channel
// that meet them are packed too. Of the pack at the end of a row, the first `covered` lanes are in one before as well:
// loads of fewer lanes take several times as long as whole ones.
using Words = std::uint32_t __attribute__((vector_size(4 * kLanes)));
using LaneIndices = std::int32_t __attribute__((vector_size(4 * kLanes)));

template <class T, int V, bool Overlaps>
struct RowPack {
    static constexpr int kVectors = V;
    static constexpr bool kOfWords = V == 2 && sizeof(T) == 2;
    std::int64_t at, packed_at;  // where it begins, in channels and in packed floats
    std::int32_t covered;

    FACTORKIT_INLINE Lanes load(const T* row, int v) const {
        if constexpr (kOfWords) {
            Words words;
            std::memcpy(&words, row + at, sizeof words);
            return same_bits<Lanes>(v == 0 ? words << 16 : words & 0xFFFF0000u);
        } else {
            return load_lanes(row + at + v * kLanes);
        }
    }
    FACTORKIT_INLINE void store(const Lanes (&x)[V], T* row) const {
        if constexpr (kOfWords) {
            const Words words = rounded(x[0]) >> 16 | (rounded(x[1]) & 0xFFFF0000u);
            std::memcpy(row + at, &words, sizeof words);
        } else {
            for (int v = 0; v < V; ++v) store_lanes(x[v], row + at + v * kLanes);
        }
    }
    FACTORKIT_INLINE Lanes load_packed(const float* values, int v) const {
        return load_lanes(values + packed_at + v * kLanes);
    }
    FACTORKIT_INLINE void store_packed(Lanes x, float* values, int v) const {
        store_lanes(x, values + packed_at + v * kLanes);
    }
    // With zeros for the covered lanes: for sums, in which they are already.
    FACTORKIT_INLINE Lanes once(Lanes x) const {
        return Overlaps ? (LaneIndices{0, 1, 2, 3, 4, 5, 6, 7} < covered ? Lanes{} : x) : x;
    }

   private:
    static FACTORKIT_INLINE Words rounded(Lanes x) {  // as store() in half.h
        const Words wide = same_bits<Words>(x);
        return x != x ? (wide | 0x400000u) : wide + 0x7FFFu + ((wide >> 16) & 1u);
    }
};

// Calls run(pack) for packs that cover a row of `width` >= kLanes numbers: two vectors each, then what is left.
template <class T, class Run>
FACTORKIT_INLINE void for_row_packs(std::int64_t width, const Run& run) {
    std::int64_t at = 0;
    for (; at + 2 * kLanes <= width; at += 2 * kLanes) run(RowPack<T, 2, false>{at, at, 0});
    if (at + kLanes <= width) {
        run(RowPack<T, 1, false>{at, at, 0});
        at += kLanes;
    }
    if (at < width) run(RowPack<T, 1, true>{width - kLanes, at, std::int32_t(kLanes - (width - at))});
}

inline std::int64_t packed_size(std::int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

// The channel of packed float i of rows of bf16 or float.
inline std::int64_t channel_at(std::int64_t i, std::int64_t width, bool is_bf16) {
    const std::int64_t lane = i % (2 * kLanes), pair = i - lane;
    if (is_bf16 && pair + 2 * kLanes <= width) return pair + lane % kLanes * 2 + lane / kLanes;
    return i < width / kLanes * kLanes ? i : width - packed_size(width) + i;
}

#if defined(__clang__)
#define FACTORKIT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC has the other one from version 12 on
#define FACTORKIT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, LaneIndices{__VA_ARGS__})
#endif

// Lane i is the sum of the lanes of x[i]. Each round halves the vectors: 14 shuffles in all, where eight sums one by one
// take three shuffles each.
FACTORKIT_INLINE Lanes sum_each(const Lanes (&x)[kLanes]) {
    Lanes halves[4], pairs[2];
    for (int i = 0; i < 4; ++i)  // four lanes of x[i], then four of x[i + 4]
        halves[i] = FACTORKIT_SHUFFLE(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
                    FACTORKIT_SHUFFLE(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    for (int i = 0; i < 2; ++i)  // two lanes each of x[2i], x[2i + 1], x[2i + 4], x[2i + 5]
        pairs[i] = FACTORKIT_SHUFFLE(halves[2 * i], halves[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
                   FACTORKIT_SHUFFLE(halves[2 * i], halves[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return FACTORKIT_SHUFFLE(pairs[0], pairs[1], 0, 2, 8, 10, 4, 6, 12, 14) +
           FACTORKIT_SHUFFLE(pairs[0], pairs[1], 1, 3, 9, 11, 5, 7, 13, 15);
}

#undef FACTORKIT_SHUFFLE

}  // namespace factorkit
