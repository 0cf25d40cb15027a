// Random numbers that are a function of (seed, ray, step) alone: the same on every device, in any order of work.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace factorkit {

// pcg4d (Jarzynski & Olano 2020, "Hash functions for GPU rendering"): its first word's upper 24 bits, as a number in
// [0, 1).
FACTORKIT_HOST_DEVICE float counter_uniform(std::uint64_t seed, std::uint64_t ray, std::uint64_t step) {
    std::uint32_t v[4] = {std::uint32_t(ray), std::uint32_t(step), std::uint32_t(seed), std::uint32_t(seed >> 32)};
    for (int i = 0; i < 4; ++i) v[i] = v[i] * 1664525u + 1013904223u;
    for (int round = 0; round < 2; ++round) {
        v[0] += v[1] * v[3];
        v[1] += v[2] * v[0];
        v[2] += v[0] * v[1];
        v[3] += v[1] * v[2];
        for (int i = 0; i < 4 && round == 0; ++i) v[i] ^= v[i] >> 16;
    }
    return float(v[0] >> 8) * 0x1p-24f;
}

}  // namespace factorkit
