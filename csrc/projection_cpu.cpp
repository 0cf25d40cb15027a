#include "projection.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "matrix.h"
#include "rows.h"
#include "simd.h"
#include "threads.h"

namespace factorkit {
namespace {

using std::int64_t;

constexpr int64_t kTile = 32;        // pixels whose values stay in the first-level cache
constexpr int64_t kMostPieces = 64;  // of all tiles: each has its own sums of the weight's gradient

int64_t tiles_per_image(const ProjectionProblem& p) { return (p.pixels + kTile - 1) / kTile; }

// What both passes hold of a tile of pixels, in fp32: [pixels][channels].
template <class T, class V>
struct Projector {
    const ProjectionProblem& p;
    const int64_t n, channels_in;
    Matrix to_out_u, to_out_skip;            // the weight, [inputs][outputs]
    Matrix of_u, of_skip, out_u, out_skip;
    int64_t image = 0, begin = 0, count = 0;  // of the tile

    explicit Projector(const ProjectionProblem& p) : p(p), n(p.pixels), channels_in(p.channels_u + p.channels_skip) {
        to_out_u.resize(p.channels_u, p.channels_out);
        to_out_skip.resize(p.channels_skip, p.channels_out);
        for (int64_t o = 0; o < p.channels_out; ++o)
            for (int64_t c = 0; c < channels_in; ++c) {
                const bool is_u = c < p.channels_u;
                (is_u ? to_out_u.row(c) : to_out_skip.row(c - p.channels_u))[o] = p.weight[o * channels_in + c];
            }
        of_u.resize(kTile, p.channels_u);
        of_skip.resize(kTile, p.channels_skip);
        for (Matrix* x : {&out_u, &out_skip}) x->resize(kTile, p.channels_out);
    }

    // Calls run() for each of some tiles, counted over all images.
    template <class Run>
    FACTORKIT_INLINE void for_tiles(int64_t first, int64_t last, const Run& run) {
        for (int64_t index = first; index < last; ++index) {
            image = index / tiles_per_image(p);
            begin = index % tiles_per_image(p) * kTile;
            count = std::min(kTile, n - begin);
            run();
        }
    }

    FACTORKIT_INLINE int64_t row_of_u(int64_t k) const { return p.u_shared ? image : image * p.regions + k; }

    // The tile of a row of features, from and to fp32.
    FACTORKIT_INLINE void widen(const void* from, int64_t row, int64_t width, Matrix& to) const {
        const T* x = static_cast<const T*>(from) + (row * n + begin) * width;
        for_packs<V>(width, [&](const auto pack) FACTORKIT_INLINE_LAMBDA {
            for (int64_t i = 0; i < count; ++i) pack.store(pack.load(x + i * width), to.row(i));
        });
    }
    FACTORKIT_INLINE void narrow(const Matrix& from, void* to, int64_t row, int64_t width) const {
        T* x = static_cast<T*>(to) + (row * n + begin) * width;
        for_packs<V>(width, [&](const auto pack) FACTORKIT_INLINE_LAMBDA {
            for (int64_t i = 0; i < count; ++i) pack.store(pack.load(from.row(i)), x + i * width);
        });
    }

    FACTORKIT_INLINE void project_skip() {
        widen(p.skip, image, p.channels_skip, of_skip);
        multiply<V>(count, p.channels_skip, of_skip, to_out_skip, out_skip);
    }

    FACTORKIT_INLINE void forward(T* out) {
        project_skip();
        for (int64_t k = 0; k < p.regions; ++k) {
            if (k == 0 || !p.u_shared) {
                widen(p.u, row_of_u(k), p.channels_u, of_u);
                multiply<V>(count, p.channels_u, of_u, to_out_u, out_u);
            }
            if (p.residual)
                join<true>(k, out);
            else
                join<false>(k, out);
        }
    }

