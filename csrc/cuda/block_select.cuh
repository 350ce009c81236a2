// Order statistics of an array that one block reads several times: a radix select in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

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

// The bits of a key, which the digits of a radix select share.
template <typename Key>
constexpr int32_t kKeyBits = kDigitsOf<Key>.digit(0).shift + kDigitsOf<Key>.digit(0).bits;

// Returns the order statistic of a rank among key_at(0), ..., key_at(size - 1), which are below
// 2^bits. It begins with a barrier, so other threads of the block may have written the keys. Called
// by all threads.
template <typename Key, typename KeyAt>
__device__ OrderStatistic<Key> select_in_block(KeyAt key_at, int64_t size, int64_t rank,
                                               int32_t bits, SelectScratch<Key>& scratch) {
  constexpr int32_t kWidest = kDigitsOf<Key>.bits[0];
  OrderStatistic<Key> found = {0, rank, size};
  while (bits > 0) {
    const int32_t width = min(bits, kWidest), bins = 1 << width;
    bits -= width;
    scratch.counters.clear(bins);
    __syncthreads();
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
      const Key key = key_at(i);
      if (key >> bits >> width == found.key) {
        scratch.counters.add(static_cast<uint32_t>(key >> bits) & (bins - 1));
      }
    }
    __syncthreads();
    const auto count = [&](int32_t bin) { return scratch.counters[bin]; };
    find_rank(count, bins, static_cast<Count>(found.rank), scratch.rank);
    found.key = static_cast<Key>(found.key << width) | static_cast<Key>(scratch.rank.bin);
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

// Calls function(an integral constant) for every index, in order.
template <typename Function, size_t... kIndices>
__device__ void for_each_digit(Function function, std::index_sequence<kIndices...>) {
  (function(std::integral_constant<int64_t, kIndices>()), ...);
}

// Writes the keys of two 0-based ranks to scratch.keys. for_each_key(visit) calls visit(key) for
// every key of the calling thread; it is called for each digit, which is counted for both ranks at
// once. Ends with a barrier. Called by all of kThreads threads.
template <typename Key, int kThreads, typename ForEachKey>
__device__ void select_two_in_block(ForEachKey for_each_key, uint32_t first, uint32_t second,
                                    SelectTwoScratch<Key>& scratch) {
  constexpr KeyDigits kDigits = kDigitsOf<Key>;
  constexpr int kLaterBins = SelectTwoScratch<Key>::kLaterBins;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  if (thread < 2) {
    scratch.ranks[thread] = thread == 0 ? first : second;
    scratch.keys[thread] = 0;
  }
  const auto count_digit = [&](auto index) {
    constexpr Digit kDigit = kDigits.digit(decltype(index)::value);
    constexpr int32_t kBins = kDigit.bins(), kRun = (kBins + kThreads - 1) / kThreads;
    constexpr int32_t kSecond = kDigit.first ? 0 : kLaterBins;  // the second rank's histogram
    for (int32_t i = thread; i < kSecond + kBins; i += kThreads) scratch.counts[i] = 0;
    __syncthreads();
    const Key prefixes[2] = {scratch.keys[0], scratch.keys[1]};
    const uint32_t ranks[2] = {scratch.ranks[0], scratch.ranks[1]};
    for_each_key([&](Key key) {
      const uint32_t bin = static_cast<uint32_t>(key >> kDigit.shift) & (kBins - 1);
      const Key head = key >> kDigit.shift >> kDigit.bits;
      if (kDigit.first || head == prefixes[0]) atomicAdd(&scratch.counts[bin], 1u);
      if (!kDigit.first && head == prefixes[1]) atomicAdd(&scratch.counts[kSecond + bin], 1u);
    });
    __syncthreads();

    // Both histograms are summed at once, in the two halves of a word.
    const int32_t begin = thread * kRun;
    uint32_t mine = 0;
#pragma unroll
    for (int32_t i = 0; i < kRun; ++i) {
      if (begin + i >= kBins) continue;
      mine += scratch.counts[begin + i] | scratch.counts[kSecond + begin + i] << 16;
    }
    const uint32_t lower = sum_of_lower_threads(mine, scratch.warp_sums);
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      uint32_t below = lower >> 16 * which & 0xFFFF;
      const uint32_t own = mine >> 16 * which & 0xFFFF;
      if (below > ranks[which] || ranks[which] - below >= own) continue;
      const uint32_t* counts = &scratch.counts[which * kSecond];
      int32_t bin = begin;
      for (; below + counts[bin] <= ranks[which]; ++bin) below += counts[bin];
      scratch.ranks[which] = ranks[which] - below;
      scratch.keys[which] =
          static_cast<Key>(prefixes[which] << kDigit.bits) | static_cast<Key>(bin);
    }
    __syncthreads();
  };
  for_each_digit(count_digit, std::make_index_sequence<kDigits.count>());
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
