// Runs the region ops on odd sizes, every array a heap block of exactly its size, so that sanitizers see any foreign
// access; values must agree with sums in double.
#include "region.h"

#include <cstdio>
#include <vector>

#include "random_numbers.h"

template <class T>
void check_blend(int64_t batch, int64_t regions, int64_t channels, int64_t n, bool last) {
    const auto logits = random_numbers(batch * regions * n), on_masks = random_numbers(batch * regions * n);
    const auto on_prediction = random_numbers(batch * channels * n);
    const auto branches = random_numbers<T>(batch * regions * channels * n);
    Floats masks(logits.size()), prediction(on_prediction.size()), d_logits(logits.size());
    std::vector<T> d_branches(branches.size());
    const BlendProblem p{logits.data(), branches.data(), batch, regions, channels, n, last, sizeof(T) == 2};
    region_blend_forward(p, masks.data(), prediction.data(), 2);
    region_blend_backward(
        p, {masks.data(), on_masks.data(), on_prediction.data(), d_logits.data(), d_branches.data()}, 2);
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t i = 0; i < n; ++i) {
            const auto mask_at = [&](int64_t k) { return (b * regions + k) * n + i; };
            const auto out_at = [&](int64_t c) { return (b * channels + c) * n + i; };
            const auto branch_at = [&](int64_t k, int64_t c) {
                return last ? ((b * regions + k) * n + i) * channels + c : ((b * regions + k) * channels + c) * n + i;
            };
            std::vector<double> m(regions), on(regions);
            double total = 0, mean = 0;
            for (int64_t k = 0; k < regions; ++k) total += m[k] = std::exp(double(logits[mask_at(k)]));
            for (int64_t k = 0; k < regions; ++k) {
                m[k] /= total;
                on[k] = on_masks[mask_at(k)];
                agree(masks[mask_at(k)], m[k], "mask");
                for (int64_t c = 0; c < channels; ++c) {
                    on[k] += double(on_prediction[out_at(c)]) * to_float(branches[branch_at(k, c)]);
                    agree(d_branches[branch_at(k, c)], on_prediction[out_at(c)] * m[k], "gradient of a branch");
                }
                mean += m[k] * on[k];
            }
            for (int64_t k = 0; k < regions; ++k) agree(d_logits[mask_at(k)], m[k] * (on[k] - mean), "gradient of a logit");
            for (int64_t c = 0; c < channels; ++c) {
                double sum = 0;
                for (int64_t k = 0; k < regions; ++k) sum += m[k] * to_float(branches[branch_at(k, c)]);
                agree(prediction[out_at(c)], sum, "prediction");
            }
        }
}

template <class T>
void check_pyramid(int64_t batch, int64_t regions, int64_t height, int64_t width, int levels) {
    std::vector<std::vector<T>> values, grads;
    std::vector<Planes> forward, backward;
    for (int l = 0; l <= levels; ++l) {
        const int64_t plane = (height >> l) * (width >> l);
        values.push_back(random_numbers<T>(batch * regions * plane));
        grads.push_back(random_numbers<T>(batch * regions * plane));
        forward.push_back({values.back().data(), regions * plane, plane});
        backward.push_back({grads.back().data(), regions * plane, plane});
    }
    const PyramidProblem p{batch, regions, height, width, levels, sizeof(T) == 2};
    mask_pyramid_forward(p, forward.data(), 2);
    mask_pyramid_backward(p, backward.data(), 2);
    for (int64_t j = 0; j < batch * regions; ++j)
        for (int64_t y = 0; y < height; ++y)
            for (int64_t x = 0; x < width; ++x) {
                double total = 0;
                for (int l = 1; l <= levels; ++l) {
                    const int64_t w = width >> l, size = int64_t(1) << l, at = j * (height >> l) * w + (y >> l) * w + (x >> l);
                    total += to_float(grads[l][at]) / double(size * size);
                    double sum = 0;
                    for (int64_t i = 0; i < size * size; ++i)
                        sum += to_float(values[0][(j * height + (y >> l) * size + i / size) * width + (x >> l) * size + i % size]);
                    agree(values[l][at], sum / double(size * size), "average");
                }
                agree(grads[0][(j * height + y) * width + x], total, "gradient of a mask");
            }
}

int main() {
    for (int64_t regions : {1, 2, 5})
        for (int64_t channels : {1, 3, 4, 6})
            for (int64_t n : {1, 63, 64, 130})
                for (bool last : {false, true}) {
                    check_blend<float>(2, regions, channels, n, last);
                    check_blend<bf16>(1, regions, channels, n, last);
                }
    for (int levels : {1, 2, 3}) {
        check_pyramid<float>(2, 3, 8, 24, levels);
        check_pyramid<bf16>(1, 2, 16, 8, levels);
    }
    check_pyramid<float>(1, 1, 2, 2, 1);
    std::puts("passed");
}
