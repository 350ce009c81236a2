// The interface of the scheduler (engine.cpp) to the CUDA model (cuda_runtime.h).
//
// Declarations only: kernels may be compiled with ThreadSanitizer's instrumentation, the scheduler
// never is. The linker would use the instrumented copy of an inline function for both.
#pragma once

#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x;
};

// Those of the running thread.
extern uint3 threadIdx, blockIdx, blockDim, gridDim;

// The callbacks of counters.cpp; null if it is not linked.
extern "C" {
__attribute__((weak)) void host_cuda_launched();
__attribute__((weak)) void host_cuda_read_only_load(const void* address, size_t bytes);
__attribute__((weak)) void host_cuda_atomic(const void* address, size_t bytes,
                                            const void* instruction);
__attribute__((weak)) void host_cuda_name_buffer(const void* begin, size_t bytes, const char* name,
                                                 int is_table);
}

namespace host_cuda {

// The device, as a test sets and reads it.
struct Device {
  int multiprocessors = 2;
  int shared_bytes_per_block = 227 * 1024;
  uint64_t seed = 0;  // of the order in which blocks, warps and lanes run
  int number = 0;
  int architecture_of_code = 90;
  int64_t launches = 0;
  int64_t overlapped_launches = 0;  // with an attribute that lets them begin early
  const void* kernel = nullptr;     // launched last
  int mutation = 0;  // the deliberate mistake of a mutated source that is switched on; 0: none
};

extern Device device;

// Runs call(argument) in every thread of a grid. Returns null, or an error message.
const char* run_grid(unsigned blocks, unsigned threads, size_t shared_bytes, void (*call)(void*),
                     void* argument);

// Whether a thread of a grid is running.
bool in_kernel();

// A thread of a grid calls the functions below.

// Ends the grid.
[[noreturn]] void fail(const char* message);

unsigned char* shared_memory();
size_t shared_bytes();

// __syncthreads_or
bool barrier(bool vote);

// Shows a value to the warp. Returns the value of `lane` once all lanes have shown theirs.
uint64_t exchange(uint64_t value, unsigned lane);

// Shows a vote to the warp. Returns those of all lanes, a bit for each.
uint32_t ballot(bool vote);

// __threadfence
void fence();

// Around a relaxed atomic operation of device scope: other threads may run before it.
void before_atomic(const void* address, size_t bytes);
void after_atomic(const void* address);

}  // namespace host_cuda
