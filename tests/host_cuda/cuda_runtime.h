// The CUDA execution model on a CPU, as far as the kernels of this project use it, so that their
// very sources run where there is no GPU. Found in place of the toolkit's header through -I.
//
// A kernel's blocks run one after another in an order drawn from a seed. The threads of a block are
// coroutines: each runs until it meets a barrier or a warp operation; the order of warps and lanes
// is drawn anew each time. Shared memory is filled with noise before each block. A barrier that
// some threads of the block never reach, a misaligned __ldg, and a store beyond the shared memory
// asked for, are errors.
//
// It does not show: races between threads that run at the same time, missing memory fences, or
// anything about speed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <type_traits>
#include <vector>

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

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

namespace host_cuda {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kSharedBytes = 256 * 1024;

enum class Waiting { kNot, kBlock, kWarp, kDone };

struct Thread {
  std::vector<char> stack = std::vector<char>(kStackBytes);
  ucontext_t start;
  jmp_buf resume;
  bool started;
  Waiting waiting;
  int vote;        // what it brings to __syncthreads_or
  uint64_t value;  // what it shows to its warp
};

// The device: what a test sets and reads, and what is running.
struct Device {
  int multiprocessors = 2;
  int shared_bytes_per_block = 227 * 1024;
  uint64_t seed = 0;
  int64_t launches = 0;
  unsigned char* shared_memory = nullptr;  // kSharedBytes of them

  std::vector<Thread> threads;
  unsigned current = 0;
  jmp_buf scheduler;
  ucontext_t scheduler_start;
  std::function<void()> kernel;
  const char* failure = nullptr;
};

inline Device device;

// _setjmp and _longjmp switch stacks without the system call that swapcontext makes.
__attribute__((noinline)) inline void back_to_scheduler() {
  if (_setjmp(device.threads[device.current].resume) == 0) _longjmp(device.scheduler, 1);
}

inline void fail(const char* message) {
  device.failure = message;
  back_to_scheduler();
}

inline void run_thread() {
  device.kernel();
  device.threads[device.current].waiting = Waiting::kDone;
  _longjmp(device.scheduler, 1);
}

__attribute__((noinline)) inline void resume(unsigned thread) {
  Thread& next = device.threads[thread];
  device.current = thread;
  threadIdx.x = thread;
  next.waiting = Waiting::kNot;
  if (_setjmp(device.scheduler) != 0) return;
  if (next.started) _longjmp(next.resume, 1);
  next.started = true;
  getcontext(&next.start);
  next.start.uc_stack.ss_sp = next.stack.data();
  next.start.uc_stack.ss_size = next.stack.size();
  next.start.uc_link = nullptr;
  makecontext(&next.start, run_thread, 0);
  setcontext(&next.start);
}

inline void wait(Waiting for_what) {
  device.threads[device.current].waiting = for_what;
  back_to_scheduler();
}

// Runs the lanes of a warp, in random order, until all wait for the block or are done.
inline void run_warp(unsigned first, std::mt19937_64& random) {
  std::vector<unsigned> lanes(kWarp);
  std::iota(lanes.begin(), lanes.end(), first);
  while (true) {
    std::shuffle(lanes.begin(), lanes.end(), random);
    for (const unsigned thread : lanes) {
      if (device.threads[thread].waiting == Waiting::kNot) resume(thread);
      if (device.failure != nullptr) throw std::runtime_error(device.failure);
    }
    unsigned showing = 0;
    for (const unsigned thread : lanes) {
      showing += device.threads[thread].waiting == Waiting::kWarp;
    }
    if (showing == 0) return;
    if (showing < kWarp) throw std::runtime_error("a warp operation that some lanes miss");
    for (const unsigned thread : lanes) device.threads[thread].waiting = Waiting::kNot;
  }
}

// Between two barriers the warps run one after another in random order: what needs a barrier and
// has none goes wrong in one of the orders.
inline void run_block(unsigned threads, std::mt19937_64& random) {
  for (unsigned i = 0; i < threads; ++i) {
    device.threads[i].started = false;
    device.threads[i].waiting = Waiting::kNot;
  }
  std::vector<unsigned> warps;
  for (unsigned first = 0; first < threads; first += kWarp) warps.push_back(first);
  while (true) {
    std::shuffle(warps.begin(), warps.end(), random);
    for (const unsigned first : warps) run_warp(first, random);
    unsigned done = 0;
    for (unsigned i = 0; i < threads; ++i) done += device.threads[i].waiting == Waiting::kDone;
    if (done == threads) return;
    if (done > 0) throw std::runtime_error("a barrier that some threads of the block miss");
    for (unsigned i = 0; i < threads; ++i) device.threads[i].waiting = Waiting::kNot;
  }
}

inline void run_grid(unsigned blocks, unsigned threads, size_t shared_bytes,
                     std::function<void()> kernel) {
  if (threads % kWarp != 0) throw std::runtime_error("a block must be full warps");
  if (blocks == 0) throw std::runtime_error("an empty grid");
  if (shared_bytes > static_cast<size_t>(device.shared_bytes_per_block)) {
    throw std::runtime_error("more shared memory than the device has");
  }
  ++device.launches;
  if (device.threads.size() < threads) device.threads.resize(threads);
  device.kernel = std::move(kernel);
  device.failure = nullptr;
  gridDim = dim3(blocks);
  blockDim = dim3(threads);
  std::mt19937_64 random(device.seed + static_cast<uint64_t>(device.launches));
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  for (const unsigned block : order) {
    blockIdx = dim3(block);
    const auto noise = static_cast<unsigned char>(random() | 1);
    memset(device.shared_memory, noise, kSharedBytes);
    run_block(threads, random);
    for (size_t i = shared_bytes; i < kSharedBytes; ++i) {
      if (device.shared_memory[i] != noise) {
        throw std::runtime_error("a store beyond the shared memory of the block");
      }
    }
  }
}

// Shows a value to the warp, and returns when all lanes have shown theirs.
template <typename Value>
Value exchange(unsigned mask, Value value, unsigned lane) {
  if (mask != 0xFFFFFFFF) fail("a warp operation without all lanes");
  const unsigned self = device.current;
  device.threads[self].value = 0;
  memcpy(&device.threads[self].value, &value, sizeof(Value));
  wait(Waiting::kWarp);
  Value shown;
  memcpy(&shown, &device.threads[self / kWarp * kWarp + lane].value, sizeof(Value));
  // None shows its next value before all have read this one.
  wait(Waiting::kWarp);
  return shown;
}

}  // namespace host_cuda

