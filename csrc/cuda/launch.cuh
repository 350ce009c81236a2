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
  int device = 0;
  int multiprocessors = 0;
};

inline cudaError_t read_device_limits(int device, DeviceLimits* limits) {
  limits->device = device;
  return cudaDeviceGetAttribute(&limits->multiprocessors, cudaDevAttrMultiProcessorCount, device);
}

// Finds the __CUDA_ARCH__ / 10 of a kernel as it is loaded on the current device, for machine code
// and for code that the driver compiles from PTX. A thread asks each device once: all kernels of
// the module are compiled for the same architectures.
inline cudaError_t find_architecture_of_code(const void* kernel, int device, int* architecture) {
  constexpr int kDevices = 64;
  thread_local int known[kDevices] = {};
  const bool is_kept = device >= 0 && device < kDevices;
  *architecture = is_kept ? known[device] : 0;
  if (*architecture != 0) return cudaSuccess;
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  *architecture = attributes.ptxVersion;
  if (is_kept) known[device] = *architecture;
  return cudaSuccess;
}

// Code for this architecture and later ones has the wait of wait_for_earlier_kernels.
constexpr int kFirstWithWait = 90;  // __CUDA_ARCH__ / 10

// Launches kernels on one stream and keeps the first error. After an error it launches nothing.
class Launcher {
 public:
  explicit Launcher(cudaStream_t stream, DeviceLimits limits = {})
      : stream_(stream), limits_(limits) {}

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
              const Arguments&... arguments) {
    launch_with(nullptr, kernel, blocks, threads, shared_bytes, arguments...);
  }

  // Launches a kernel that calls wait_for_earlier_kernels before anything else. Its blocks may be
  // there while the last ones of the kernel before it still run (programmatic dependent launch,
  // from compute capability 9.0), which hides the time of the launch. Code for 8.0 has no wait,
  // and may run on such a device too.
  template <typename... Parameters, typename... Arguments>
  void launch_overlapped(void (*kernel)(Parameters...), int64_t blocks, int threads,
                         size_t shared_bytes, const Arguments&... arguments) {
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    if (error_ != cudaSuccess) return;
    int code = 0;
    error_ =
        find_architecture_of_code(reinterpret_cast<const void*>(kernel), limits_.device, &code);
    launch_with(code >= kFirstWithWait ? &overlap : nullptr, kernel, blocks, threads, shared_bytes,
                arguments...);
  }

  cudaError_t error() const { return error_; }

 private:
  template <typename... Parameters, typename... Arguments>
  void launch_with(cudaLaunchAttribute* attribute, void (*kernel)(Parameters...), int64_t blocks,
                   int threads, size_t shared_bytes, const Arguments&... arguments) {
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
    config.attrs = attribute;
    config.numAttrs = attribute == nullptr ? 0 : 1;
    error_ = cudaLaunchKernelEx(&config, kernel, arguments...);
  }

  cudaStream_t stream_;
  DeviceLimits limits_;
  cudaError_t error_ = cudaSuccess;
};

// Waits until all earlier kernels of the stream have ended and what they wrote can be read, then
// lets the next kernel's blocks begin to wait. Called by all threads.
//
// The instruction waits for the kernel before alone. That one has waited too, even if it found
// nothing to do, so it ends after those before it. The first kernel of a chain is launched without
// overlap: whatever came before has ended, and nothing still reads what the chain writes.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

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
