// Rows of at least eight channels, in whole vectors, and the sums of eight rows at once.
#pragma once

#include "simd.h"

namespace factorkit {

using LaneIndices = std::int32_t __attribute__((vector_size(4 * kLanes)));

// V whole vectors of a row from `at` on. Of the pack at the end of a row, the first `covered` lanes are in the one before
// too: loads of fewer lanes take several times as long as whole ones.
template <int V, bool Overlaps>
struct RowPack {
    static constexpr int kVectors = V;
    std::int64_t at;
    std::int32_t covered;

    template <class T>
    FACTORKIT_INLINE Lanes load(const T* row, int v) const {
        return load_lanes(row + at + v * kLanes);
    }
    template <class T>
    FACTORKIT_INLINE void store(Lanes x, T* row, int v) const {
        store_lanes(x, row + at + v * kLanes);
    }
    // With zeros for the covered lanes: for sums, in which they are already.
    FACTORKIT_INLINE Lanes once(Lanes x) const {
        return Overlaps ? (LaneIndices{0, 1, 2, 3, 4, 5, 6, 7} < covered ? Lanes{} : x) : x;
    }
};

// Calls run(pack) for packs that cover a row of `width` >= kLanes numbers: two vectors each, then what is left.
template <class Run>
FACTORKIT_INLINE void for_row_packs(std::int64_t width, const Run& run) {
    std::int64_t at = 0;
    for (; at + 2 * kLanes <= width; at += 2 * kLanes) run(RowPack<2, false>{at, 0});
    if (at + kLanes <= width) {
        run(RowPack<1, false>{at, 0});
        at += kLanes;
    }
    if (at < width) run(RowPack<1, true>{width - kLanes, std::int32_t(kLanes - (width - at))});
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
