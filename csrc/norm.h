// Norm, modulation and SiLU over [u_k ; m_k * skip], the first half of every residual block. The concatenation is never
// stored.
#pragma once

#include <cstdint>

namespace factorkit {

enum class NormKind { group, masked_group, pixel };  // as NORMS in factorkit/ops/norm.py

// Features lie channels last, as convolutions want them. Branch k of image b is row b * regions + k.
struct NormProblem {
    const void* u;         // [batch * regions, pixels, channels_u], or [batch, ...] if u_shared
    const void* skip;      // [batch, pixels, channels_skip], null without channels_skip
    const float* masks;    // [batch, regions, pixels], null for a plain norm of u and skip
    const float* weight;   // [channels]
    const float* bias;     // [channels]
    const void* scale;     // [rows, channels], null without modulation; float, or bf16 if modulation_is_bf16
    const void* shift;     // like scale
    std::int64_t modulation_stride;  // from a row of the scale, and of the shift, to the next
    std::int64_t batch, regions, channels_u, channels_skip, pixels, groups;
    NormKind kind;
    bool u_shared;
    bool activate;         // SiLU
    bool is_bf16;          // of u, skip, the output and the gradients; else float
    bool modulation_is_bf16;
    float eps;
    float mask_floor;
};

// `moments` are [3 (masked norm) or 2 or 0 (pixel norm), rows, groups]: mean, 1/std and the sum of the pixels' weights.
struct NormGradients {
    const void* grad;        // [rows, pixels, channels]
    const float* moments;    // of the forward pass
    const void* other_u;     // like u: the gradient from what else reads u, which is added; or null
    const void* other_skip;  // like skip, the same
    void* u;                 // like u
    void* skip;              // like skip
    float* masks;            // like masks, null without
    float* weight;           // [channels]
    float* bias;             // [channels]
    void* scale;             // [rows, channels] without gaps, of the modulation's type; null without
    void* shift;             // like scale
};

void norm_silu_forward(const NormProblem& problem, void* out, float* moments, int threads);
void norm_silu_backward(const NormProblem& problem, const NormGradients& gradients, int threads);

}  // namespace factorkit
