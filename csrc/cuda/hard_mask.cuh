// hard_mask: true for the weights that are kept. Exactly k weights are pruned: all whose key is
// below v_k, and then, lowest index first, as many ties (weights whose key is v_k) as are missing.
//
// One pass writes the mask. If only some ties are pruned, it keeps them all, notes those of each
// unit of the weights, and counts those of each block. From the counts the last block finds the
// last tie to prune. A second kernel then prunes the ties up to it.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../magnitude.h"
#include "block.cuh"
#include "launch.cuh"
#include "selection.cuh"
#include "thresholds.cuh"
#include "weight_table.cuh"
#include "workspace.cuh"

namespace pdp {

constexpr int kMaskThreads = 256;
constexpr int kMaskWarps = kMaskThreads / kWarp;
constexpr int kMaskBlocksPerMultiprocessor = 6;  // 40 registers, and 96 KiB in flight

template <typename Weight>
using KeyOf = typename Magnitude<Weight>::Key;

// A warp writes the mask of a unit of weights at a time: four packets for each lane.
template <typename Weight>
constexpr int64_t kMaskUnit = kWarp * kPacketsInFlight * 16 / sizeof(Weight);

template <typename Weight>
PDP_HOST_DEVICE int32_t mask_units(int64_t size) {
  return static_cast<int32_t>((size + kMaskUnit<Weight> - 1) / kMaskUnit<Weight>);
}

// Returns the first unit of a block. Each block writes a run of units, so that the last block finds
// a tie without the counts of all units. With those of 65,000 units (2^25 float32 weights) an H100
// took 133 us for what a copy moves in 57.
__device__ inline int32_t first_unit_of(int32_t block, int32_t units) {
  const auto blocks = static_cast<int32_t>(gridDim.x);
  return block * (units / blocks) + min(block, units % blocks);
}

// The ties of a unit. bfloat16 weights of one scale have 2 in 1,000.
struct UnitTies {
  static constexpr uint32_t kNoted = 14;

  uint32_t count;
  uint16_t places[kNoted];  // in the unit, of the first ties
};

// A word of one key, or of two 16-bit keys, and the top bit of each of its keys: a weight's sign.
template <typename Key>
using KeyWord = std::conditional_t<sizeof(Key) == 8, uint64_t, uint32_t>;
template <typename Key>
constexpr KeyWord<Key> kTopBits = sizeof(Key) == 2 ? static_cast<KeyWord<Key>>(0x80008000)
                                                   : KeyWord<Key>{1} << (8 * sizeof(Key) - 1);

// A byte for each weight of a packet of 16 bytes, four to a word.
template <typename Key>
using FlagWord = std::conditional_t<sizeof(Key) == 8, uint16_t, uint32_t>;
template <typename Key>
constexpr int kFlagWords = sizeof(Key) == 2 ? 2 : 1;
template <typename Key>
using PacketOfFlags = Packet<FlagWord<Key>, kFlagWords<Key>>;

// Returns four bytes, each chosen by 4 bits of the selector: 0 to 3 are those of a, 4 to 7 of b.
__device__ inline uint32_t choose_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef __CUDACC__
  return __byte_perm(a, b, selector);
#else
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t chosen = 0;
  for (int i = 0; i < 32; i += 8, selector >>= 4) {
    chosen |= static_cast<uint32_t>(bytes >> 8 * (selector & 7) & 0xFF) << i;
  }
  return chosen;
#endif
}

