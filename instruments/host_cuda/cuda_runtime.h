// The CUDA execution model on a CPU, as far as the kernels of this project use it, so that their
// sources run unchanged without a GPU. -I puts it in place of the toolkit's header.
//
// engine.cpp interleaves blocks and runs threads in an order drawn from a seed. Device memory and
// shared memory begin with noise. Errors: a barrier or a warp operation that some threads miss, a
// misaligned __ldg, a store beyond the requested shared memory or beyond an allocation. Compiled
// and linked with -fsanitize=thread, it also reports races and missing fences; with counters.cpp,
// it counts bytes.
//
// It does not model time, nor stale cache lines that __ldg may find after an earlier write of the
// same kernel.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "engine.h"

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
  unsigned x;
  dim3(unsigned x_of = 1) : x(x_of) {}  // NOLINT(runtime/explicit): as in CUDA
};

struct alignas(8) uint2 {
  unsigned x, y;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using std::max;
using std::min;

namespace host_cuda {

constexpr unsigned kWarpSize = 32;

template <typename Value>
Value exchange_value(unsigned mask, Value value, unsigned lane) {
  if (mask != 0xFFFFFFFF) fail("a warp operation without all lanes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(Value));
  bits = exchange(bits, lane);
  memcpy(&value, &bits, sizeof(Value));
  return value;
}

// 1 / sqrt(x) with an error of 2^-22.9, the largest of rsqrt.approx (PTX ISA), up or down.
inline float reciprocal_root(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(x));
  const bool up = bits * 0x9E3779B9u >> 31 != 0;
  return static_cast<float>((up ? 1 + 1.28e-7 : 1 - 1.28e-7) / std::sqrt(double{x}));
}

// Only the types CUDA has these atomics for.
template <typename Integer>
constexpr bool kHasAtomics =
    std::is_same_v<Integer, unsigned> || std::is_same_v<Integer, unsigned long long>;

}  // namespace host_cuda

inline void __syncthreads() { host_cuda::barrier(false); }
inline int __syncthreads_or(int predicate) { return host_cuda::barrier(predicate != 0); }
inline void __threadfence() { host_cuda::fence(); }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }

template <typename Value>
Value __ldg(const Value* address) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(Value) != 0) {
    host_cuda::fail("a misaligned load");
  }
  if (host_cuda_read_only_load != nullptr) host_cuda_read_only_load(address, sizeof(Value));
  return *address;
}

template <typename Value>
Value __shfl_xor_sync(unsigned mask, Value value, int distance) {
  const unsigned lane = threadIdx.x % host_cuda::kWarpSize;
  return host_cuda::exchange_value(mask, value, lane ^ static_cast<unsigned>(distance));
}

template <typename Value>
Value __shfl_up_sync(unsigned mask, Value value, int distance) {
  const unsigned lane = threadIdx.x % host_cuda::kWarpSize;
  const auto up = static_cast<unsigned>(distance);
  return host_cuda::exchange_value(mask, value, lane < up ? lane : lane - up);
}

template <typename Value>
Value __shfl_sync(unsigned mask, Value value, int lane) {
  return host_cuda::exchange_value(mask, value, static_cast<unsigned>(lane));
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  if (mask != 0xFFFFFFFF) host_cuda::fail("a warp operation without all lanes");
  return host_cuda::ballot(predicate != 0);
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

template <typename Integer>
Integer atomicAdd(Integer* address, Integer value) {
  static_assert(host_cuda::kHasAtomics<Integer>);
  host_cuda::before_atomic(address, sizeof(Integer));
  const Integer old = __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
  host_cuda::after_atomic(address);
  return old;
}

template <typename Integer>
Integer atomicExch(Integer* address, Integer value) {
  static_assert(host_cuda::kHasAtomics<Integer>);
  host_cuda::before_atomic(address, sizeof(Integer));
  const Integer old = __atomic_exchange_n(address, value, __ATOMIC_RELAXED);
  host_cuda::after_atomic(address);
  return old;
}

template <typename Integer>
Integer atomicMin(Integer* address, Integer value) {
  static_assert(host_cuda::kHasAtomics<Integer>);
  host_cuda::before_atomic(address, sizeof(Integer));
  Integer old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (value < old && !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_RELAXED,
                                                     __ATOMIC_RELAXED)) {
  }
  host_cuda::after_atomic(address);
  return old;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

// One kernel runs after the other here, whatever the attributes allow.
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = host_cuda::device.multiprocessors;
  return cudaSuccess;
}

struct cudaFuncAttributes {
  int ptxVersion;
};

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = host_cuda::device.architecture_of_code;
  return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

// Throws an exception for a mistake inside the kernel.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  host_cuda::device.kernel = reinterpret_cast<const void*>(kernel);
  host_cuda::device.overlapped_launches += config->numAttrs;
  auto call = [&] { kernel(arguments...); };
  using Call = decltype(call);
  const char* error = host_cuda::run_grid(
      config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes,
      [](void* argument) { (*static_cast<Call*>(argument))(); }, &call);
  if (error != nullptr) throw std::runtime_error(error);
  return cudaSuccess;
}

namespace host_cuda {

// Bytes before and after an allocation.
constexpr size_t kGuard = 4096;
constexpr unsigned char kNoise = 0xA5;

}  // namespace host_cuda

template <typename Element>
cudaError_t cudaMalloc(Element** memory, size_t bytes) {
  using host_cuda::kGuard;
  auto* begin =
      static_cast<unsigned char*>(aligned_alloc(256, (bytes + 2 * kGuard + 255) & ~size_t{255}));
  if (begin == nullptr) return cudaErrorMemoryAllocation;
  memset(begin, host_cuda::kNoise, bytes + 2 * kGuard);
  memcpy(begin, &bytes, sizeof(bytes));
  *memory = reinterpret_cast<Element*>(begin + kGuard);
  return cudaSuccess;
}

inline cudaError_t cudaFree(void* memory) {
  using host_cuda::kGuard;
  if (memory == nullptr) return cudaSuccess;
  auto* begin = static_cast<unsigned char*>(memory) - kGuard;
  size_t bytes;
  memcpy(&bytes, begin, sizeof(bytes));
  bool damaged = false;
  for (size_t i = sizeof(bytes); i < kGuard; ++i) damaged |= begin[i] != host_cuda::kNoise;
  for (size_t i = 0; i < kGuard; ++i) damaged |= begin[kGuard + bytes + i] != host_cuda::kNoise;
  free(begin);
  if (damaged) throw std::runtime_error("a store beyond an allocation");
  return cudaSuccess;
}

inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "out of memory";
}
