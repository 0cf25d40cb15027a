#include "norm.h"

#include <cmath>

#include "simd.h"
#include "threads.h"

namespace factorkit {
namespace {

using std::int64_t;
using Floats = std::vector<float>;

// One row [pixels][channels] of [u_k ; m_k * skip], less the mean of each group (or over the rms of each pixel), and what
// belongs to it.
template <class T>
struct Row {
    const NormProblem& p;
    const int64_t n, channels, size;  // pixels, channels, channels of a group
    int64_t image = 0, index = 0;
    const float* mask = nullptr;      // of this branch, or null
    Floats x, rstd, slope, offset;    // values; by channel: 1/std, and the pre-activation as x * slope + offset
    Floats share;                     // weight of each pixel in the moments, summing to 1; for the pixel norm, its 1/rms
    float total = 0;                  // what the masks were divided by
    Floats sums;

    explicit Row(const NormProblem& p)
        : p(p), n(p.pixels), channels(p.channels_u + p.channels_skip), size(channels / p.groups), x(n * channels),
          rstd(channels), slope(channels), offset(channels), share(n, 1.0f / n), sums(channels) {}

    FACTORKIT_INLINE void read(int64_t row) {
        index = row;
        image = row / p.regions;
        mask = p.masks ? p.masks + row * n : nullptr;
        if (p.kind == NormKind::masked_group) weigh();
        load();
        if (p.kind == NormKind::pixel)
            normalise_pixels();
        else
            normalise_groups();
        for (int64_t c = 0; c < channels; ++c) {
            const float scale = p.scale ? 1 + p.scale[index * channels + c] : 1.0f;
            slope[c] = p.weight[c] * scale * rstd[c];
            offset[c] = p.bias[c] * scale + (p.shift ? p.shift[index * channels + c] : 0.0f);
        }
    }

    // The mean over each group of what `sums` holds by channel, back into every channel of the group.
    FACTORKIT_INLINE void pool_groups(Floats& by_channel) const {
        for (int64_t g = 0; g < p.groups; ++g) {
            double sum = 0;
            for (int64_t c = g * size; c < (g + 1) * size; ++c) sum += by_channel[c];
            for (int64_t c = g * size; c < (g + 1) * size; ++c) by_channel[c] = float(sum / size);
        }
    }

   private:
    FACTORKIT_INLINE void weigh() {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; ++i) sum += mask[i] + p.mask_floor;
        total = sum;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) share[i] = (mask[i] + p.mask_floor) / total;
    }

    FACTORKIT_INLINE void load() {
        const int64_t cu = p.channels_u, cs = p.channels_skip;
        const T* u = static_cast<const T*>(p.u) + (p.u_shared ? image : index) * n * cu;
        const T* skip = static_cast<const T*>(p.skip) + image * n * cs;
        for (int64_t i = 0; i < n; ++i) {
            float* to = x.data() + i * channels;
            const T *a = u + i * cu, *b = skip + i * cs;
            const float m = mask ? mask[i] : 1.0f;
#pragma omp simd
            for (int64_t c = 0; c < cu; ++c) to[c] = to_float(a[c]);
#pragma omp simd
            for (int64_t c = 0; c < cs; ++c) to[cu + c] = m * to_float(b[c]);
        }
    }

