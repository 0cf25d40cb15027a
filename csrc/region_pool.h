// The region tokens: averages of the features over each region.
#pragma once

#include <cstdint>

namespace factorkit {

struct PoolProblem {
    const void* features;  // [batch, pixels, channels]
    const float* masks;    // [batch, regions, pixels]
    std::int64_t batch, regions, channels, pixels;  // at least 8 channels
    bool is_bf16;  // of the features and their gradient; else float
    float floor;   // added to a region's area
};

struct PoolGradients {
    const float* tokens;     // of the forward pass
    const float* on_tokens;  // upstream, like tokens
    void* features;          // like features
    float* masks;            // like masks
};

// tokens [batch, regions, channels] = sum_p m_k f / (sum_p m_k + floor)
void region_pool_forward(const PoolProblem& problem, float* tokens, int threads);
void region_pool_backward(const PoolProblem& problem, const PoolGradients& gradients, int threads);

}  // namespace factorkit
