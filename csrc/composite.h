// Volume rendering (Max 1995; Mildenhall et al. 2020) of packed or dense rays, with the distortion loss of Barron et
// al. 2022: the quadrature of one sample and its gradient, and what walks the rays with them.
//
//   tau_i = sigma_i (t_end_i - t_start_i),  T_i = exp(-sum_{j<i} tau_j),  w_i = T_i (1 - exp(-tau_i))
//   color = sum w_i rgb_i + T_end background,  depth = sum w_i m_i,  opacity = 1 - T_end,  m_i the midpoint
//   distortion = sum_ij w_i w_j |m_i - m_j| + sum_i w_i^2 (t_end_i - t_start_i) / 3
//
// Samples of a ray are in order along it. Those with T_i < early_stop contribute nothing, forward and backward.
#pragma once

#include <cmath>
#include <cstdint>

#include "half.h"

namespace factorkit {

constexpr int kMaxChannels = 32;

template <class T>  // of sigma and rgb: float, bf16, fp16 or double
struct Composite {
    using S = wide_t<T>;
    const T* sigma;               // [samples]
    const T* rgb;                 // [samples, channels]
    const S* t_start;             // [samples]
    const S* t_end;               // [samples]
    const std::int64_t* offsets;  // [rays + 1], or null: ray r owns the samples from r * per_ray on
    const S* background;          // [rays, channels], or [channels] if background_shared, or null for black
    std::int64_t rays, samples, per_ray;
    int channels;
    bool background_shared;
    S early_stop;                 // 0 <= early_stop < 1
};

template <class S>
struct CompositeOutputs {
    S* color;            // [rays, channels]
    S* depth;            // [rays]
    S* opacity;          // [rays]
    S* weights;          // [samples], or null
    S* distortion;       // [rays], or null
    std::int64_t* used;  // [rays]: how many samples of each ray come before the early stop
};

template <class T>
struct CompositeGradients {
    using S = wide_t<T>;
    // Upstream, shaped like the outputs; null for zero.
    const S *color, *depth, *opacity, *weights, *distortion;
    const std::int64_t* used;  // as the forward pass wrote it
    // Outputs, shaped like the inputs; null where not wanted, t_start and t_end both or neither.
    T *sigma, *rgb;
    S *t_start, *t_end;
    S* background;  // [rays, channels]
};

template <class T>
void composite_forward(const Composite<T>& problem, const CompositeOutputs<wide_t<T>>& out, int threads);
template <class T>
void composite_backward(const Composite<T>& problem, const CompositeGradients<T>& gradients, int threads);

// The same on the current CUDA device. Throws std::runtime_error if a launch fails. In builds with CUDA only.
template <class T>
void composite_forward_cuda(const Composite<T>& problem, const CompositeOutputs<wide_t<T>>& out, void* stream);
template <class T>
void composite_backward_cuda(const Composite<T>& problem, const CompositeGradients<T>& gradients, void* stream);

// Where a ray's samples lie. Offsets out of order or range make it short or empty, never a foreign address.
struct Span {
    std::int64_t begin, count;
};

template <class T>
FACTORKIT_HOST_DEVICE Span ray_span(const Composite<T>& p, std::int64_t ray) {
    if (!p.offsets) return {ray * p.per_ray, p.per_ray};
    const std::int64_t begin = p.offsets[ray] < 0 ? 0 : p.offsets[ray];
    const std::int64_t end = p.offsets[ray + 1] > p.samples ? p.samples : p.offsets[ray + 1];
    return {begin, end > begin ? end - begin : 0};
}

// On CUDA 2^lane_bits lanes of a warp share a ray, from 4 to 32: the fewest that hold the mean number of samples.
// Shapes decide, which the host knows without asking the device, so that a launch can be recorded in a graph.
inline int lane_bits(std::int64_t samples, std::int64_t rays) {
    int bits = 2;
    while (bits < 5 && samples > rays << bits) ++bits;
    return bits;
}

// The first sample that belongs to no ray: what lies from here on is written with zeros.
template <class T>
FACTORKIT_HOST_DEVICE std::int64_t tail_begin(const Composite<T>& p) {
    if (!p.offsets) return p.rays * p.per_ray;
    const std::int64_t end = p.offsets[p.rays];
    return end < 0 ? 0 : end > p.samples ? p.samples : end;
}

// Optical depth from which on a ray is stopped; infinite without early stop.
template <class S>
FACTORKIT_HOST_DEVICE S stop_depth(S early_stop) {
    return early_stop > S(0) ? S(-std::log(early_stop)) : S(INFINITY);
}

// Infinite density over no length is nothing.
template <class S>
FACTORKIT_HOST_DEVICE S optical_depth(S sigma, S length) {
    return length == S(0) ? S(0) : sigma * length;
}

template <class S>
struct Attenuation {
    S passed, stopped;  // exp(-tau) and 1 - exp(-tau), each to its own last digits
};

FACTORKIT_HOST_DEVICE Attenuation<double> attenuate(double tau) { return {std::exp(-tau), -std::expm1(-tau)}; }

// exp(x) = 2^n (1 + p) with p = expm1(r), |r| <= ln(2) / 2: one polynomial serves both, and vectorises.
FACTORKIT_HOST_DEVICE Attenuation<float> attenuate(float tau) {
    float x = -tau;
    x = x < -87.0f ? -87.0f : x;
    x = x > 87.0f ? 87.0f : x;
    const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // nearest integer: 1.5 * 2^23 drops the fraction
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;   // x - n ln 2, with ln 2 in two parts
    float q = 1.0f / 5040 * r + 1.0f / 720;
    q = q * r + 1.0f / 120;
    q = q * r + 1.0f / 24;
    q = q * r + 1.0f / 6;
    q = q * r + 0.5f;
    const float p = q * r * r + r;
    const float scale = bits_float(std::uint32_t(std::int32_t(n) + 127) << 23);
    const bool opaque = tau > 87.0f;
    return {opaque ? 0.0f : scale + scale * p, opaque ? 1.0f : (1.0f - scale) - scale * p};
}

// What one sample's inputs owe to d_tau, the gradient of its optical depth, to d_mid and to d_length, those through its
// midpoint and its length alone. Infinite density owes nothing to its length: it is opaque over any, and nothing over
// none.
template <class S>
struct SampleGradient {
    S sigma, t_start, t_end;
};

template <class S>
FACTORKIT_HOST_DEVICE SampleGradient<S> sample_gradient(S sigma, S length, S d_tau, S d_mid, S d_length) {
    const S along = (sigma == S(INFINITY) ? S(0) : d_tau * sigma) + d_length;
    return {d_tau * length, S(0.5) * d_mid - along, S(0.5) * d_mid + along};
}

}  // namespace factorkit
