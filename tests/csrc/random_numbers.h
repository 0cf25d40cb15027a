// Random numbers for the programs that run ops under sanitizers.
#pragma once

#include <cstdint>
#include <vector>

#include "half.h"

using namespace factorkit;
using std::int64_t;
using Floats = std::vector<float>;

inline std::uint64_t state = 88172645463325252ull;
inline double uniform() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return double(state >> 11) / 9007199254740992.0;
}

template <class T = float>
std::vector<T> random_numbers(int64_t count, double low = -1, double high = 1) {
    std::vector<T> out(count);
    for (T& x : out) store(float(low + (high - low) * uniform()), x);
    return out;
}
