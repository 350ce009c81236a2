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
// after the other there takes longer. All loads come before the first store: a loop that ends at
// `bins` would wait for each, even unrolled. Ends without a barrier. Called by all of kThreads
// threads, for at most kEach bins each.
template <int kThreads, int kEach>
__device__ void copy_histogram(const Count* histogram, int32_t bins, Count* counts) {
  if constexpr (kEach > 1) {
    if (bins <= kEach / 2 * kThreads) {
      copy_histogram<kThreads, kEach / 2>(histogram, bins, counts);
      return;
    }
  }
  Count loaded[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    // No branch, for nvcc would put the stores between the branches.
    loaded[i] = histogram[min(static_cast<int32_t>(threadIdx.x) + i * kThreads, bins - 1)];
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int32_t bin = static_cast<int32_t>(threadIdx.x) + i * kThreads;
    if (bin < bins) counts[bin] = loaded[i];
  }
}

}  // namespace pdp
