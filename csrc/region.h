// The region masks: their softmax and the blend of the branches, and their averages at lower resolutions.
#pragma once

#include <cstdint>

namespace factorkit {

// Branch k of image b is row b * regions + k of `branches`.
struct BlendProblem {
    const float* logits;   // [batch, regions, pixels]
    const void* branches;  // [batch * regions, pixels, channels] if channels_last, else [batch * regions, channels, pixels]
    std::int64_t batch, regions, channels, pixels;
    bool channels_last;
    bool is_bf16;          // of the branches and their gradient; else float
};

struct BlendGradients {
    const float* masks;          // of the forward pass
    const float* on_masks;       // [batch, regions, pixels], null for zeros
    const float* on_prediction;  // [batch, channels, pixels]
    float* logits;               // like logits
    void* branches;              // like branches
};

// masks [batch, regions, pixels] = softmax of the logits; prediction [batch, channels, pixels] = sum_k masks_k branch_k.
void region_blend_forward(const BlendProblem& problem, float* masks, float* prediction, int threads);
void region_blend_backward(const BlendProblem& problem, const BlendGradients& gradients, int threads);

// Planes [height][width] of floats or bf16, each without gaps.
struct Planes {
    void* data;
    std::int64_t stride_b, stride_k;  // elements from an image to the next, from a region to the next
};

struct PyramidProblem {
    std::int64_t batch, regions, height, width;  // of the masks; both sizes are divisible by 2^levels
    int levels;
    bool is_bf16;
};

// levels[0] are the masks, levels[i] their averages over 2^i x 2^i pixels, which are written. Backward, levels[0] is the
// gradient of the masks, which is written, and levels[i] are the upstream gradients.
void mask_pyramid_forward(const PyramidProblem& problem, const Planes* levels, int threads);
void mask_pyramid_backward(const PyramidProblem& problem, const Planes* levels, int threads);

}  // namespace factorkit
