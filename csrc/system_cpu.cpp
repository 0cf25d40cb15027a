#include "system.h"

namespace factorkit {

std::string simd_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) return "avx512";
    if (__builtin_cpu_supports("avx2")) return "avx2";
    return "sse2";  // every x86-64 processor has it
#elif defined(__aarch64__)
    return "neon";  // part of the base architecture
#else
    return "scalar";
#endif
}

}  // namespace factorkit
