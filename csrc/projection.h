// The whole shortcut of a decoder block, where products are few: W [u_k ; m_k * skip] + b + residual_k of every branch k. The
// concatenation is never stored, and W_skip skip is computed once for all branches.
#pragma once

#include <cstdint>

namespace factorkit {

// Features lie channels last, all of one dtype. Branch k of image b is row b * regions + k.
struct ProjectionProblem {
    const void* u;         // [batch * regions, pixels, channels_u], or [batch, ...] if u_shared
    const void* skip;      // [batch, pixels, channels_skip]
    const float* masks;    // [batch, regions, pixels], null for ones and one branch
    const float* weight;   // [channels_out, channels_u + channels_skip]
    const float* bias;     // [channels_out]
    const void* residual;  // like the output, or null
    std::int64_t batch, regions, channels_u, channels_skip, channels_out, pixels;
    bool u_shared;
    bool is_bf16;  // of the features and their gradients; else float
};

struct ProjectionGradients {
    const void* on_out;  // upstream, like the output; it is the residual's gradient too
    void* u;             // like u
    void* skip;          // like skip
    float* masks;        // like masks, null without
    float* weight;       // like weight
    float* bias;         // like bias
};

void projection_forward(const ProjectionProblem& problem, void* out, int threads);  // [batch * regions, pixels, channels_out]
void projection_backward(const ProjectionProblem& problem, const ProjectionGradients& gradients, int threads);

}  // namespace factorkit
