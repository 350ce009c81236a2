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
//   bfloat16, float16  8 + 7 bits
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../digits.h"
#include "../magnitude.h"
#include "block.cuh"
#include "block_select.cuh"
#include "histogram.cuh"
#include "launch.cuh"
#include "selection.cuh"
#include "weight_table.cuh"

namespace pdp {

template <typename Key, typename Visit, typename EndRound>
__device__ void for_each_weight_key(const TableEntry& entry, int64_t begin, int64_t end,
                                    Visit visit, EndRound end_round) {
  with_weights<Key>(entry, [&](const auto* weights) {
    const auto visit_weight = [&](auto weight) { visit(magnitude_key(weight)); };
    for_each<kSelectionThreads>(weights, begin, end, visit_weight, end_round);
  });
}

// Picks the next digit of v_k from the tensor's histogram. Called by all threads.
template <typename Key, typename CountOf>
__device__ void pick_digit(const Selection<Key>& selection, Digit digit, const Slice<Key>& slice,
                           const Search<Key>& search, CountOf count, RankScratch& scratch) {
  SelectionState<Key>& state = selection.states[slice.tensor];
  const int32_t bins = digit.bins();
  const int64_t rank_in_prefix = search.rank;
  find_rank(count, bins, static_cast<Count>(rank_in_prefix), scratch);
  const int64_t rank = rank_in_prefix - static_cast<int64_t>(scratch.below);
  const bool kth_is_last_of_bin = rank + 1 == static_cast<int64_t>(scratch.count);
  if (digit.last && kth_is_last_of_bin) find_next_bin(count, bins, scratch);
  if (threadIdx.x != 0) return;

  const Key prefix = static_cast<Key>(search.prefix << digit.bits);
  const Key kth = prefix | static_cast<Key>(scratch.bin);
  if (state.reserved > 0) state.buffered = static_cast<int64_t>(state.reserved);
  state.prefix = kth;
  state.rank = rank;
  state.count = static_cast<int64_t>(scratch.count);
  if (!digit.last) return;
  Key next = kth;
  if (kth_is_last_of_bin) {
    const bool inside = static_cast<int32_t>(scratch.next) < bins;
    next = static_cast<Key>(inside ? prefix | static_cast<Key>(scratch.next) : state.next);
  }
  store_found(selection, slice.entry, {kth, rank, static_cast<int64_t>(scratch.count)}, next,
              state);
}

// Counts a key's digit if the key's higher digits equal the prefix, and returns whether they do.
// `next` becomes the smallest key so far whose higher digits are above the prefix.
template <typename Key, typename Counters, typename Next>
__device__ bool count_digit(Key key, Key prefix, Digit digit, Counters& counters, Next& next) {
  const Key head = key >> (digit.shift + digit.bits);
  if (head > prefix) next = min(next, Next{key});
  if (head != prefix) return false;
  const Key digit_mask = (Key{1} << digit.bits) - 1;
  counters.add(static_cast<uint32_t>((key >> digit.shift) & digit_mask));
  return true;
}

// Picks the tensor's digit if no other block still has to count. Called by all threads, once the
// block has counted its slice.
template <typename Key, typename Shared>
__device__ void finish_slice(const Selection<Key>& selection, Digit digit, const Slice<Key>& slice,
                             Shared& shared) {
  __syncthreads();
  if (slice.is_whole_tensor()) {
    const auto count = [&](int32_t bin) { return shared.counters[bin]; };
    pick_digit(selection, digit, slice, shared.search, count, shared.rank);
    return;
  }
  Count* histogram = histogram_of(selection, slice.tensor, slice.entry);
  merge_counters(shared.counters, histogram);
  Count* tiles_done = &selection.states[slice.tensor].tiles_done;
  const auto tiles = static_cast<Count>(slice.entry.tiles);
  if (!last_to_arrive(tiles_done, static_cast<Count>(slice.tiles), tiles, shared.last)) return;
  constexpr int kEach = DigitHistogram<Key>::kBins / kSelectionThreads;
  copy_histogram<kSelectionThreads, kEach>(histogram, digit.bins(), shared.merged);
  __syncthreads();
  const auto count = [&](int32_t bin) { return shared.merged[bin]; };
  pick_digit(selection, digit, slice, shared.search, count, shared.rank);
  for (int32_t bin = threadIdx.x; bin < digit.bins(); bin += blockDim.x) histogram[bin] = 0;
  // An atomic, as every access to this counter by a block is.
  if (threadIdx.x == 0) atomicExch(tiles_done, Count{0});
}

// Whether a tensor is left to a radix select. Called by all threads.
template <typename Key>
__device__ bool has_work(const Selection<Key>& selection) {
  if (!selection.sampled) return true;
  return __syncthreads_or(threadIdx.x == 0 && *selection.unfinished > 0);
}

template <typename Key>
struct FirstDigitShared {
  DigitHistogram<Key> counters;
  Count merged[DigitHistogram<Key>::kBins];
  RankScratch rank;
  Slice<Key> slice;
  Search<Key> search;
  bool last;
};

template <typename Key>
__global__ void __launch_bounds__(kSelectionThreads, kSelectionBlocks)
    first_digit_kernel(Selection<Key> selection, Digit digit) {
  wait_for_earlier_kernels();
  auto& shared = shared_memory<FirstDigitShared<Key>>();
  if (!has_work(selection)) return;
  for_each_slice(selection, shared.slice, search_loader(selection, shared), [&] {
    const Slice<Key>& slice = shared.slice;
    if (shared.search.stage != Stage::kDigits) return;
    shared.counters.clear();
    __syncthreads();
    for_each_weight_key<Key>(
        slice.entry, slice.weights_begin(), slice.weights_end(),
        [&](Key key) { shared.counters.add(static_cast<uint32_t>(key >> digit.shift)); }, [] {});
    finish_slice(selection, digit, slice, shared);
  });
}

// Collects candidates in shared memory, so that one reservation in device memory serves thousands.
template <typename Key>
struct CandidateStage {
  static constexpr int kRound = round_elements<Key>(kSelectionThreads);
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
  using Counters = Histogram<1 << kDigitsOf<Key>.bits[1]>;