// Sets the top bit of a weight's byte if its key is at least `bound`, which may be any key or the
// top bit alone. The difference borrows nothing from the key beside it. The other bits are of no
// meaning.
template <typename Key>
__device__ PacketOfFlags<Key> at_least(uint4 packet, Key bound) {
  auto words = bit_cast<Packet<KeyWord<Key>>>(packet);
  const KeyWord<Key> bounds = sizeof(Key) == 2 ? bound * KeyWord<Key>{0x10001} : bound;
#pragma unroll
  for (KeyWord<Key>& word : words.at) word = (word | kTopBits<Key>)-bounds;
  const auto compared = bit_cast<Packet<uint32_t>>(words);
  const auto& word = compared.at;
  if constexpr (sizeof(Key) == 2) {
    return {choose_bytes(word[0], word[1], 0x7531), choose_bytes(word[2], word[3], 0x7531)};
  } else if constexpr (sizeof(Key) == 4) {
    return {choose_bytes(choose_bytes(word[0], word[1], 0x73), choose_bytes(word[2], word[3], 0x73),
                         0x5410)};
  } else {
    return {static_cast<uint16_t>(choose_bytes(word[1], word[3], 0x73))};
  }
}

template <typename Key>
struct MaskShared {
  Search<Key> search;
  RankScratch rank;
  Count ties;  // of the block
  bool last;
};

// Whether some of the ties are pruned, but not all.
template <typename Key>
__device__ bool cuts_ties(const Search<Key>& search) {
  return search.rank >= 0 && search.rank + 1 < search.count;
}

// Notes place_of(i) for each bit i of `ties`, after the first `noted` of the unit, and returns how
// many ties the unit has then. Called by all lanes.
template <typename PlaceOf>
__device__ uint32_t note_ties(uint32_t ties, PlaceOf place_of, uint32_t noted, UnitTies& unit) {
  const WarpSums sums = sum_over_lanes(__popc(ties));
  for (uint32_t i = noted + sums.lower; ties != 0 && i < UnitTies::kNoted; ++i, ties &= ties - 1) {
    unit.places[i] = static_cast<uint16_t>(place_of(__ffs(ties) - 1));
  }
  return noted + sums.all;
}

// Finds the index of the last tie that is pruned. Called by all threads of one block.
template <typename Weight>
__device__ int64_t find_last_pruned(const Weight* weights, int64_t size,
                                    const Search<KeyOf<Weight>>& search,
                                    const UnitTies* ties_of_unit, const Count* ties_of_block,
                                    RankScratch& scratch) {
  const KeyOf<Weight> kth = search.prefix;
  const auto rank = static_cast<Count>(search.rank);
  const auto in_block = [&](int32_t block) { return ties_of_block[block]; };
  find_rank(in_block, static_cast<int32_t>(gridDim.x), rank, scratch);
  const Count rank_in_block = rank - scratch.below;
  const int32_t units = mask_units<Weight>(size);
  const int32_t first = first_unit_of(scratch.bin, units);
  const int32_t end = first_unit_of(scratch.bin + 1, units);
  const auto in_unit = [&](int32_t i) { return ties_of_unit[first + i].count; };
  find_rank(in_unit, end - first, rank_in_block, scratch);
  const Count rank_in_unit = rank_in_block - scratch.below;
  const int64_t begin = (first + scratch.bin) * kMaskUnit<Weight>;
  const auto is_tie = [&](int32_t i) -> uint32_t {
    return magnitude_key(weights[begin + i]) == kth;
  };
  find_rank(is_tie, static_cast<int32_t>(min(kMaskUnit<Weight>, size - begin)), rank_in_unit,
            scratch);
  return begin + scratch.bin;
}

