// Kernels with mistakes that the CUDA model must detect, and kernels with known accesses, for the
// counters. Each works on `memory`, which has 1,024 words.
#include <cuda_runtime.h>

#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>

#include "../../csrc/cuda/launch.cuh"
#include "report.h"

constexpr int kWords = 1024;

__global__ void early_exit_kernel(uint32_t*) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void lonely_lane_kernel(uint32_t* memory) {
  if (threadIdx.x > 0) memory[0] = __shfl_xor_sync(0xFFFFFFFF, threadIdx.x, 1);
}

__global__ void shared_overrun_kernel(uint32_t*) {
  pdp::shared_memory<unsigned char[65]>()[64] = 0;
}

__global__ void overrun_kernel(uint32_t* memory) { memory[kWords + threadIdx.x] = 0; }

__global__ void misaligned_kernel(uint32_t* memory) {
  memory[0] = __ldg(reinterpret_cast<const uint4*>(memory + 1)).x;
}

__global__ void unset_shared_memory_kernel(uint32_t* memory) {
  memory[threadIdx.x] = pdp::shared_memory<uint32_t[32]>()[threadIdx.x];
}

// Each thread copies one word.
__global__ void copy_kernel(uint32_t* memory) {
  memory[kWords / 2 + threadIdx.x] = memory[threadIdx.x];
}

// Lanes read words that are 32 bytes, a sector, apart and not aligned to 16 bytes.
__global__ void strided_kernel(uint32_t* memory) {
  memory[0] = *reinterpret_cast<const volatile uint64_t*>(&memory[8 * threadIdx.x + 2]) & 1;
}

__global__ void one_word_kernel(uint32_t* memory) { atomicAdd(&memory[7], 1u); }

// All lanes access one bank, each another word.
__global__ void one_bank_kernel(uint32_t*) {
  pdp::shared_memory<uint32_t[1024]>()[32 * (threadIdx.x % 32)] = threadIdx.x;
}

__global__ void one_shared_word_kernel(uint32_t*) {
  atomicAdd(&pdp::shared_memory<uint32_t[1024]>()[3], 1u);
}

// Reads what copy_kernel writes.
__global__ void read_only_kernel(uint32_t* memory) {
  memory[0] = __ldg(&memory[kWords / 2 + threadIdx.x]);
}

namespace {

using Kernel = void (*)(uint32_t*);
const std::map<std::string, Kernel> kKernels = {
    {"early exit", early_exit_kernel},
    {"lonely lane", lonely_lane_kernel},
    {"shared overrun", shared_overrun_kernel},
    {"overrun", overrun_kernel},
    {"misaligned", misaligned_kernel},
    {"unset shared memory", unset_shared_memory_kernel},
    {"copy", copy_kernel},
    {"strided", strided_kernel},
    {"one word", one_word_kernel},
    {"one bank", one_bank_kernel},
    {"one shared word", one_shared_word_kernel},
    {"read only", read_only_kernel},
};

}  // namespace

// Launches the kernels of `names`, one per line, each as one block of two warps with 4 KiB of
// shared memory (64 bytes for an overrun). All use one buffer, which is copied to `words` at the
// end.
extern "C" const char* host_self_test(const char* names, uint32_t* words) {
  return host_cuda::report([&] {
    uint32_t* memory = nullptr;
    cudaMalloc(&memory, kWords * sizeof(uint32_t));
    host_cuda::name(memory, kWords * sizeof(uint32_t), "memory");
    pdp::Launcher launcher(nullptr);
    std::string name;
    for (const char* c = names; *c != 0; ++c) {
      if (*c != '\n') {
        name += *c;
        continue;
      }
      launcher.launch(kKernels.at(name), 1, 64, name == "shared overrun" ? 64 : 4096, memory);
      name.clear();
    }
    memcpy(words, memory, kWords * sizeof(uint32_t));
    cudaFree(memory);
  });
}
