// The first kernel of a selection, one block for each tensor. It selects in small tensors, and
// brackets v_k in large ones by a sample.
//
// Of s sampled keys about s p are below v_k, with p = k / n and a standard deviation of
// sqrt(s p (1 - p)) if the sample is independent. The bracket takes 4.5 of them to either side: it
// misses v_k once in 10^5 times, once in 700 if neighbours are so alike that the variance doubles.
// A miss costs two more reads, never exactness.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../magnitude.h"
#include "block.cuh"
#include "block_select.cuh"
#include "launch.cuh"
#include "selection.cuh"
#include "weight_table.cuh"

namespace pdp {

constexpr int kSampleThreads = 1024;

// The sample has one of 32 keys, within these limits. A larger one is read longer and leaves fewer
// candidates: their sum is least at (3 n)^(2/3) float32 keys. 16-bit keys leave no candidates.
constexpr int64_t kKeysPerSample = 32;
template <typename Key>
constexpr int64_t kMaxSample = sizeof(Key) == 8   ? 8 * 1024
                               : sizeof(Key) == 4 ? 20 * 1024
                                                  : 16 * 1024;
template <typename Key>
constexpr int64_t kMinSample = sizeof(Key) == 2 ? 2048 : 4096;
constexpr double kDeviations = 4.5;

// Keys are sampled in chunks of 64 bytes: memory delivers no less than 32 at once.
template <typename Key>
constexpr int64_t kSampleChunk = 64 / sizeof(Key);

// Bins of a bracket. Of wider keys, the candidates of one bin are left to the last kernel. 16-bit
// keys need a bin for each: 4,096 are four octaves of float16, 32 of bfloat16.
template <typename Key>
constexpr int32_t kBracketBins = sizeof(Key) == 2 ? 4096 : 1024;

template <typename Key>
__device__ Key infinity_key(WeightType type) {
  if constexpr (sizeof(Key) == sizeof(double)) return Magnitude<double>::kInfinity;
  if constexpr (sizeof(Key) == sizeof(float)) return Magnitude<float>::kInfinity;
  return type == WeightType::kBFloat16 ? Magnitude<BFloat16>::kInfinity
                                       : Magnitude<Half>::kInfinity;
}

// Scrambles a number (the finalizer of MurmurHash3).
PDP_HOST_DEVICE uint32_t scrambled(uint32_t number) {
  number = (number ^ number >> 16) * 0x85EBCA6B;
  number = (number ^ number >> 13) * 0xC2B2AE35;
  return number ^ number >> 16;
}

// Returns how many chunks are sampled of so many weights.
template <typename Key>
PDP_HOST_DEVICE int64_t sample_chunks(int64_t size) {
  const int64_t some = size / kKeysPerSample;
  const int64_t more = some < kMinSample<Key> ? kMinSample<Key> : some;
  return (more < kMaxSample<Key> ? more : kMaxSample<Key>) / kSampleChunk<Key>;
}

// The strata of a sample: the weights, cut into as many runs of chunks as there are sampled chunks.
// The first `longer` have one chunk more. What is beyond 2^32 chunks is not sampled.
template <typename Key>
struct Strata {
  uint32_t length;  // in chunks
  uint32_t longer;

  PDP_HOST_DEVICE Strata(int64_t chunks, int64_t size) {
    const int64_t places = size / kSampleChunk<Key>;
    const uint32_t sampled = places < UINT32_MAX ? static_cast<uint32_t>(places) : UINT32_MAX;
    length = sampled / static_cast<uint32_t>(chunks);
    longer = sampled % static_cast<uint32_t>(chunks);
  }