template <typename Weight>
__global__ void __launch_bounds__(kMaskThreads, kMaskBlocksPerMultiprocessor)
    write_mask_kernel(const Weight* weights, int64_t size, SelectionState<KeyOf<Weight>>* selected,
                      UnitTies* ties_of_unit, Count* ties_of_block, bool* kept) {
  using Key = KeyOf<Weight>;
  constexpr int kPerPacket = 16 / sizeof(Weight);
  auto& shared = shared_memory<MaskShared<Key>>();
  if (threadIdx.x == 0) {
    shared.search = *selected;
    shared.ties = 0;
  }
  __syncthreads();
  const Key kth = shared.search.prefix;
  const bool cuts = cuts_ties(shared.search);
  const bool keeps_ties = cuts || shared.search.rank < 0;
  constexpr Key kNaN = Magnitude<Weight>::kInfinity + 1;  // the highest key, of every NaN
  constexpr Key kNone = Key{1} << Magnitude<Weight>::kBits;
  const Key above = kth < kNaN ? kth + 1 : kNone;
  const Key least = keeps_ties ? min(kth, kNone) : above;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const bool aligned = reinterpret_cast<uintptr_t>(weights) % 16 == 0;

  const auto block = static_cast<int32_t>(blockIdx.x);
  const int32_t units = mask_units<Weight>(size);
  const int32_t last_unit = first_unit_of(block + 1, units) - 1;
  Count ties_of_warp = 0;
  for (int32_t unit = first_unit_of(block, units) + warp; unit <= last_unit; unit += kMaskWarps) {
    const int64_t begin = unit * kMaskUnit<Weight>;
    const int64_t end = min(begin + kMaskUnit<Weight>, size);
    UnitTies& ties = ties_of_unit[unit];
    uint32_t noted = 0;
    if (aligned && end - begin == kMaskUnit<Weight>) {
      const auto* loads = reinterpret_cast<const uint4*>(weights + begin) + lane;
      auto* stores = reinterpret_cast<PacketOfFlags<Key>*>(kept + begin) + lane;
      uint4 loaded[kPacketsInFlight];
#pragma unroll
      for (int i = 0; i < kPacketsInFlight; ++i) loaded[i] = __ldg(&loads[i * kWarp]);
      uint32_t ties_of_lane = 0;  // bit 8 i + j: the i-th byte of the lane's j-th word of flags
#pragma unroll
      for (int i = 0; i < kPacketsInFlight; ++i) {
        PacketOfFlags<Key> keeps = at_least(loaded[i], least);
        const PacketOfFlags<Key> after = at_least(loaded[i], above);
#pragma unroll
        for (int j = 0; j < kFlagWords<Key>; ++j) {
          const uint32_t ties_of_word = keeps.at[j] & ~after.at[j] & 0x80808080;
          ties_of_lane |= ties_of_word >> (7 - (i * kFlagWords<Key> + j));
          keeps.at[j] = keeps.at[j] >> 7 & 0x01010101;
        }
        stores[i * kWarp] = keeps;
      }
      if (cuts) {
        const auto place_of = [&](int bit) {
          const int word = bit % 8;
          return (word / kFlagWords<Key> * kWarp + lane) * kPerPacket + word % kFlagWords<Key> * 4 +
                 bit / 8;
        };
        noted = note_ties(ties_of_lane, place_of, noted, ties);
      }
    } else {
      for (int64_t first = begin; first < end; first += kWarp) {
        const int64_t i = first + lane;
        bool tie = false;
        if (i < end) {
          const Key key = magnitude_key(weights[i]);
          kept[i] = key >= least;
          tie = key == kth;
        }
        if (cuts) noted = note_ties(tie, [&](int) { return i - begin; }, noted, ties);
      }
    }
    if (cuts && lane == 0) ties.count = noted;
    ties_of_warp += noted;
  }

  if (!cuts) return;
  if (lane == 0) atomicAdd(&shared.ties, ties_of_warp);
  __syncthreads();
  if (threadIdx.x == 0) ties_of_block[block] = shared.ties;
  if (!last_to_arrive(&selected->tiles_done, Count{1}, Count{gridDim.x}, shared.last)) return;
  const int64_t last =
      find_last_pruned(weights, size, shared.search, ties_of_unit, ties_of_block, shared.rank);
  if (threadIdx.x == 0) selected->last_pruned = last;
}