   private:
    template <bool HasResidual>
    FACTORKIT_INLINE void join(int64_t k, T* out) {
        const int64_t at = (image * p.regions + k) * n + begin, width = p.channels_out;
        const T* residual = HasResidual ? static_cast<const T*>(p.residual) + at * width : nullptr;
        T* to = out + at * width;
        float mask[kTile];
        for (int64_t i = 0; i < count; ++i) mask[i] = p.masks ? p.masks[at + i] : 1.0f;
        for_packs<V>(width, [&](const auto pack) FACTORKIT_INLINE_LAMBDA {
            const auto bias = pack.load(p.bias);
            for (int64_t i = 0; i < count; ++i) {
                auto x = pack.load(out_u.row(i)) + mask[i] * pack.load(out_skip.row(i)) + bias;
                if (HasResidual) x += pack.load(residual + i * width);
                pack.store(x, to + i * width);
            }
        });
    }
};

// The gradients of some tiles; those of the weight and bias are sums over all of them.
template <class T, class V>
struct ProjectionBackward : Projector<T, V> {
    using Base = Projector<T, V>;
    using Base::p, Base::n, Base::image, Base::begin, Base::count, Base::channels_in, Base::of_u, Base::of_skip, Base::out_skip;
    const ProjectionGradients& d;
    Matrix to_u, to_skip;              // the weight, [outputs][inputs]
    Matrix grad, grad_sum, grad_skip;  // upstream: of a branch, summed over branches, and each times its mask
    Matrix on_u, on_skip;
    Matrix on_weight_u, on_weight_skip;
    std::vector<float> on_bias;

    ProjectionBackward(const ProjectionProblem& p, const ProjectionGradients& d) : Base(p), d(d), on_bias(p.channels_out) {
        for (Matrix* x : {&to_u, &on_weight_u}) x->resize(p.channels_out, p.channels_u);
        for (Matrix* x : {&to_skip, &on_weight_skip}) x->resize(p.channels_out, p.channels_skip);
        for (int64_t o = 0; o < p.channels_out; ++o) {
            std::copy_n(p.weight + o * channels_in, p.channels_u, to_u.row(o));
            std::copy_n(p.weight + o * channels_in + p.channels_u, p.channels_skip, to_skip.row(o));
        }
        for (Matrix* x : {&grad, &grad_sum, &grad_skip}) x->resize(kTile, p.channels_out);
        on_u.resize(kTile, p.channels_u);
        on_skip.resize(kTile, p.channels_skip);
    }

    void clear_sums() {
        for (auto* x : {&on_weight_u.values, &on_weight_skip.values, &on_bias}) std::fill(x->begin(), x->end(), 0.0f);
    }

    FACTORKIT_INLINE void compute() {
        if (d.masks)
            this->project_skip();
        else
            this->widen(p.skip, image, p.channels_skip, of_skip);
        for (int64_t k = 0; k < p.regions; ++k) {
            read_grad(k);
            if (d.masks) to_mask(k);
            if (!p.u_shared) through_weight(grad, p.u, this->row_of_u(k), p.channels_u, to_u, of_u, on_u, on_weight_u, d.u);
        }
        if (p.u_shared) through_weight(grad_sum, p.u, image, p.channels_u, to_u, of_u, on_u, on_weight_u, d.u);
        through_weight(grad_skip, nullptr, image, p.channels_skip, to_skip, of_skip, on_skip, on_weight_skip, d.skip);
    }

   private:
    FACTORKIT_INLINE void read_grad(int64_t k) {
        const int64_t at = (image * p.regions + k) * n + begin, width = p.channels_out;
        const T* from = static_cast<const T*>(d.on_out) + at * width;
        float mask[kTile];
        for (int64_t i = 0; i < count; ++i) mask[i] = p.masks ? p.masks[at + i] : 1.0f;
        for_packs<V>(width, [&](const auto pack) FACTORKIT_INLINE_LAMBDA {
            auto sum = pack.load(on_bias.data());
            for (int64_t i = 0; i < count; ++i) {
                const auto g = pack.load(from + i * width);
                sum += g;
                pack.store(g, grad.row(i));
                pack.store(k ? pack.load(grad_skip.row(i)) + mask[i] * g : mask[i] * g, grad_skip.row(i));
                if (p.u_shared) pack.store(k ? pack.load(grad_sum.row(i)) + g : g, grad_sum.row(i));
            }
            pack.store(sum, on_bias.data());
        });
    }

