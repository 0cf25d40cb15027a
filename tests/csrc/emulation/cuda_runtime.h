// CUDA's words, enough of them to run the kernels of csrc/ on the CPU: every lane of a warp is a fiber, and a shuffle
// lets the other lanes catch up. Stops if lanes of a warp do not meet at the same shuffles, which a GPU would leave
// undefined.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

using cudaStream_t = void*;
using cudaError_t = int;
constexpr int cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

struct dim3 {
    unsigned x, y;
    dim3(unsigned x = 1, unsigned y = 1) : x(x), y(y) {}
};
inline dim3 threadIdx(0, 0), blockIdx(0, 0);

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

template <class T>
void atomicAdd(T* at, T value) {  // lanes take turns
    *at += value;
}
inline void atomicAdd(float2* at, float2 value) { *at = {at->x + value.x, at->y + value.y}; }
inline void atomicAdd(float4* at, float4 value) {
    *at = {at->x + value.x, at->y + value.y, at->z + value.z, at->w + value.w};
}

struct Warp {
    ucontext_t scheduler, lanes[32];
    std::vector<char> stacks = std::vector<char>(32 << 16);
    std::function<void()> body;
    std::uint64_t slot[32];
    long meetings[32];
    bool done[32];
    int lane = 0;
    long all_meetings = 0;  // of all warps so far
};
inline Warp warp;

inline void run_lane() {
    warp.body();
    warp.done[warp.lane] = true;
    swapcontext(&warp.lanes[warp.lane], &warp.scheduler);
}

inline void wait_for_lanes() { swapcontext(&warp.lanes[warp.lane], &warp.scheduler); }

inline void run_warp(unsigned first_thread) {
    for (int lane = 0; lane < 32; ++lane) {
        getcontext(&warp.lanes[lane]);
        warp.lanes[lane].uc_stack.ss_sp = warp.stacks.data() + (lane << 16);
        warp.lanes[lane].uc_stack.ss_size = 1 << 16;
        makecontext(&warp.lanes[lane], run_lane, 0);
        warp.done[lane] = false;
        warp.meetings[lane] = 0;
    }
    for (bool running = true; running;) {
        running = false;
        for (int lane = 0; lane < 32; ++lane) {
            if (warp.done[lane]) continue;
            warp.lane = lane;
            threadIdx.x = first_thread + lane;
            swapcontext(&warp.scheduler, &warp.lanes[lane]);
            running = true;
        }
        for (int lane = 1; lane < 32; ++lane) {
            if (warp.meetings[lane] == warp.meetings[0]) continue;
            std::fprintf(stderr, "lane %d does not meet lane 0 at its shuffle\n", lane);
            std::exit(3);
        }
    }
    warp.all_meetings += warp.meetings[0];
}

template <class Kernel>
auto launch(const Kernel& kernel, dim3 blocks, int threads) {
    return [=](const auto&... arguments) {
        warp.body = [&] { kernel(arguments...); };
        for (unsigned block = 0; block < blocks.x * blocks.y; ++block) {
            blockIdx = dim3(block % blocks.x, block / blocks.x);
            for (int first = 0; first < threads; first += 32) run_warp(first);
        }
    };
}

template <class T>
T exchange(T value, int from) {
    ++warp.meetings[warp.lane];
    std::memcpy(&warp.slot[warp.lane], &value, sizeof(T));
    wait_for_lanes();
    T other;
    std::memcpy(&other, &warp.slot[from], sizeof(T));
    wait_for_lanes();
    return other;
}

template <class T>
T __shfl_sync(unsigned, T value, int from) {
    return exchange(value, from % 32);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int step) {
    return exchange(value, warp.lane >= step ? warp.lane - step : warp.lane);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int step) {
    return exchange(value, warp.lane + step < 32 ? warp.lane + step : warp.lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return exchange(value, warp.lane ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
    unsigned all = 0;
    ++warp.meetings[warp.lane];
    warp.slot[warp.lane] = vote;
    wait_for_lanes();
    for (int lane = 0; lane < 32; ++lane) all |= unsigned(warp.slot[lane]) << lane;
    wait_for_lanes();
    return all;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