template <typename Weight>
__global__ void __launch_bounds__(kMaskThreads)
    prune_ties_kernel(const Weight* weights, int64_t size,
                      const SelectionState<KeyOf<Weight>>* selected, const UnitTies* ties_of_unit,
                      bool* kept) {
  using Key = KeyOf<Weight>;
  auto& shared = shared_memory<SelectionState<Key>>();
  if (threadIdx.x == 0) shared = *selected;
  __syncthreads();
  if (!cuts_ties(shared)) return;
  const Key kth = shared.prefix;
  const int64_t last = shared.last_pruned;
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kMaskWarps;
  int64_t unit = static_cast<int64_t>(blockIdx.x) * kMaskWarps + threadIdx.x / kWarp;
  for (; unit * kMaskUnit<Weight> <= last; unit += warps) {
    const int64_t begin = unit * kMaskUnit<Weight>;
    const UnitTies& ties = ties_of_unit[unit];
    if (ties.count <= UnitTies::kNoted) {
      if (lane >= ties.count) continue;
      const int64_t i = begin + ties.places[lane];
      if (i <= last) kept[i] = false;
    } else {
      const int64_t end = min(begin + kMaskUnit<Weight>, last + 1);
      for (int64_t i = begin + lane; i < end; i += kWarp) {
        if (magnitude_key(weights[i]) == kth) kept[i] = false;
      }
    }
  }
}

// The operator's arguments, without the workspace: the selection in one weight, and the mask. The
// kernels above read the selection's state from the workspace.
struct HardMaskRequest {
  ThresholdRequest selection;
  bool* kept;
};

template <typename Weight>
int32_t mask_blocks(const HardMaskRequest& request) {
  const int32_t units = mask_units<Weight>(request.selection.weights[0].size);
  return std::min((units + kMaskWarps - 1) / kMaskWarps,
                  kMaskBlocksPerMultiprocessor * request.selection.limits.multiprocessors);
}

template <typename Weight>
size_t hard_mask_workspace_bytes_of(const HardMaskRequest& request) {
  Workspace measured(nullptr);
  std::vector<TableEntry> table;
  lay_out_selection<KeyOf<Weight>>(request.selection, measured, table);
  measured.take<UnitTies>(mask_units<Weight>(request.selection.weights[0].size));
  measured.take<Count>(mask_blocks<Weight>(request));
  return measured.bytes();
}

template <typename Weight>
cudaError_t launch_hard_mask_of(const HardMaskRequest& request, void* memory, cudaStream_t stream) {
  using Key = KeyOf<Weight>;
  Launcher launcher(stream, request.selection.limits);
  Workspace workspace(memory);
  std::vector<TableEntry> table;
  const Selection<Key> selection = lay_out_selection<Key>(request.selection, workspace, table);
  const WeightView& view = request.selection.weights[0];
  auto* ties_of_unit = workspace.take<UnitTies>(mask_units<Weight>(view.size));
  const int32_t blocks = mask_blocks<Weight>(request);
  auto* ties_of_block = workspace.take<Count>(blocks);
  if (view.size == 0) return cudaSuccess;
  launch_selection(launcher, selection, table);

  const auto* weights = static_cast<const Weight*>(view.data);
  launcher.launch(write_mask_kernel<Weight>, blocks, kMaskThreads, sizeof(MaskShared<Key>), weights,
                  view.size, selection.states, ties_of_unit, ties_of_block, request.kept);
  launcher.launch(prune_ties_kernel<Weight>, blocks, kMaskThreads, sizeof(SelectionState<Key>),
                  weights, view.size, selection.states, ties_of_unit, request.kept);
  return launcher.error();
}

// Calls function(a value of the type of the weights).
template <typename Function>
auto with_type(WeightType type, Function function) {
  switch (type) {
    case WeightType::kFloat64:
      return function(double{});
    case WeightType::kFloat32:
      return function(float{});
    case WeightType::kBFloat16:
      return function(BFloat16{});
    default:
      return function(Half{});
  }
}

inline size_t hard_mask_workspace_bytes(const HardMaskRequest& request) {
  return with_type(request.selection.weights[0].type, [&](auto weight) {
    return hard_mask_workspace_bytes_of<decltype(weight)>(request);
  });
}

inline cudaError_t launch_hard_mask(const HardMaskRequest& request, void* workspace,
                                    cudaStream_t stream) {
  return with_type(request.selection.weights[0].type, [&](auto weight) {
    return launch_hard_mask_of<decltype(weight)>(request, workspace, stream);
  });
}

}  // namespace pdp
