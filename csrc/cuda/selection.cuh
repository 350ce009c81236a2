// The search for the k-th smallest key in each tensor of a list: its state, and where it ends.
//
// sample.cuh begins it, bracket.cuh or radix_select.cuh go on.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../magnitude.h"
#include "block.cuh"
#include "block_select.cuh"
#include "weight_table.cuh"

namespace pdp {

// Blocks per multiprocessor of every pass: 64 registers for each thread, and 64 KiB in flight,
// where memory of 4.3 TB/s with 700 ns latency needs 23. Not yet measured on a GPU.
constexpr int kSelectionThreads = 256;
constexpr int kSelectionBlocks = 4;

// Whether keys inside a bracket are collected. Brackets of 16-bit keys have a bin for each.
template <typename Key>
constexpr bool kCollects = sizeof(Key) > 2;

// Room for the keys that a pass over the weights leaves to later ones. Of normally distributed
// float32 weights, the bin of a first digit that holds the median or the 90th percentile (an eighth
// of an octave) has 2 to 6%, and the bracket of a sample at most 8%.
// A multiple of 16 keys, so that what lies behind begins at whole packets too.
PDP_HOST_DEVICE int64_t candidate_capacity(int64_t size) { return size / 128 * 16; }

// Room for the candidates of one bin of a bracket, about 40 in a million weights.
PDP_HOST_DEVICE int64_t survivor_capacity(int64_t size) {
  return (size / 4096 + 1024 + 15) / 16 * 16;
}

// The highest key of a weight whose NaNs are as they are stored.
template <typename Key>
constexpr Key kHighest = static_cast<Key>(static_cast<Key>(~Key{0}) >> 1);

// What is left to do in the search for v_k, the k-th smallest key of one tensor.
enum class Stage : int32_t {
  kFound,      // nothing
  kBracket,    // to read the weights and count the keys below and inside the bracket
  kSurvivors,  // to read the candidates and select in one bin of the bracket
  kDigits,     // a radix select
};

// Two keys that v_k probably lies between. Keys inside are counted in bins of 2^shift.
template <typename Key>
struct Bracket {
  Key low;
  Key width;  // the upper end is low + width, included
  int32_t shift;

  PDP_HOST_DEVICE int32_t bins() const { return static_cast<int32_t>(width >> shift) + 1; }
};

// How far the search has come. No kernel changes it while others still read the weights.
template <typename Key>
struct alignas(16) Search {
  Stage stage;
  Key prefix;        // the digits of v_k found so far; at the end v_k itself
  int64_t rank;      // 0-based rank of v_k among the keys with the prefix
  int64_t count;     // how many keys have the prefix
  int64_t buffered;  // how many candidates the buffer holds, or 0: read the weights
  Bracket<Key> bracket;
  int32_t bin;  // the bin of the bracket that holds v_k; -1: v_k is the bracket's lower end
};

// The search, and what the blocks of the running pass add to.
template <typename Key>
struct SelectionState : Search<Key> {
  WideKey<Key> next;    // the smallest key found so far whose digits are above the prefix
  Count below;          // keys below the bracket
  Count at_low;         // keys equal to its lower end
  Count at_high;        // keys equal to its upper end
  Count reserved;       // candidates that blocks have claimed room for
  Count survivors;      // candidates of the bin so far
  Count tiles_done;     // tiles counted in the running pass
  int64_t last_pruned;  // for a hard mask that prunes some ties: the index of the last
};

struct ThresholdOutput {
  void* data;
  bool is_double;

  __device__ void store(int64_t position, double threshold) const {
    if (is_double) {
      static_cast<double*>(data)[position] = threshold;
    } else {
      static_cast<float*>(data)[position] = static_cast<float>(threshold);
    }
  }
};

// What every pass of a selection needs.
template <typename Key>
struct Selection : WeightTable<Key> {
  const int64_t* prune_counts;  // by position
  ThresholdOutput thresholds;   // by position
  int32_t bins;                 // per histogram
  bool sampled;                 // whether samples bracket v_k before the weights are read
  Count* unfinished;            // how many tensors need a radix select
  SelectionState<Key>* states;
  // A bracket begins with zeros in its own bins alone, and leaves its counts there. Each pass of a
  // radix select begins and ends with zeros in all bins.
  Count* histograms;
  Key* candidates;

  // For each tensor its candidates, and then its survivors.
  __device__ Key* candidates_of(const TableEntry& entry) const {
    return candidates + entry.candidates_begin;
  }
  __device__ Key* survivors_of(const TableEntry& entry) const {
    return candidates_of(entry) + candidate_capacity(entry.size);
  }
};

// Returns the histogram in device memory of a tensor that is split over several blocks. At most one
// split tensor begins in each block.
template <typename Key>
__device__ Count* histogram_of(const Selection<Key>& selection, int32_t tensor,
                               const TableEntry& entry) {
  const bool of_blocks = selection.tensors > selection.blocks;
  const int64_t slot = of_blocks ? selection.block_of(entry.tile_begin) : tensor;
  return selection.histograms + slot * selection.bins;
}

// Only a tensor that loses some of its weights, but not all, is searched: k = 1 of n = 2 stands for
// any such numbers.
template <typename Key>
__device__ double threshold_of(WeightType type, Key kth, Key next) {
  if constexpr (sizeof(Key) == sizeof(double)) {
    return threshold_between<double>(kth, next, 1, 2);
  } else if constexpr (sizeof(Key) == sizeof(float)) {
    return threshold_between<float>(kth, next, 1, 2);
  } else if (type == WeightType::kBFloat16) {
    return threshold_between<BFloat16>(kth, next, 1, 2);
  } else {
    return threshold_between<Half>(kth, next, 1, 2);
  }
}

// Ends the search with v_k and v_{k+1}. Called by one thread.
template <typename Key>
__device__ void store_found(const Selection<Key>& selection, const TableEntry& entry,
                            const OrderStatistic<Key>& kth, Key next, SelectionState<Key>& state) {
  state.stage = Stage::kFound;
  state.prefix = kth.key;
  state.rank = kth.rank;
  state.count = kth.count;
  selection.thresholds.store(entry.position, threshold_of(entry.type, kth.key, next));
}

// Returns a function of one thread that copies the search in a tensor to shared memory.
template <typename Key, typename Shared>
__device__ auto search_loader(const Selection<Key>& selection, Shared& shared) {
  return [&](int32_t tensor) { shared.search = selection.states[tensor]; };
}

}  // namespace pdp