  // Returns the index of a sampled chunk's first weight. The place in the stratum is drawn, so that
  // a periodic weight is sampled evenly.
  PDP_HOST_DEVICE int64_t place(uint32_t chunk) const {
    const uint32_t begin = chunk * length + (chunk < longer ? chunk : longer);
    const uint64_t own = length + (chunk < longer);
    return (begin + static_cast<uint32_t>(scrambled(chunk + 1) * own >> 32)) * kSampleChunk<Key>;
  }
};

template <typename Key>
struct SampleShared {
  union {
    struct {
      Key keys[kWhole<Key>];
      SelectScratch<Key> scratch;
    };
    SelectTwoScratch<Key> two;
  };
};

// The calling thread's part of a sample.
template <typename Key>
struct Sample {
  static constexpr int kPerPacket = 16 / sizeof(Key);
  static constexpr int kPackets = kMaxSample<Key> / kPerPacket / kSampleThreads;
  static_assert(kPackets * kPerPacket * kSampleThreads == kMaxSample<Key>);

  Packet<Key> packets[kPackets];
  int32_t size;  // of the whole sample

  __device__ bool has(int i) const {
    const int32_t packet = static_cast<int32_t>(threadIdx.x) + i * kSampleThreads;
    return packet < size / kPerPacket;
  }

  // All weights are loaded before the first is used.
  __device__ explicit Sample(const TableEntry& entry) {
    constexpr int kOfChunk = kSampleChunk<Key> / kPerPacket;
    const int64_t chunks = sample_chunks<Key>(entry.size);
    const Strata<Key> strata(chunks, entry.size);
    size = static_cast<int32_t>(chunks * kSampleChunk<Key>);
    with_weights<Key>(entry, [&](const auto* weights) {
      using Weight = std::decay_t<decltype(*weights)>;
      const bool aligned = reinterpret_cast<uintptr_t>(weights) % 16 == 0;
      uint4 loaded[kPackets];
#pragma unroll
      for (int i = 0; i < kPackets; ++i) {
        if (!has(i)) continue;
        const uint32_t number = threadIdx.x + i * kSampleThreads;
        const Weight* from =
            weights + strata.place(number / kOfChunk) + number % kOfChunk * kPerPacket;
        if (aligned) {
          loaded[i] = __ldg(reinterpret_cast<const uint4*>(from));
        } else {
          Packet<Weight> packet;
#pragma unroll
          for (int j = 0; j < kPerPacket; ++j) packet.at[j] = from[j];
          loaded[i] = bit_cast<uint4>(packet);
        }
      }
#pragma unroll
      for (int i = 0; i < kPackets; ++i) {
        if (!has(i)) continue;
        const auto packet = bit_cast<Packet<Weight>>(loaded[i]);
#pragma unroll
        for (int j = 0; j < kPerPacket; ++j) packets[i].at[j] = magnitude_key(packet.at[j]);
      }
    });
  }

