// The 16-bit floats: stored as their bits, computed with as float.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace factorkit {

struct bf16 {  // the upper half of a float
    std::uint16_t bits;
};

struct fp16 {  // IEEE binary16
    std::uint16_t bits;
};

// What values of T are computed and summed in.
template <class T>
struct Wide {
    using type = float;
};
template <>
struct Wide<double> {
    using type = double;
};
template <class T>
using wide_t = typename Wide<T>::type;

FACTORKIT_HOST_DEVICE std::uint32_t float_bits(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

FACTORKIT_HOST_DEVICE float bits_float(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

FACTORKIT_HOST_DEVICE double to_float(double x) { return x; }
FACTORKIT_HOST_DEVICE float to_float(float x) { return x; }
FACTORKIT_HOST_DEVICE float to_float(bf16 x) { return bits_float(std::uint32_t(x.bits) << 16); }

// The exponent moves by the difference of the biases, 112, in a product, which gets the subnormals right too.
FACTORKIT_HOST_DEVICE float to_float(fp16 x) {
    const std::uint32_t scaled = float_bits(bits_float(std::uint32_t(x.bits & 0x7FFFu) << 13) * 0x1p112f);
    const std::uint32_t special = (x.bits & 0x7C00u) == 0x7C00u ? 0x7F800000u : 0u;  // infinity and NaN
    return bits_float(scaled | special | std::uint32_t(x.bits & 0x8000u) << 16);
}

FACTORKIT_HOST_DEVICE void store(double value, double& out) { out = value; }
FACTORKIT_HOST_DEVICE void store(float value, float& out) { out = value; }

// Round to nearest, ties to even. A NaN stays one: its top mantissa bit is set before the carry can clear it.
FACTORKIT_HOST_DEVICE void store(float value, bf16& out) {
    const std::uint32_t wide = float_bits(value);
    const std::uint32_t rounded = wide + 0x7FFFu + ((wide >> 16) & 1u);
    out.bits = std::uint16_t((value != value ? (wide | 0x400000u) : rounded) >> 16);
}

// The same; below 2^-14 the sum with 0.5 rounds to the subnormals' spacing, 2^-24.
FACTORKIT_HOST_DEVICE void store(float value, fp16& out) {
    const std::uint32_t wide = float_bits(value), size = wide & 0x7FFFFFFFu;
    const std::uint32_t normal = (size - (112u << 23) + 0xFFFu + ((size >> 13) & 1u)) >> 13;
    const std::uint32_t tiny = float_bits(bits_float(size) + 0.5f) - 0x3F000000u;
    std::uint32_t bits = size < 0x38800000u ? tiny : normal;
    bits = size >= 0x477FF000u ? 0x7C00u : bits;  // from 65520 on: infinity
    bits = size > 0x7F800000u ? 0x7E00u : bits;
    out.bits = std::uint16_t(bits | ((wide >> 16) & 0x8000u));
}

}  // namespace factorkit
