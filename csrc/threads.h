// The loops over threads of the CPU implementations.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>

namespace factorkit {

// Runs body(begin, end) over [0, count) in as many contiguous pieces as there are threads; what a piece throws is thrown
// here. The threads stay for the next call: starting them takes longer than many an op. While another thread of the
// program has them, the pieces run one after the other. No body may call it in turn.
void parallel_for(std::int64_t count, int threads, const std::function<void(std::int64_t, std::int64_t)>& body);

// The same where the work per index varies, as over ragged rays: threads take the next `block` indices when they are
// free.
inline void parallel_for_uneven(std::int64_t count, std::int64_t block, int threads,
                                const std::function<void(std::int64_t, std::int64_t)>& body) {
    const std::int64_t blocks = (count + block - 1) / block;
    std::atomic<std::int64_t> next{0};
    parallel_for(std::min<std::int64_t>(blocks, std::max(1, threads)), threads, [&](std::int64_t, std::int64_t) {
        for (std::int64_t i = next++; i < blocks; i = next++) body(i * block, std::min(count, (i + 1) * block));
    });
}

}  // namespace factorkit
