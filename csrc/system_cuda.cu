#include <stdexcept>

#include <cuda_runtime_api.h>

#include "system.h"

namespace factorkit {
namespace {

std::string dotted(int version) {  // 13000 -> "13.0", CUDA's own encoding
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

void check(cudaError_t status, const char* action) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // the runtime keeps the error for the next caller otherwise
    throw std::runtime_error(std::string(action) + ": " + cudaGetErrorString(status));
}

}  // namespace

std::string cuda_version() { return dotted(CUDART_VERSION); }

std::vector<CudaDevice> cuda_devices() {
    // "No driver" and "driver too old" are the same error of cudaGetDeviceCount; only the version distinguishes them.
    int driver = 0;
    check(cudaDriverGetVersion(&driver), "asking the CUDA driver for its version");
    if (driver == 0) return {};

    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaErrorNoDevice) {
        cudaGetLastError();
        return {};
    }
    if (status == cudaErrorInsufficientDriver) {
        cudaGetLastError();
        throw std::runtime_error("the driver supports CUDA " + dotted(driver) + ", this build needs " + cuda_version());
    }
    check(status, "counting CUDA devices");

    std::vector<CudaDevice> devices;
    for (int index = 0; index < count; ++index) {
        cudaDeviceProp properties;
        check(cudaGetDeviceProperties(&properties, index), "reading a CUDA device's properties");
        devices.push_back({properties.name, properties.major, properties.minor, properties.totalGlobalMem});
    }
    return devices;
}

}  // namespace factorkit
