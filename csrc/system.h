// What this build is and what machine it runs on: the facts `factorkit doctor` prints.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace factorkit {

struct CudaDevice {
    std::string name;
    int major;                 // compute capability, e.g. 9.0
    int minor;
    std::size_t memory_bytes;  // all of the device's memory, used or not
};

// The widest vector instructions this processor and its operating system offer, which is what `target_clones`
// dispatches on: "avx512", "avx2" or "sse2" on x86-64, "neon" on arm64, else "scalar".
std::string simd_level();

// CUDA version of the runtime linked in, e.g. "13.0". Defined in builds with CUDA only, like the next.
std::string cuda_version();

// The visible devices; none if there is no device or no driver. Throws std::runtime_error, with the runtime's
// cause, if a driver is there but cannot be used.
std::vector<CudaDevice> cuda_devices();

}  // namespace factorkit
