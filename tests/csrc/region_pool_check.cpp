// Runs the region tokens on odd sizes, every array a heap block of exactly its size, so that sanitizers see any foreign
// access; values must agree with sums in double.
#include "region_pool.h"

#include <cstdio>
#include <vector>

#include "random_numbers.h"

template <class T>
void check(int64_t batch, int64_t regions, int64_t channels, int64_t n) {
    const auto features = random_numbers<T>(batch * n * channels);
    const auto masks = random_numbers(batch * regions * n, 0, 1), grad = random_numbers(batch * regions * channels);
    Floats tokens(grad.size()), d_masks(masks.size());
    std::vector<T> d_features(features.size());
    const PoolProblem p{features.data(), masks.data(), batch, regions, channels, n, sizeof(T) == 2, 0.5f};
    region_pool_forward(p, tokens.data(), 2);
    region_pool_backward(p, {tokens.data(), grad.data(), d_features.data(), d_masks.data()}, 2);
    const auto feature_at = [&](int64_t b, int64_t i, int64_t c) { return (b * n + i) * channels + c; };
    for (int64_t b = 0; b < batch; ++b) {
        std::vector<double> area(regions, 0.5), mean(regions * channels), offset(regions);
        for (int64_t k = 0; k < regions; ++k) {
            for (int64_t i = 0; i < n; ++i) area[k] += masks[(b * regions + k) * n + i];
            for (int64_t c = 0; c < channels; ++c) {
                double& sum = mean[k * channels + c];
                for (int64_t i = 0; i < n; ++i)
                    sum += masks[(b * regions + k) * n + i] * double(to_float(features[feature_at(b, i, c)])) / area[k];
                agree(tokens[(b * regions + k) * channels + c], sum, "token");
                offset[k] += grad[(b * regions + k) * channels + c] * sum;
            }
        }
        for (int64_t i = 0; i < n; ++i) {
            std::vector<double> on_masks(regions);
            for (int64_t c = 0; c < channels; ++c) {
                double on_feature = 0;
                for (int64_t k = 0; k < regions; ++k) {
                    const double g = grad[(b * regions + k) * channels + c] / area[k];
                    on_feature += masks[(b * regions + k) * n + i] * g;
                    on_masks[k] += g * to_float(features[feature_at(b, i, c)]);
                }
                agree(d_features[feature_at(b, i, c)], on_feature, "gradient of a feature");
            }
            for (int64_t k = 0; k < regions; ++k)
                agree(d_masks[(b * regions + k) * n + i], on_masks[k] - offset[k] / area[k], "gradient of a mask");
        }
    }
}

int main() {
    for (int64_t regions : {1, 2, 5})
        for (int64_t channels : {8, 13, 16, 41, 300})
            for (int64_t n : {1, 15, 67, 600}) {
                check<float>(1, regions, channels, n);
                check<bf16>(3, regions, channels, n);
            }
    std::puts("passed");
}
