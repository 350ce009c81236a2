// hard_mask: true for the weights that are kept. Exactly k weights are pruned: all whose key is
// below v_k, and then, lowest index first, as many ties (weights whose key is v_k) as are missing.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../magnitude.h"
#include "block.cuh"
#include "launch.cuh"
#include "radix_select.cuh"
#include "thresholds.cuh"
#include "weight_table.cuh"
#include "workspace.cuh"

namespace pdp {

constexpr int kMaskThreads = 256;
constexpr int kMaskBlocksPerMultiprocessor = 8;  // not yet measured on a GPU

template <typename Weight>
using KeyOf = typename Magnitude<Weight>::Key;

struct TieShared {
  RankScratch rank;
  uint32_t ties;
  bool last;
};

// Finds the index of the last tie that is pruned. Blocks count the ties of each tile; the last
// block to finish finds the tie of that rank, first its tile, then its place in the tile. If all
// ties are pruned (always, if v_k is unique), their order does not matter and nothing is read.
template <typename Weight>
__global__ void __launch_bounds__(kMaskThreads)
    last_pruned_kernel(const Weight* weights, int64_t size, SelectionState<KeyOf<Weight>>* selected,
                       uint32_t* ties_of_tile) {
  using Key = KeyOf<Weight>;
  auto& shared = shared_memory<TieShared>();
  const int64_t rank = selected->rank;
  if (rank < 0 || rank + 1 == selected->count) return;
  const Key kth = selected->prefix;

  const int32_t tiles = tiles_of<Key>(size);
  int32_t counted = 0;
  for (int32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x, ++counted) {
    if (threadIdx.x == 0) shared.ties = 0;
    __syncthreads();
    uint32_t ties = 0;
    for_each<kMaskThreads>(weights, tile * kTile<Key>, min((tile + 1) * kTile<Key>, size),
                           [&](Weight weight) { ties += magnitude_key(weight) == kth; });
    ties = warp_reduce(ties, [](uint32_t a, uint32_t b) { return a + b; });
    if (threadIdx.x % kWarp == 0) atomicAdd(&shared.ties, ties);
    __syncthreads();
    if (threadIdx.x == 0) ties_of_tile[tile] = shared.ties;
  }

  if (!last_to_arrive(&selected->tiles_done, static_cast<Count>(counted), static_cast<Count>(tiles),
                      shared.last)) {
    return;
  }
  const auto ties_of = [&](int32_t tile) { return ties_of_tile[tile]; };
  find_rank(ties_of, tiles, static_cast<Count>(rank), shared.rank);
  const Count rank_in_tile = static_cast<Count>(rank) - shared.rank.below;
  const int64_t tile_begin = shared.rank.bin * kTile<Key>;
  const auto is_tie = [&](int32_t i) -> uint32_t {
    return magnitude_key(weights[tile_begin + i]) == kth;
  };
  find_rank(is_tie, static_cast<int32_t>(min(kTile<Key>, size - tile_begin)), rank_in_tile,
            shared.rank);
  if (threadIdx.x == 0) selected->last_pruned = tile_begin + shared.rank.bin;
}

template <typename Weight>
__global__ void __launch_bounds__(kMaskThreads)
    write_mask_kernel(const Weight* weights, int64_t size,
                      const SelectionState<KeyOf<Weight>>* selected, bool* kept) {
  const KeyOf<Weight> kth = selected->prefix;
  const int64_t last_pruned = selected->last_pruned;
  const auto keep = [&](Weight weight, int64_t i) {
    const KeyOf<Weight> key = magnitude_key(weight);
    return key > kth || (key == kth && i > last_pruned);
  };
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;

  constexpr int kPerPacket = 16 / sizeof(Weight);
  const bool aligned = reinterpret_cast<uintptr_t>(weights) % 16 == 0;
  const int64_t packets = aligned ? size / kPerPacket : 0;
  const auto* loads = reinterpret_cast<const uint4*>(weights);
  auto* stores = reinterpret_cast<Packet<bool, kPerPacket>*>(kept);
#pragma unroll 4
  for (int64_t i = thread; i < packets; i += threads) {
    const auto loaded = bit_cast<Packet<Weight>>(__ldg(&loads[i]));
    Packet<bool, kPerPacket> keeps;
#pragma unroll
    for (int j = 0; j < kPerPacket; ++j) keeps.at[j] = keep(loaded.at[j], i * kPerPacket + j);
    stores[i] = keeps;
  }
  for (int64_t i = packets * kPerPacket + thread; i < size; i += threads) {
    kept[i] = keep(weights[i], i);
  }
}

// The operator's arguments, without the workspace: the selection in one weight, and the mask. The
// kernels above read the selection's state from the workspace.
struct HardMaskRequest {
  ThresholdRequest selection;
  bool* kept;
};

template <typename Key>
size_t hard_mask_workspace_bytes(const HardMaskRequest& request, Workspace& workspace) {
  std::vector<TableEntry> table;
  lay_out_selection<Key>(request.selection, workspace, table);
  workspace.take<uint32_t>(tiles_of<Key>(request.selection.weights[0].size));
  return workspace.bytes();
}

inline size_t hard_mask_workspace_bytes(const HardMaskRequest& request) {
  Workspace measured(nullptr);
  const WeightType type = request.selection.weights[0].type;
  if (type == WeightType::kFloat64) return hard_mask_workspace_bytes<uint64_t>(request, measured);
  if (type == WeightType::kFloat32) return hard_mask_workspace_bytes<uint32_t>(request, measured);
  return hard_mask_workspace_bytes<uint16_t>(request, measured);
}

template <typename Weight>
cudaError_t launch_hard_mask_of(const HardMaskRequest& request, void* memory, cudaStream_t stream) {
  using Key = KeyOf<Weight>;
  Launcher launcher(stream);
  Workspace workspace(memory);
  std::vector<TableEntry> table;
  const Selection<Key> selection = lay_out_selection<Key>(request.selection, workspace, table);
  const WeightView& view = request.selection.weights[0];
  const int32_t tiles = tiles_of<Key>(view.size);
  auto* ties_of_tile = workspace.take<uint32_t>(tiles);
  if (tiles == 0) return cudaSuccess;
  launch_selection(launcher, selection, table, request.selection.limits);

  const auto* weights = static_cast<const Weight*>(view.data);
  const int32_t blocks =
      std::min(tiles, kMaskBlocksPerMultiprocessor * request.selection.limits.multiprocessors);
  launcher.launch(last_pruned_kernel<Weight>, blocks, kMaskThreads, sizeof(TieShared), weights,
                  view.size, selection.states, ties_of_tile);
  launcher.launch(write_mask_kernel<Weight>, blocks, kMaskThreads, 0, weights, view.size,
                  selection.states, request.kept);
  return launcher.error();
}

inline cudaError_t launch_hard_mask(const HardMaskRequest& request, void* workspace,
                                    cudaStream_t stream) {
  switch (request.selection.weights[0].type) {
    case WeightType::kFloat64:
      return launch_hard_mask_of<double>(request, workspace, stream);
    case WeightType::kFloat32:
      return launch_hard_mask_of<float>(request, workspace, stream);
    case WeightType::kBFloat16:
      return launch_hard_mask_of<BFloat16>(request, workspace, stream);
    default:
      return launch_hard_mask_of<Half>(request, workspace, stream);
  }
}

}  // namespace pdp
