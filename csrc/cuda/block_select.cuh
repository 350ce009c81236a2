// Order statistics of an array that one block reads several times: a radix select in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../digits.h"
#include "block.cuh"
#include "histogram.cuh"

namespace pdp {

template <typename Key>
constexpr KeyDigits kDigitsOf = key_digits(sizeof(Key));

// A key in a type that CUDA has an atomic minimum for.
template <typename Key>
using WideKey = std::conditional_t<sizeof(Key) == 8, uint64_t, uint32_t>;

template <typename Key>
using DigitHistogram = Histogram<1 << kDigitsOf<Key>.bits[0]>;

__device__ inline void atomic_min(uint32_t* address, uint32_t value) { atomicMin(address, value); }
__device__ inline void atomic_min(uint64_t* address, uint64_t value) {
  atomicMin(reinterpret_cast<Count*>(address), static_cast<Count>(value));
}

// The key of a 0-based rank among the keys of an array.
template <typename Key>
struct OrderStatistic {
  Key key;
  int64_t rank;   // among the keys that equal it
  int64_t count;  // how many these are
};

template <typename Key>
struct SelectScratch {
  DigitHistogram<Key> counters;
  RankScratch rank;
  WideKey<Key> least;
};

// Returns the order statistic of a rank among key_at(0), ..., key_at(size - 1). It begins with a
// barrier, so other threads of the block may have written the keys. Called by all threads.
template <typename Key, typename KeyAt>
__device__ OrderStatistic<Key> select_in_block(KeyAt key_at, int64_t size, int64_t rank,
                                               SelectScratch<Key>& scratch) {
  constexpr KeyDigits kDigits = kDigitsOf<Key>;
  OrderStatistic<Key> found = {0, rank, size};
#pragma unroll
  for (int index = 0; index < kDigits.count; ++index) {
    const Digit digit = kDigits.digit(index);
    scratch.counters.clear();
    __syncthreads();
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
      const Key key = key_at(i);
      if (key >> digit.shift >> digit.bits == found.key) {
        scratch.counters.add(static_cast<uint32_t>(key >> digit.shift) & (digit.bins() - 1));
      }
    }
    __syncthreads();
    const auto count = [&](int32_t bin) { return scratch.counters[bin]; };
    find_rank(count, digit.bins(), static_cast<Count>(found.rank), scratch.rank);
    found.key = static_cast<Key>(found.key << digit.bits) | static_cast<Key>(scratch.rank.bin);
    found.rank -= static_cast<int64_t>(scratch.rank.below);
    found.count = static_cast<int64_t>(scratch.rank.count);
  }
  return found;
}

// Two ranks among fewer than 2^16 keys, and where they lead.
template <typename Key>
struct SelectTwoScratch {
  static constexpr int kFirstBins = 1 << kDigitsOf<Key>.bits[0];
  static constexpr int kLaterBins = 1 << kDigitsOf<Key>.bits[1];

  // The first digit's histogram, or one of a later digit for each rank.
  uint32_t counts[kFirstBins > 2 * kLaterBins ? kFirstBins : 2 * kLaterBins];
  uint32_t warp_sums[kWarp];
  uint32_t ranks[2];
  Key keys[2];
};

// Writes the keys of two 0-based ranks among key_at(0), ..., key_at(size - 1) to scratch.keys. It
// counts a digit for both in one pass. It begins with a barrier and ends with one. Called by all
// threads.
template <typename Key, typename KeyAt>
__device__ void select_two_in_block(KeyAt key_at, int32_t size, uint32_t first, uint32_t second,
                                    SelectTwoScratch<Key>& scratch) {
  constexpr KeyDigits kDigits = kDigitsOf<Key>;
  constexpr int kLaterBins = SelectTwoScratch<Key>::kLaterBins;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  if (thread < 2) {
    scratch.ranks[thread] = thread == 0 ? first : second;
    scratch.keys[thread] = 0;
  }
#pragma unroll
  for (int index = 0; index < kDigits.count; ++index) {
    const Digit digit = kDigits.digit(index);
    const int32_t bins = digit.bins();
    for (int32_t i = thread; i < (index == 0 ? bins : 2 * kLaterBins); i += blockDim.x) {
      scratch.counts[i] = 0;
    }
    __syncthreads();
    const Key prefixes[2] = {scratch.keys[0], scratch.keys[1]};
    const uint32_t ranks[2] = {scratch.ranks[0], scratch.ranks[1]};
    for (int32_t i = thread; i < size; i += blockDim.x) {
      const Key key = key_at(i);
      const uint32_t bin = static_cast<uint32_t>(key >> digit.shift) & (bins - 1);
      if (index == 0) {
        atomicAdd(&scratch.counts[bin], 1u);
      } else {
        const Key head = key >> digit.shift >> digit.bits;
        if (head == prefixes[0]) atomicAdd(&scratch.counts[bin], 1u);
        if (head == prefixes[1]) atomicAdd(&scratch.counts[kLaterBins + bin], 1u);
      }
    }
    __syncthreads();

    // Both histograms are summed at once, in the two halves of a word.
    const int32_t offset = index == 0 ? 0 : kLaterBins;
    const auto count = [&](int32_t bin) {
      return scratch.counts[bin] | scratch.counts[offset + bin] << 16;
    };
    const BinRun<uint32_t> run = sum_bins(count, bins, scratch.warp_sums);
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      uint32_t below = run.below >> 16 * which & 0xFFFF;
      const uint32_t mine = run.mine >> 16 * which & 0xFFFF;
      if (below > ranks[which] || ranks[which] - below >= mine) continue;
      const uint32_t* counts = &scratch.counts[which * offset];
      int32_t bin = run.begin;
      for (; below + counts[bin] <= ranks[which]; ++bin) below += counts[bin];
      scratch.ranks[which] = ranks[which] - below;
      scratch.keys[which] = static_cast<Key>(prefixes[which] << digit.bits) | static_cast<Key>(bin);
    }
    __syncthreads();
  }
}

// Returns the smallest of key_at(0), ..., key_at(size - 1) that is above a key, or `otherwise` if
// that is smaller. Called by all threads.
template <typename Key, typename KeyAt>
__device__ Key least_above(Key key, KeyAt key_at, int64_t size, Key otherwise,
                           SelectScratch<Key>& scratch) {
  __syncthreads();
  if (threadIdx.x == 0) scratch.least = otherwise;
  __syncthreads();
  WideKey<Key> least = otherwise;
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
    const Key other = key_at(i);
    if (other > key) least = min(least, WideKey<Key>{other});
  }
  least = warp_reduce(least, [](WideKey<Key> a, WideKey<Key> b) { return min(a, b); });
  if (threadIdx.x % kWarp == 0) atomic_min(&scratch.least, least);
  __syncthreads();
  return static_cast<Key>(scratch.least);
}

}  // namespace pdp
