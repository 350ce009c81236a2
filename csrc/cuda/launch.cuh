// Kernel launches: the device's limits, launches on one stream, and dynamic shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
#error "CUDA 12.1 or later is needed: tables are kernel arguments of up to 32,764 bytes"
#endif

namespace pdp {

struct DeviceLimits {
  int multiprocessors = 0;
};

inline cudaError_t read_device_limits(int device, DeviceLimits* limits) {
  return cudaDeviceGetAttribute(&limits->multiprocessors, cudaDevAttrMultiProcessorCount, device);
}

// Launches kernels on one stream and keeps the first error. After an error it launches nothing.
class Launcher {
 public:
  explicit Launcher(cudaStream_t stream) : stream_(stream) {}

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
              const Arguments&... arguments) {
    // A kernel has to ask for more than 48 KiB of shared memory.
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

// Returns the block's dynamic shared memory as a Layout. One array serves every kernel, since all
// declarations of an extern __shared__ array name the same memory. The build for a CPU
// (instruments/host_cuda) has no such array.
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
