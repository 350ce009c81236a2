// Histograms in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "block.cuh"

namespace pdp {

// One 32-bit counter per bin. Weights crowd into a few exponents, but threads of a warp that meet
// in one bin cost one access only: the hardware adds their number (ATOMS.POPC.INC).
template <int kBinsOf>
struct WideCounters {
  static constexpr int kBins = kBinsOf;
  // A counter may overflow after this many keys, more than a block ever has.
  static constexpr int64_t kMaxKeys = UINT32_MAX;

  uint32_t words[kBins];

  __device__ void clear() {
    for (int i = threadIdx.x; i < kBins; i += blockDim.x) words[i] = 0;
  }
  __device__ void add(uint32_t bin) { atomicAdd(&words[bin], 1u); }
  __device__ Count operator[](int32_t bin) const { return words[bin]; }
};

// Two 16-bit counters per word, for devices with less than 128 KiB of shared memory per block.
template <int kBinsOf>
struct PackedCounters {
  static constexpr int kBins = kBinsOf;
  // A counter may overflow into its neighbour after this many keys.
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
