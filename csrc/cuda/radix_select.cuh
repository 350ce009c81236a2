// The k-th and k+1-th smallest magnitude of every tensor of a list, by radix select.
//
// Each pass counts one digit of the keys that share the digits of v_k found so far. The last block
// to finish a tensor picks the next digit from the tensor's histogram. Keys above the chosen bin
// are dropped, except that the smallest of them is remembered: it is v_{k+1} if the last bin has
// none. Alabi, Blanchard, Gordon, Steinbach, "Fast k-selection algorithms for graphics processing
// units" (2012).
//
//   float32            11 + 10 + 10 bits, the last pass over candidates only
//   float64            11 + 11 + 11 + 10 + 10 + 10 bits, the later passes over candidates only
//   bfloat16, float16  15 bits, one pass
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../digits.h"
#include "../magnitude.h"
#include "block.cuh"
#include "counters.cuh"
#include "weight_table.cuh"

namespace pdp {

// For each key width: threads per block, blocks per multiprocessor, the digits, and the histograms
// of the first digit and of later ones. SmallCounters take the place of FirstCounters on a device
// with too little shared memory. Threads and blocks are not yet measured on a GPU.
template <typename Key>
struct RadixSelect;

template <>
struct RadixSelect<uint64_t> {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 4;
  static constexpr KeyDigits kDigits = key_digits(8);
  using FirstCounters = WideCounters<1 << kDigits.bits[0]>;
  using SmallCounters = FirstCounters;
  using LaterCounters = WideCounters<1 << kDigits.bits[1]>;
};

template <>
struct RadixSelect<uint32_t> {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 6;
  static constexpr KeyDigits kDigits = key_digits(4);
  using FirstCounters = WideCounters<1 << kDigits.bits[0]>;
  using SmallCounters = FirstCounters;
  using LaterCounters = WideCounters<1 << kDigits.bits[1]>;
};

template <>
struct RadixSelect<uint16_t> {
  static constexpr int kThreads = 1024;
  static constexpr int kBlocks = 1;
  static constexpr KeyDigits kDigits = {1, {15}};
  using FirstCounters = WideCounters<1 << kDigits.bits[0]>;
  using SmallCounters = PackedCounters<1 << kDigits.bits[0]>;
};

template <typename Key, int kThreads = RadixSelect<Key>::kThreads, typename Visit,
          typename EndRound>
__device__ void for_each_weight_key(const TableEntry& entry, int64_t begin, int64_t end,
                                    Visit visit, EndRound end_round) {
  const auto visit_weight = [&](auto weight) { visit(magnitude_key(weight)); };
  if constexpr (sizeof(Key) == sizeof(double)) {
    for_each<kThreads>(static_cast<const double*>(entry.data), begin, end, visit_weight, end_round);
  } else if constexpr (sizeof(Key) == sizeof(float)) {
    for_each<kThreads>(static_cast<const float*>(entry.data), begin, end, visit_weight, end_round);
  } else if (entry.type == WeightType::kBFloat16) {
    for_each<kThreads>(static_cast<const BFloat16*>(entry.data), begin, end, visit_weight,
                       end_round);
  } else {
    for_each<kThreads>(static_cast<const Half*>(entry.data), begin, end, visit_weight, end_round);
  }
}

template <typename Key>
__device__ double threshold_of(WeightType type, Key kth, Key next, int64_t k, int64_t n) {
  if constexpr (sizeof(Key) == sizeof(double)) {
    return threshold_between<double>(kth, next, k, n);
  } else if constexpr (sizeof(Key) == sizeof(float)) {
    return threshold_between<float>(kth, next, k, n);
  } else if (type == WeightType::kBFloat16) {
    return threshold_between<BFloat16>(kth, next, k, n);
  } else {
    return threshold_between<Half>(kth, next, k, n);
  }
}

// Picks the next digit of v_k from the tensor's histogram. Called by all threads.
template <typename Key, typename CountOf>
__device__ void pick_digit(const Selection<Key>& selection, Digit digit, const Slice<Key>& slice,
                           CountOf count, RankScratch& scratch) {
  SelectionState<Key>& state = selection.states[slice.tensor];
  const int32_t bins = digit.bins();
  const int64_t rank_in_prefix = state.rank;
  find_rank(count, bins, static_cast<Count>(rank_in_prefix), scratch);
  const int64_t rank = rank_in_prefix - static_cast<int64_t>(scratch.below);
  const bool kth_is_last_of_bin = rank + 1 == static_cast<int64_t>(scratch.count);
  if (digit.last && kth_is_last_of_bin) find_next_bin(count, bins, scratch);
  if (threadIdx.x != 0) return;

  const Key prefix = static_cast<Key>(state.prefix << digit.bits);
  const Key kth = prefix | static_cast<Key>(scratch.bin);
  if (state.reserved > 0) state.buffered = static_cast<int64_t>(state.reserved);
  state.prefix = kth;
  state.rank = rank;
  state.count = static_cast<int64_t>(scratch.count);
  if (!digit.last) return;
  Key next = kth;
  if (kth_is_last_of_bin) {
    next = static_cast<int32_t>(scratch.next) < bins ? prefix | static_cast<Key>(scratch.next)
                                                     : state.next;
  }
  const int32_t position = slice.entry.position;
  const double threshold =
      threshold_of(slice.entry.type, kth, next, selection.prune_counts[position], slice.entry.size);
  selection.thresholds.store(position, threshold);
}

template <typename Counters>
__device__ void merge_counters(const Counters& counters, Count* histogram) {
  for (int bin = threadIdx.x; bin < Counters::kBins; bin += blockDim.x) {
    const Count count = counters[bin];
    if (count > 0) atomicAdd(&histogram[bin], count);
  }
}

// Counts a key's digit if the key's higher digits equal the prefix, and returns whether they do.
// `next` becomes the smallest key so far whose higher digits are above the prefix.
template <typename Key, typename Counters>
__device__ bool count_digit(Key key, Key prefix, Digit digit, Counters& counters, Key& next) {
  const Key head = key >> (digit.shift + digit.bits);
  if (head > prefix) next = min(next, key);
  if (head != prefix) return false;
  const Key digit_mask = (Key{1} << digit.bits) - 1;
  counters.add(static_cast<uint32_t>((key >> digit.shift) & digit_mask));
  return true;
}

// Picks the tensor's digit if no other block still has to count. Called by all threads, once the
// block has counted its slice.
template <typename Key, typename Shared>
__device__ void finish_slice(const Selection<Key>& selection, Digit digit, const Slice<Key>& slice,
                             bool flushed, Shared& shared) {
  __syncthreads();
  if (slice.is_whole_tensor() && !flushed) {
    const auto count = [&](int32_t bin) { return shared.counters[bin]; };
    pick_digit(selection, digit, slice, count, shared.rank);
    return;
  }
  Count* histogram = histogram_of(selection, slice.tensor, slice.entry);
  merge_counters(shared.counters, histogram);
  Count* tiles_done = &selection.states[slice.tensor].tiles_done;
  const auto tiles = static_cast<Count>(tiles_of<Key>(slice.entry.size));
  if (!last_to_arrive(tiles_done, static_cast<Count>(slice.tiles), tiles, shared.last)) return;
  const auto count = [&](int32_t bin) { return histogram[bin]; };
  pick_digit(selection, digit, slice, count, shared.rank);
  for (int32_t bin = threadIdx.x; bin < selection.bins; bin += blockDim.x) histogram[bin] = 0;
  // An atomic, since nothing else orders this after the other blocks' atomics on it.
  if (threadIdx.x == 0) atomicExch(tiles_done, Count{0});
}

template <typename Key, typename Counters>
struct FirstDigitShared {
  Counters counters;
  RankScratch rank;
  Slice<Key> slice;
  bool last;
};

template <typename Key, typename Counters>
__global__ void __launch_bounds__(RadixSelect<Key>::kThreads, RadixSelect<Key>::kBlocks)
    first_digit_kernel(Selection<Key> selection, Digit digit) {
  auto& shared = shared_memory<FirstDigitShared<Key, Counters>>();
  for_each_slice(selection, shared.slice, [&] {
    const Slice<Key>& slice = shared.slice;
    if (selection.states[slice.tensor].rank < 0) return;
    const int64_t begin = slice.weights_begin();
    const int64_t end = slice.weights_end();
    shared.counters.clear();
    __syncthreads();
    for (int64_t round = begin; round < end; round += Counters::kMaxKeys) {
      if (round > begin) {
        __syncthreads();
        merge_counters(shared.counters, histogram_of(selection, slice.tensor, slice.entry));
        __syncthreads();
        shared.counters.clear();
        __syncthreads();
      }
      for_each_weight_key<Key>(
          slice.entry, round, min(round + Counters::kMaxKeys, end),
          [&](Key key) { shared.counters.add(static_cast<uint32_t>(key >> digit.shift)); }, [] {});
    }
    finish_slice(selection, digit, slice, end - begin > Counters::kMaxKeys, shared);
  });
}

// Collects candidates in shared memory, so that one reservation in device memory serves thousands.
template <typename Key>
struct Stage {
  static constexpr int kRound = round_elements<Key>(RadixSelect<Key>::kThreads);
  static constexpr int kCapacity = kRound + 4096 / static_cast<int>(sizeof(Key));