    FACTORKIT_INLINE void to_mask(int64_t k) {
        float* to = d.masks + (image * p.regions + k) * n + begin;
        for (int64_t i = 0; i < count; i += kLanes) {
            Lanes of_pixel[kLanes] = {};
            for_packs(p.channels_out, [&](const auto pack) FACTORKIT_INLINE_LAMBDA {  // padding of infinities holds NaN
                for (int64_t j = 0; j < kLanes; ++j) of_pixel[j] += pack.load(grad.row(i + j)) * pack.load(out_skip.row(i + j));
            });
            const Lanes sums = sum_each(of_pixel);
            std::memcpy(to + i, &sums, std::min(kLanes, count - i) * sizeof(float));
        }
    }

    FACTORKIT_INLINE void through_weight(const Matrix& upstream, const void* input, int64_t row, int64_t width,
                                         const Matrix& weight, Matrix& values, Matrix& on_values, Matrix& on_weight, void* to) {
        if (input) this->widen(input, row, width, values);
        multiply<V>(count, p.channels_out, upstream, weight, on_values);
        this->narrow(on_values, to, row, width);
        multiply<V, true>(p.channels_out, count, upstream, values, on_weight, true);
    }
};

struct Forward {
    template <class V, class B>
    FACTORKIT_INLINE static void run(const ProjectionProblem& p, void* out, int64_t begin, int64_t end) {
        p.is_bf16 ? images<B, V>(p, out, begin, end) : images<float, V>(p, out, begin, end);
    }
    template <class T, class V>
    FACTORKIT_INLINE static void images(const ProjectionProblem& p, void* out, int64_t begin, int64_t end) {
        Projector<T, V> projector(p);
        projector.for_tiles(begin, end, [&]() FACTORKIT_INLINE_LAMBDA { projector.forward(static_cast<T*>(out)); });
    }
};

// Some of all pieces of the tiles; `sums` [pieces][size] are those of the weight's gradient, then of the bias's.
struct Backward {
    template <class V, class B>
    FACTORKIT_INLINE static void run(const ProjectionProblem& p, const ProjectionGradients& d, float* sums, int64_t pieces,
                                     int64_t begin, int64_t end) {
        p.is_bf16 ? add_pieces<B, V>(p, d, sums, pieces, begin, end) : add_pieces<float, V>(p, d, sums, pieces, begin, end);
    }
    template <class T, class V>
    FACTORKIT_INLINE static void add_pieces(const ProjectionProblem& p, const ProjectionGradients& d, float* sums,
                                            int64_t pieces, int64_t begin, int64_t end) {
        ProjectionBackward<T, V> backward(p, d);
        const int64_t tiles = p.batch * tiles_per_image(p), size = p.channels_out * (backward.channels_in + 1);
        for (int64_t piece = begin; piece < end; ++piece) {
            backward.clear_sums();
            backward.for_tiles(piece * tiles / pieces, (piece + 1) * tiles / pieces,
                               [&]() FACTORKIT_INLINE_LAMBDA { backward.compute(); });
            float* to = sums + piece * size;
            for (int64_t o = 0; o < p.channels_out; ++o) {
                to = std::copy_n(backward.on_weight_u.row(o), p.channels_u, to);
                to = std::copy_n(backward.on_weight_skip.row(o), p.channels_skip, to);
            }
            std::copy_n(backward.on_bias.data(), p.channels_out, to);
        }
    }
};

}  // namespace

void projection_forward(const ProjectionProblem& p, void* out, int threads) {
    parallel_for(p.batch * tiles_per_image(p), threads,
                 [&](int64_t begin, int64_t end) { run_fastest<Forward>(p, out, begin, end); });
}

void projection_backward(const ProjectionProblem& p, const ProjectionGradients& d, int threads) {
    // Pieces do not depend on the number of threads, and so neither do the sums.
    const int64_t tiles = p.batch * tiles_per_image(p), pieces = std::min(tiles, kMostPieces);
    const int64_t weights = p.channels_out * (p.channels_u + p.channels_skip), size = weights + p.channels_out;
    std::vector<float> sums(pieces * size);
    float* all_sums = sums.data();
    parallel_for(pieces, threads,
                 [&](int64_t begin, int64_t end) { run_fastest<Backward>(p, d, all_sums, pieces, begin, end); });
    for (int64_t j = 0; j < size; ++j) {
        double sum = 0;
        for (int64_t i = 0; i < pieces; ++i) sum += sums[i * size + j];
        (j < weights ? d.weight[j] : d.bias[j - weights]) = float(sum);
    }
}

}  // namespace factorkit
