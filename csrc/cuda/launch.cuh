// Launching: the device's limits, kernels put on a stream one after another, and shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
#error "tables travel as kernel arguments of up to 32,764 bytes, which CUDA 12.1 and later have"
#endif

namespace pdp {

struct DeviceLimits {
  int multiprocessors = 0;
  int shared_bytes_per_block = 0;
};

inline cudaError_t read_device_limits(int device, DeviceLimits* limits) {
  const cudaError_t error =
      cudaDeviceGetAttribute(&limits->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(&limits->shared_bytes_per_block,
                                cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// Puts kernels on one stream and keeps the first error; what follows an error is not launched.
class Launcher {
 public:
  explicit Launcher(cudaStream_t stream) : stream_(stream) {}

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
              const Arguments&... arguments) {
    // Beyond 48 KiB of shared memory a kernel has to ask for it.
    if (error_ == cudaSuccess && shared_bytes > 48 * 1024) {
      error_ = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes));
    }
    if (error_ != cudaSuccess) return;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream_;
    error_ = cudaLaunchKernelEx(&config, kernel, arguments...);
  }

  cudaError_t error() const { return error_; }

 private:
  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
};

// The block's dynamic shared memory as a Layout. One array serves every kernel: all declarations of
// an extern __shared__ array name the same memory. Where the kernels are built for a CPU
// (instruments/host_cuda), C++ has no such array.
template <typename Layout>
__device__ __forceinline__ Layout& shared_memory() {
  static_assert(alignof(Layout) <= 16, "dynamic shared memory is aligned to 16 bytes");
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char pdp_shared_memory[];
  return *reinterpret_cast<Layout*>(pdp_shared_memory);
#else
  return *reinterpret_cast<Layout*>(host_cuda::shared_memory());
#endif
}

}  // namespace pdp