  template <typename Visit>
  __device__ void for_each(Visit visit) const {
#pragma unroll
    for (int i = 0; i < kPackets; ++i) {
      if (!has(i)) continue;
#pragma unroll
      for (int j = 0; j < kPerPacket; ++j) visit(packets[i].at[j]);
    }
  }
};

// Brackets the key of a 0-based rank among the tensor's. Called by all threads.
template <typename Key>
__device__ Bracket<Key> bracket_by_sample(const TableEntry& entry, int64_t rank,
                                          SampleShared<Key>& shared) {
  const Sample<Key> sample(entry);
  const int64_t size = sample.size;
  const double fraction = static_cast<double>(rank) / static_cast<double>(entry.size);
  const double centre = fraction * static_cast<double>(size);
  const double margin = kDeviations * sqrt(centre * (1 - fraction)) + 2;
  const auto below = static_cast<int64_t>(floor(centre - margin));
  const auto above = static_cast<int64_t>(ceil(centre + margin));
  static_assert(kMaxSample<Key> < 1 << 16);
  select_two_in_block<Key, kSampleThreads>([&](auto visit) { sample.for_each(visit); },
                                           static_cast<uint32_t>(max(below, int64_t{0})),
                                           static_cast<uint32_t>(min(above, size - 1)), shared.two);
  Key low = below >= 0 ? shared.two.keys[0] : Key{0};
  Key high = above < size ? shared.two.keys[1] : kHighest<Key>;
  // NaNs have several keys until magnitude_key makes them one.
  if (high > infinity_key<Key>(entry.type)) high = kHighest<Key>;
  if constexpr (!kCollects<Key>) {
    // Where an end is open, as many keys as there are bins are likely to be enough.
    constexpr Key kMost = kBracketBins<Key> - 1;
    if (high - low > kMost && below < 0) low = static_cast<Key>(high - kMost);
    if (high - low > kMost && above >= size) high = static_cast<Key>(low + kMost);
  }
  Bracket<Key> bracket = {low, static_cast<Key>(high - low), 0};
  while (bracket.width >> bracket.shift >= kBracketBins<Key>) ++bracket.shift;
  return bracket;
}

// A StartKernel: writes the tensor's entry and state, and its threshold if all weights or none are
// pruned or if the tensor is small.
template <typename Key, int kCapacity>
__global__ void __launch_bounds__(kSampleThreads)
    start_selection_kernel(const __grid_constant__ Selection<Key> selection,
                           const __grid_constant__ TableChunk<kCapacity> chunk, int32_t first) {
  wait_for_earlier_kernels();
  auto& shared = shared_memory<SampleShared<Key>>();
  const int32_t tensor = first + static_cast<int32_t>(blockIdx.x);
  const TableEntry entry = chunk.entries[blockIdx.x];
  const int64_t size = entry.size;
  const int64_t k = selection.prune_counts[entry.position];
  SelectionState<Key>& state = selection.states[tensor];
  const bool writes = threadIdx.x == 0;
  selection.write(tensor, entry);
  if (writes) {
    if (tensor == 0) *selection.unfinished = selection.sampled ? 0 : 1;
    state = {};
    state.next = static_cast<Key>(~Key{0});
  }
  if (k <= 0 || k >= size) {
    // No key is below 0, so with v_k = 0 and no tie to prune all weights are kept; none is kept
    // with a v_k above all keys.
    if (writes) {
      const bool all = size > 0 && k >= size;
      state.prefix = all ? static_cast<Key>(~Key{0}) : Key{0};
      state.rank = -1;
      const double infinity = Magnitude<double>::value(Magnitude<double>::kInfinity);
      selection.thresholds.store(entry.position, all ? infinity : -infinity);
    }
    return;
  }

  if (entry.tiles == 0) {
    with_weights<Key>(entry, [&](const auto* weights) {
    // 16 loads at once: one by one, each would wait for the one before.
#pragma unroll 16
      for (int32_t i = threadIdx.x; i < static_cast<int32_t>(size); i += kSampleThreads) {
        shared.keys[i] = magnitude_key(weights[i]);
      }
    });
    const auto key_at = [&](int64_t i) { return shared.keys[i]; };
    const OrderStatistic<Key> kth =
        select_in_block(key_at, size, k - 1, kKeyBits<Key>, shared.scratch);
    Key next = kth.key;
    if (kth.rank + 1 == kth.count) {
      next = least_above(kth.key, key_at, size, static_cast<Key>(~Key{0}), shared.scratch);
    }
    if (writes) store_found(selection, entry, kth, next, state);
    return;
  }

  Bracket<Key> bracket = {};
  if (selection.sampled) bracket = bracket_by_sample(entry, k - 1, shared);
  if (writes) {
    state.stage = selection.sampled ? Stage::kBracket : Stage::kDigits;
    state.bracket = bracket;
    state.rank = k - 1;
    state.count = size;
  }
  const int32_t last_tile = entry.tile_begin + entry.tiles - 1;
  if (selection.block_of(entry.tile_begin) == selection.block_of(last_tile)) return;
  const int32_t bins = selection.sampled ? bracket.bins() : selection.bins;
  Count* histogram = histogram_of(selection, tensor, entry);
  for (int32_t bin = threadIdx.x; bin < bins; bin += blockDim.x) histogram[bin] = 0;
}

}  // namespace pdp
