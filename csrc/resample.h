// New steps along rays where weight lies: the inverse of the weights' distribution function (Mildenhall et al. 2020,
// 5.2).
//
// Weight is spread evenly over each given interval. The new edges are the quantiles 0, 1/n, ..., 1; jitter moves each
// inner quantile by up to half a step either way. A ray without weight is divided by length, one without intervals into
// nothing.
#pragma once

#include <cstdint>

#include "counter_rng.h"

namespace factorkit {

template <class S>  // float or double
struct Resample {
    const S *t_start, *t_end, *weights;  // [samples], in order along each ray
    const std::int64_t* offsets;         // [rays + 1], or null: ray r owns the samples from r * per_ray on
    std::int64_t rays, samples, per_ray;
    std::int64_t count;                  // new steps of every ray
    const std::int64_t* seed;            // one number, from 0, where the rays are; or null: no jitter
};

template <class S>
void resample(const Resample<S>& problem, S* edges, int threads);  // edges: [rays, count + 1]

// The same on the current CUDA device. Throws std::runtime_error if a launch fails. In builds with CUDA only.
template <class S>
void resample_cuda(const Resample<S>& problem, S* edges, void* stream);

template <class S>
FACTORKIT_HOST_DEVICE S mass_of(const Resample<S>& p, std::int64_t i, bool by_length) {
    const S mass = by_length ? p.t_end[i] - p.t_start[i] : p.weights[i];
    return mass > S(0) ? mass : S(0);
}

template <class S>
FACTORKIT_HOST_DEVICE void resample_ray(const Resample<S>& p, S* edges, std::int64_t ray) {
    std::int64_t begin = p.offsets ? p.offsets[ray] : ray * p.per_ray;
    std::int64_t end = p.offsets ? p.offsets[ray + 1] : begin + p.per_ray;
    begin = begin < 0 ? 0 : begin;
    end = end > p.samples ? p.samples : end;
    S* out = edges + ray * (p.count + 1);
    const std::uint64_t seed = p.seed ? std::uint64_t(*p.seed) : 0;
    S total = 0;
    for (std::int64_t i = begin; i < end; ++i) total += mass_of(p, i, false);
    const bool by_length = !(total > S(0));
    for (std::int64_t i = begin; i < end && by_length; ++i) total += mass_of(p, i, true);

    // The first and the last interval with any mass bound the new edges.
    while (begin < end && !(mass_of(p, begin, by_length) > S(0))) ++begin;
    while (begin < end && !(mass_of(p, end - 1, by_length) > S(0))) --end;
    std::int64_t i = begin;
    S below = 0, mass = begin < end ? mass_of(p, i, by_length) : S(0);
    for (std::int64_t j = 0; j <= p.count; ++j) {
        if (begin >= end || j == 0 || j == p.count) {
            out[j] = begin >= end ? S(0) : j == 0 ? p.t_start[begin] : p.t_end[end - 1];
            continue;
        }
        const S shift = p.seed ? S(counter_uniform(seed, std::uint64_t(ray), std::uint64_t(j))) - S(0.5) : S(0);
        const S target = (S(j) + shift) / S(p.count) * total;
        while (below + mass < target && i + 1 < end) {
            below += mass;
            mass = mass_of(p, ++i, by_length);
        }
        const S share = mass > S(0) ? (target - below) / mass : S(0);
        const S t = p.t_start[i] + (share < S(1) ? share : S(1)) * (p.t_end[i] - p.t_start[i]);
        out[j] = t < out[j - 1] ? out[j - 1] : t;
    }
}

}  // namespace factorkit
