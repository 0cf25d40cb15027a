// The last step of the decoder's shortcut: base_k + m_k * skip + bias + residual_k of every branch k.
#pragma once

#include <cstdint>

namespace factorkit {

// Features are [rows, pixels, channels], all of one dtype. Branch k of image b is row b * regions + k.
struct SkipProblem {
    const void* base;      // [batch * regions, ...], or [batch, ...] if base_shared
    const void* skip;      // [batch, ...]
    const float* masks;    // [batch, regions, pixels]
    const float* bias;     // [channels] or null
    const void* residual;  // [batch * regions, ...] or null
    std::int64_t batch, regions, channels, pixels;  // at least 8 channels
    bool base_shared;
    bool is_bf16;  // of the features and their gradients; else float
};

struct SkipGradients {
    const void* on_out;  // upstream, like the output
    void* base;          // like a shared base, or null: the gradient of a branch's own is the upstream one
    void* skip;          // like skip
    float* masks;        // like masks
};

void masked_skip_add_forward(const SkipProblem& problem, void* out, int threads);  // out [batch * regions, ...]
void masked_skip_add_backward(const SkipProblem& problem, const SkipGradients& gradients, int threads);

}  // namespace factorkit
