// Histograms in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "block.cuh"

namespace pdp {

// One 32-bit counter per bin; no block counts 2^32 keys. Weights crowd into a few exponents, but
// threads of a warp that meet in one bin cost one access only: the hardware adds their number
// (ATOMS.POPC.INC).
template <int kBinsOf>
struct Histogram {
  static constexpr int kBins = kBinsOf;

  uint32_t words[kBins];

  __device__ void clear(int bins = kBins) {
    for (int i = threadIdx.x; i < bins; i += blockDim.x) words[i] = 0;
  }
  __device__ void add(uint32_t bin) { atomicAdd(&words[bin], 1u); }
  __device__ Count operator[](int32_t bin) const { return words[bin]; }
};

template <typename Counters>
__device__ void merge_counters(const Counters& counters, Count* histogram,
                               int bins = Counters::kBins) {
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) {
    const Count count = counters[bin];
    if (count > 0) atomicAdd(&histogram[bin], count);
  }
}

// Copies a histogram that blocks have merged from device memory to shared memory: reading a bin
// after the other there takes longer. Ends without a barrier. Called by all threads.
__device__ inline void copy_histogram(const Count* histogram, int32_t bins, Count* counts) {
#pragma unroll 8
  for (int32_t bin = threadIdx.x; bin < bins; bin += blockDim.x) counts[bin] = histogram[bin];
}

}  // namespace pdp