  Key keys[kCapacity];
  uint32_t size;
  Count place;

  // Returns the number of keys in the stage, this one included.
  __device__ uint32_t push(Key key) {
    const uint32_t slot = atomicAdd(&size, 1u);
    keys[slot] = key;
    return slot + 1;
  }

  // Called by all threads, after a barrier.
  __device__ void flush(Count* reserved, Key* candidates) {
    if (threadIdx.x == 0) place = atomicAdd(reserved, static_cast<Count>(size));
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < size; i += blockDim.x) candidates[place + i] = keys[i];
    __syncthreads();
    if (threadIdx.x == 0) size = 0;
    __syncthreads();
  }
};

template <typename Key>
struct LaterDigitShared {
  typename RadixSelect<Key>::LaterCounters counters;
  Stage<Key> stage;
  RankScratch rank;
  Slice<Key> slice;
  Key next;
  bool last;
};

__device__ inline void atomic_min(uint32_t* address, uint32_t value) { atomicMin(address, value); }
__device__ inline void atomic_min(uint64_t* address, uint64_t value) {
  atomicMin(reinterpret_cast<Count*>(address), static_cast<Count>(value));
}

// Reads the candidates if an earlier pass has collected them, otherwise the weights. Collects
// candidates if all keys with the prefix fit: the last histogram says how many there are, so the
// buffer is either filled exactly or not used.
template <typename Key>
__global__ void __launch_bounds__(RadixSelect<Key>::kThreads, RadixSelect<Key>::kBlocks)
    later_digit_kernel(Selection<Key> selection, Digit digit) {
  auto& shared = shared_memory<LaterDigitShared<Key>>();
  for_each_slice(selection, shared.slice, [&] {
    const Slice<Key>& slice = shared.slice;
    SelectionState<Key>& state = selection.states[slice.tensor];
    if (state.rank < 0) return;
    const Key prefix = state.prefix;
    const int64_t buffered = state.buffered;
    Key* candidates = selection.candidates + slice.entry.candidates_begin;
    const bool collect =
        buffered == 0 && !digit.last && state.count <= candidate_capacity(slice.entry.size);
    shared.counters.clear();
    if (threadIdx.x == 0) {
      shared.stage.size = 0;
      shared.next = ~Key{0};
    }
    __syncthreads();

    Key next = ~Key{0};
    const auto count = [&](Key key) {
      return count_digit(key, prefix, digit, shared.counters, next);
    };
    if (buffered > 0) {
      // Only the device knows how many there are: each tile of weights stands for an equal number.
      const int64_t per_tile = buffered / tiles_of<Key>(slice.entry.size) + 1;
      const int64_t begin = min(slice.first_tile * per_tile, buffered);
      for_each<RadixSelect<Key>::kThreads, Memory::kWorkspace>(
          candidates, begin, min(begin + slice.tiles * per_tile, buffered), count);
    } else if (!collect) {
      for_each_weight_key<Key>(slice.entry, slice.weights_begin(), slice.weights_end(), count,
                               [] {});
    } else {
      constexpr uint32_t kFull = Stage<Key>::kCapacity - Stage<Key>::kRound;
      uint32_t filled = 0;
      const auto collect_key = [&](Key key) {
        if (count(key)) filled = shared.stage.push(key);
      };
      const auto flush_if_full = [&] {
        if (__syncthreads_or(filled > kFull)) {
          shared.stage.flush(&state.reserved, candidates);
          filled = 0;
        }
      };
      for_each_weight_key<Key>(slice.entry, slice.weights_begin(), slice.weights_end(), collect_key,
                               flush_if_full);
      __syncthreads();
      shared.stage.flush(&state.reserved, candidates);
    }

    next = warp_reduce(next, [](Key a, Key b) { return min(a, b); });
    if (threadIdx.x % kWarp == 0) atomic_min(&shared.next, next);
    __syncthreads();
    if (threadIdx.x == 0) atomic_min(&state.next, shared.next);
    finish_slice(selection, digit, slice, false, shared);
  });
}

}  // namespace pdp
