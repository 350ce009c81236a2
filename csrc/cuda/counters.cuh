// Histograms in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "block.cuh"

namespace pdp {

// One 32-bit counter per bin. Threads of a warp that meet in one bin, as weights crowded into a few
// exponents do, cost one access: the hardware adds their number (ATOMS.POPC.INC).
template <int kBinsOf>
struct WideCounters {
  static constexpr int kBins = kBinsOf;
  // Keys after which a counter might overflow; a GPU has no memory for so many per block.
  static constexpr int64_t kMaxKeys = UINT32_MAX;

  uint32_t words[kBins];

  __device__ void clear() {
    for (int i = threadIdx.x; i < kBins; i += blockDim.x) words[i] = 0;
  }
  __device__ void add(uint32_t bin) { atomicAdd(&words[bin], 1u); }
  __device__ Count operator[](int32_t bin) const { return words[bin]; }
};

// Two 16-bit counters to a word, for devices with less than 128 KiB of shared memory in a block.
template <int kBinsOf>
struct PackedCounters {
  static constexpr int kBins = kBinsOf;
  // Keys after which a counter might overflow into its neighbour.
  static constexpr int64_t kMaxKeys = 65535;

  uint32_t words[kBins / 2];

  __device__ void clear() {
    for (int i = threadIdx.x; i < kBins / 2; i += blockDim.x) words[i] = 0;
  }
  __device__ void add(uint32_t bin) { atomicAdd(&words[bin / 2], bin % 2 == 0 ? 1u : 0x10000u); }
  __device__ Count operator[](int32_t bin) const {
    const uint32_t word = words[bin / 2];
    return bin % 2 == 0 ? word & 0xFFFF : word >> 16;
  }
};

}  // namespace pdp
