// The loops over threads of the CPU implementations.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>

namespace factorkit {

// Runs body(begin, end) over [0, count) in as many contiguous pieces as there are threads; what a piece throws is thrown
// here. The threads are those of the OpenMP runtime that PyTorch has loaded: behind each operation they spin for a while,
// waiting for the next, and others would have to share their cores with them. Without OpenMP we have threads of our own,
// which stay for the next call; while another thread of the program has them, the pieces run one after the other.
// No body may call it in turn.
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
