// The Python module factorkit._C. It knows nothing of torch: ops take addresses, sizes, strides and a stream.
#include <pybind11/pybind11.h>

#include "system.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

py::dict build_info() {
    py::dict info;
    info["version"] = FACTORKIT_VERSION;
    info["compiler"] = kCompiler;
    info["simd"] = factorkit::simd_level();
#ifdef FACTORKIT_CUDA_TARGETS
    info["cuda"] = true;
    info["cuda_version"] = factorkit::cuda_version();
    info["cuda_targets"] = py::list(py::str(FACTORKIT_CUDA_TARGETS).attr("split")(","));
#else
    info["cuda"] = false;
    info["cuda_version"] = py::none();
    info["cuda_targets"] = py::list();
#endif
    return info;
}

py::list cuda_devices() {
    py::list devices;
#ifdef FACTORKIT_CUDA_TARGETS
    for (const factorkit::CudaDevice& device : factorkit::cuda_devices()) {
        py::dict entry;
        entry["name"] = device.name;
        entry["capability"] = py::make_tuple(device.major, device.minor);
        entry["memory_bytes"] = device.memory_bytes;
        devices.append(entry);
    }
#endif
    return devices;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "factorkit's compiled operations (C++, and CUDA where built with it).";
    m.def("build_info", &build_info, R"(What this module was built with, and the SIMD level of this machine.

Returns a dict: version (str, factorkit's), compiler (str), simd ("avx512", "avx2", "sse2", "neon" or "scalar",
found at run time), cuda (bool), cuda_version (str or None), cuda_targets (list of nvcc's names: "sm_90" is
machine code, "compute_90" is PTX, which the driver compiles for any newer GPU).)");
    m.def("cuda_devices", &cuda_devices, R"(The CUDA devices this module sees.

Returns a list of dicts: name (str), capability ((major, minor)), memory_bytes (int). Empty without CUDA in the
build, without a driver and without a device. Raises RuntimeError with the cause if the driver cannot be used.)");
}