inline void __syncthreads() { host_cuda::wait(host_cuda::Waiting::kBlock); }

inline int __syncthreads_or(int predicate) {
  using host_cuda::device;
  device.threads[device.current].vote = predicate != 0;
  __syncthreads();
  int any = 0;
  for (unsigned i = 0; i < blockDim.x; ++i) any |= device.threads[i].vote;
  __syncthreads();
  return any;
}

inline void __threadfence() {}

template <typename Value>
Value __ldg(const Value* address) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(Value) != 0) {
    host_cuda::fail("a misaligned load");
  }
  return *address;
}

template <typename Value>
Value __shfl_xor_sync(unsigned mask, Value value, int distance) {
  const unsigned lane = threadIdx.x % host_cuda::kWarp;
  return host_cuda::exchange(mask, value, lane ^ static_cast<unsigned>(distance));
}

template <typename Value>
Value __shfl_up_sync(unsigned mask, Value value, int distance) {
  const unsigned lane = threadIdx.x % host_cuda::kWarp;
  const auto up = static_cast<unsigned>(distance);
  return host_cuda::exchange(mask, value, lane < up ? lane : lane - up);
}

// Only the types CUDA has these atomics for.
template <typename Integer>
Integer atomicAdd(Integer* address, Integer value) {
  static_assert(std::is_same_v<Integer, unsigned> || std::is_same_v<Integer, unsigned long long>);
  const Integer old = *address;
  *address = old + value;
  return old;
}

template <typename Integer>
Integer atomicMin(Integer* address, Integer value) {
  static_assert(std::is_same_v<Integer, unsigned> || std::is_same_v<Integer, unsigned long long>);
  const Integer old = *address;
  *address = std::min(old, value);
  return old;
}

enum cudaError_t { cudaSuccess = 0 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? host_cuda::device.multiprocessors
                                                       : host_cuda::device.shared_bytes_per_block;
  return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  host_cuda::run_grid(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes,
                      [&] { kernel(arguments...); });
  return cudaSuccess;
}