    // Two passes, mean before variance: the row is in cache, and fp32 is spared the cancellation of E[x^2] - E[x]^2.
    FACTORKIT_INLINE void normalise_groups() {
        float* sum = sums.data();
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t i = 0; i < n; ++i) {
            const float* v = x.data() + i * channels;
            const float w = share[i];
#pragma omp simd
            for (int64_t c = 0; c < channels; ++c) sum[c] += w * v[c];
        }
        pool_groups(sums);
        float* square = rstd.data();
        std::fill(rstd.begin(), rstd.end(), 0.0f);
        for (int64_t i = 0; i < n; ++i) {
            float* v = x.data() + i * channels;
            const float w = share[i];
#pragma omp simd
            for (int64_t c = 0; c < channels; ++c) {
                v[c] -= sum[c];
                square[c] += w * v[c] * v[c];
            }
        }
        pool_groups(rstd);
        for (int64_t c = 0; c < channels; ++c) rstd[c] = 1 / std::sqrt(rstd[c] + p.eps);
    }

    FACTORKIT_INLINE void normalise_pixels() {
        std::fill(rstd.begin(), rstd.end(), 1.0f);
        for (int64_t i = 0; i < n; ++i) {
            float* v = x.data() + i * channels;
            float square = 0;
#pragma omp simd reduction(+ : square)
            for (int64_t c = 0; c < channels; ++c) square += v[c] * v[c];
            const float scale = share[i] = 1 / std::sqrt(square / channels + p.eps);
#pragma omp simd
            for (int64_t c = 0; c < channels; ++c) v[c] *= scale;
        }
    }
};

template <class T>
FACTORKIT_INLINE void forward_rows(const NormProblem& p, void* out, int64_t begin, int64_t end) {
    Row<T> row(p);
    const int64_t channels = row.channels;
    for (int64_t r = begin; r < end; ++r) {
        row.read(r);
        const float *slope = row.slope.data(), *offset = row.offset.data();
        for (int64_t i = 0; i < row.n; ++i) {
            const float* x = row.x.data() + i * channels;
            T* y = static_cast<T*>(out) + (r * row.n + i) * channels;
            if (p.activate) {
#pragma omp simd
                for (int64_t c = 0; c < channels; ++c) {
                    float z = x[c] * slope[c] + offset[c];
                    store(z * sigmoid(z), y[c]);
                }
            } else {
#pragma omp simd
                for (int64_t c = 0; c < channels; ++c) store(x[c] * slope[c] + offset[c], y[c]);
            }
        }
    }
}

