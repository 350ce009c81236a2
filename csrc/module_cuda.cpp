// The Python module of the CUDA kernels. Importing it registers the operators of ops_cuda.cu; its
// one function tells how it was built.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <string>

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = TORCH_VERSION;
    info["cuda"] =
        std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
    info["architectures"] = PDP_CUDA_ARCHITECTURES;
    info["compiler"] = __VERSION__;
    return info;
  });
}
