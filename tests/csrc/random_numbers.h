// Random numbers, and their comparison, for the programs that run ops under sanitizers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
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

// Ends the program where they differ.
template <class T>
void agree(const T& got, double want, const char* what) {
    if (std::abs(to_float(got) - want) <= (sizeof(T) == 2 ? 1e-2 : 1e-5) * (1 + std::abs(want))) return;
    std::fprintf(stderr, "%s: %.7g for %.7g\n", what, double(to_float(got)), want);
    std::exit(1);
}