// Gradients of all branches of the images [begin, end): what branches share is summed here, so no thread meets another.
template <class T>
FACTORKIT_INLINE void backward_images(const NormProblem& p, const NormGradients& d, int64_t begin, int64_t end) {
    Row<T> row(p);
    const int64_t n = p.pixels, channels = row.channels, cu = p.channels_u, cs = p.channels_skip;
    Floats inner(n * channels), first(channels), second(channels);
    const bool masked = p.kind == NormKind::masked_group, pixel = p.kind == NormKind::pixel;
    Floats d_share(masked ? n : 0), d_u(p.u_shared ? n * cu : 0), d_skip(n * cs);
    for (int64_t image = begin; image < end; ++image) {
        std::fill(d_u.begin(), d_u.end(), 0.0f);
        std::fill(d_skip.begin(), d_skip.end(), 0.0f);
        for (int64_t r = image * p.regions; r < (image + 1) * p.regions; ++r) {
            row.read(r);
            const float *slope = row.slope.data(), *offset = row.offset.data();
            float *summed = d.summed + r * channels, *moment = d.moment + r * channels;
            std::fill(summed, summed + channels, 0.0f);
            std::fill(moment, moment + channels, 0.0f);
            for (int64_t i = 0; i < n; ++i) {  // through the activation
                const float* x = row.x.data() + i * channels;
                const T* upstream = static_cast<const T*>(d.grad) + (r * n + i) * channels;
                float* to = inner.data() + i * channels;
                const float on = p.activate ? 1.0f : 0.0f;  // a blend, because a branch would keep the loop scalar
#pragma omp simd
                for (int64_t c = 0; c < channels; ++c) {
                    const float z = x[c] * slope[c] + offset[c], s = sigmoid(z);
                    const float v = to_float(upstream[c]) * (on * s * (1 + z * (1 - s)) + (1 - on));
                    to[c] = v;
                    summed[c] += v;
                    moment[c] += v * x[c];
                }
            }
            // What the moments owe to each value: first + second * x, spread over the pixels by their share.
            for (int64_t c = 0; c < channels; ++c) {
                first[c] = slope[c] * summed[c];
                second[c] = slope[c] * moment[c];
            }
            row.pool_groups(first);
            row.pool_groups(second);
            for (int64_t c = 0; c < channels; ++c) {
                first[c] = -first[c];
                second[c] *= -row.rstd[c] * row.rstd[c];
                moment[c] *= row.rstd[c];
            }
            float* d_mask = d.masks ? d.masks + r * n : nullptr;
            for (int64_t i = 0; i < n; ++i) {
                const float* x = row.x.data() + i * channels;
                float* v = inner.data() + i * channels;
                const float w = row.share[i];
                float along = 0;
                if (pixel) {
#pragma omp simd reduction(+ : along)
                    for (int64_t c = 0; c < channels; ++c) along += v[c] * slope[c] * x[c];
                    along /= channels;
#pragma omp simd
                    for (int64_t c = 0; c < channels; ++c) v[c] = w * (v[c] * slope[c] - along * x[c]);
                } else {
#pragma omp simd reduction(+ : along)
                    for (int64_t c = 0; c < channels; ++c) {
                        along += (first[c] + 0.5f * second[c] * x[c]) * x[c];
                        v[c] = v[c] * slope[c] + (first[c] + second[c] * x[c]) * w;
                    }
                }
                if (masked) d_share[i] = along;
                if (p.u_shared) {
                    float* to = d_u.data() + i * cu;
#pragma omp simd
                    for (int64_t c = 0; c < cu; ++c) to[c] += v[c];
                } else {
                    T* to = static_cast<T*>(d.u) + (r * n + i) * cu;
#pragma omp simd
                    for (int64_t c = 0; c < cu; ++c) store(v[c], to[c]);
                }
                const T* s = static_cast<const T*>(p.skip) + (image * n + i) * cs;
                float* to = d_skip.data() + i * cs;
                const float m = row.mask ? row.mask[i] : 1.0f;
                float product = 0;
#pragma omp simd reduction(+ : product)
                for (int64_t c = 0; c < cs; ++c) {
                    to[c] += m * v[cu + c];
                    product += to_float(s[c]) * v[cu + c];
                }
                if (d_mask) d_mask[i] = product;
            }
            if (masked) {  // through share = (mask + floor) / total
                float along = 0;
#pragma omp simd reduction(+ : along)
                for (int64_t i = 0; i < n; ++i) along += d_share[i] * row.share[i];
#pragma omp simd
                for (int64_t i = 0; i < n; ++i) d_mask[i] += (d_share[i] - along) / row.total;
            }
        }
        T* u = static_cast<T*>(d.u) + image * n * cu;
        for (std::size_t i = 0; i < d_u.size(); ++i) store(d_u[i], u[i]);
        T* skip = static_cast<T*>(d.skip) + image * n * cs;
        for (std::size_t i = 0; i < d_skip.size(); ++i) store(d_skip[i], skip[i]);
    }
}

}  // namespace

FACTORKIT_CLONES void forward_float(const NormProblem& p, void* out, int64_t begin, int64_t end) {
    forward_rows<float>(p, out, begin, end);
}
FACTORKIT_CLONES void forward_bf16(const NormProblem& p, void* out, int64_t begin, int64_t end) {
    forward_rows<bf16>(p, out, begin, end);
}
FACTORKIT_CLONES void backward_float(const NormProblem& p, const NormGradients& d, int64_t begin, int64_t end) {
    backward_images<float>(p, d, begin, end);
}
FACTORKIT_CLONES void backward_bf16(const NormProblem& p, const NormGradients& d, int64_t begin, int64_t end) {
    backward_images<bf16>(p, d, begin, end);
}

void norm_silu_forward(const NormProblem& p, void* out, int threads) {
    auto run = p.is_bf16 ? forward_bf16 : forward_float;
    parallel_for(p.batch * p.regions, threads, [&](int64_t begin, int64_t end) { run(p, out, begin, end); });
}

void norm_silu_backward(const NormProblem& p, const NormGradients& d, int threads) {
    auto run = p.is_bf16 ? backward_bf16 : backward_float;
    parallel_for(p.batch, threads, [&](int64_t begin, int64_t end) { run(p, d, begin, end); });
}

}  // namespace factorkit