  Counters counters;
  union {
    CandidateStage<Key> stage;
    Count merged[Counters::kBins];  // once the block has flushed its stage
  };
  RankScratch rank;
  Slice<Key> slice;
  Search<Key> search;
  WideKey<Key> next;
  bool last;
};

// Reads the candidates if an earlier pass has collected them, otherwise the weights. Collects
// candidates if all keys with the prefix fit: the last histogram says how many there are, so the
// buffer is either filled exactly or not used.
template <typename Key>
__global__ void __launch_bounds__(kSelectionThreads, kSelectionBlocks)
    later_digit_kernel(Selection<Key> selection, Digit digit) {
  wait_for_earlier_kernels();
  auto& shared = shared_memory<LaterDigitShared<Key>>();
  if (!has_work(selection)) return;
  for_each_slice(selection, shared.slice, search_loader(selection, shared), [&] {
    const Slice<Key>& slice = shared.slice;
    SelectionState<Key>& state = selection.states[slice.tensor];
    if (shared.search.stage != Stage::kDigits) return;
    const Key prefix = shared.search.prefix;
    const int64_t buffered = shared.search.buffered;
    Key* candidates = selection.candidates_of(slice.entry);
    const bool collect = kCollects<Key> && buffered == 0 && !digit.last &&
                         shared.search.count <= candidate_capacity(slice.entry.size);
    shared.counters.clear();
    if (threadIdx.x == 0) {
      shared.stage.size = 0;
      shared.next = ~WideKey<Key>{0};
    }
    __syncthreads();

    WideKey<Key> next = ~WideKey<Key>{0};
    const auto count = [&](Key key) {
      return count_digit(key, prefix, digit, shared.counters, next);
    };
    if (kCollects<Key> && buffered > 0) {
      const auto range = slice.range_of(buffered);
      for_each<kSelectionThreads, Memory::kWorkspace>(candidates, range.begin, range.end, count);
    } else if (!collect) {
      for_each_weight_key<Key>(slice.entry, slice.weights_begin(), slice.weights_end(), count,
                               [] {});
    } else {
      constexpr uint32_t kFull = CandidateStage<Key>::kCapacity - CandidateStage<Key>::kRound;
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

    next = warp_reduce(next, [](WideKey<Key> a, WideKey<Key> b) { return min(a, b); });
    if (threadIdx.x % kWarp == 0) atomic_min(&shared.next, next);
    __syncthreads();
    if (threadIdx.x == 0) atomic_min(&state.next, shared.next);
    finish_slice(selection, digit, slice, shared);
  });
}

}  // namespace pdp
