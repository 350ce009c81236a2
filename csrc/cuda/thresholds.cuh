// thresholds: launches the selection in a list of weights. Free of Torch; the caller allocates the
// workspace.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "bracket.cuh"
#include "launch.cuh"
#include "radix_select.cuh"
#include "sample.cuh"
#include "selection.cuh"
#include "weight_table.cuh"
#include "workspace.cuh"

namespace pdp {

// Lists of fewer weights than this, those of small tensors not counted, take a radix select: its
// second read comes from the cache, and it has two launches less. Not yet measured on a GPU.
constexpr int64_t kSampledFrom = 1 << 22;

// The operator's arguments, without the workspace.
struct ThresholdRequest {
  std::vector<WeightView> weights;
  const int64_t* prune_counts;  // on the device, by position
  ThresholdOutput thresholds;
  DeviceLimits limits;
  int64_t sampled_from = kSampledFrom;
};

template <typename Key>
bool has_key(WeightType type) {
  if (type == WeightType::kFloat64) return sizeof(Key) == sizeof(double);
  if (type == WeightType::kFloat32) return sizeof(Key) == sizeof(float);
  return sizeof(Key) == sizeof(uint16_t);
}

// Lays out the selection in those weights of the request whose keys are of type Key, and appends
// their table to `table`. The workspace takes a histogram of 16 KiB, of 32 KiB for 16-bit keys, for
// each tensor, but no more than blocks. Wider keys that have tiles take candidates, an eighth of
// them, and survivors, a 4,096th of them and 1,024 for each of their tensors.
template <typename Key>
Selection<Key> lay_out_selection(const ThresholdRequest& request, Workspace& workspace,
                                 std::vector<TableEntry>& table) {
  int32_t tiles = 0;
  int64_t candidates = 0, tiled = 0;
  for (const WeightView& weight : request.weights) {
    if (!has_key<Key>(weight.type)) continue;
    const int32_t own_tiles = weight.size <= kWhole<Key> ? 0 : tiles_of<Key>(weight.size);
    table.push_back({weight.data, weight.size, candidates, tiles, own_tiles,
                     static_cast<int32_t>(weight.position), weight.type});
    if (own_tiles == 0) continue;
    tiles += own_tiles;
    tiled += weight.size;
    if (kCollects<Key>) {
      candidates += candidate_capacity(weight.size) + survivor_capacity(weight.size);
    }
  }
  // Those without tiles come last, where no block has to step over them.
  std::stable_partition(table.begin(), table.end(),
                        [](const TableEntry& entry) { return entry.tiles > 0; });

  Selection<Key> selection = {};
  selection.prune_counts = request.prune_counts;
  selection.thresholds = request.thresholds;
  selection.tensors = static_cast<int32_t>(table.size());
  selection.assign_tiles(tiles, request.limits.multiprocessors * kSelectionBlocks);
  selection.bins = std::max(kBracketBins<Key>, DigitHistogram<Key>::kBins);
  // 16-bit weights leave no candidates, so the bracket is the shorter way for all of them.
  selection.sampled = !kCollects<Key> || tiled >= request.sampled_from;
  selection.entries = workspace.take<TableEntry>(selection.tensors);
  selection.first_tensors = workspace.take<int32_t>(selection.blocks);
  selection.states = workspace.take<SelectionState<Key>>(selection.tensors);
  selection.unfinished = workspace.take<Count>(1);
  selection.histograms = workspace.take<Count>(std::min(selection.tensors, selection.blocks) *
                                               int64_t{selection.bins});
  selection.candidates = workspace.take<Key>(candidates);
  return selection;
}

// One launch for each kLargeChunk tensors. If there is a large tensor, one for each digit, and with
// samples one for the bracket and one for its candidates; after these the digits leave at once.
template <typename Key>
void launch_selection(Launcher& launcher, const Selection<Key>& selection,
                      const std::vector<TableEntry>& table) {
  launch_start(launcher, start_selection_kernel<Key, kSmallChunk>,
               start_selection_kernel<Key, kLargeChunk>, selection, table, kSampleThreads,
               sizeof(SampleShared<Key>));
  if (selection.blocks == 0) return;
  if (selection.sampled) {
    launcher.launch_overlapped(bracket_kernel<Key>, selection.blocks, kSelectionThreads,
                               sizeof(BracketShared<Key>), selection);
    if constexpr (kCollects<Key>) {
      launcher.launch_overlapped(survivors_kernel<Key>, selection.blocks, kSelectionThreads,
                                 sizeof(SurvivorsShared<Key>), selection);
    }
  }
  constexpr KeyDigits kDigits = kDigitsOf<Key>;
  launcher.launch_overlapped(first_digit_kernel<Key>, selection.blocks, kSelectionThreads,
                             sizeof(FirstDigitShared<Key>), selection, kDigits.digit(0));
  for (int i = 1; i < kDigits.count; ++i) {
    launcher.launch_overlapped(later_digit_kernel<Key>, selection.blocks, kSelectionThreads,
                               sizeof(LaterDigitShared<Key>), selection, kDigits.digit(i));
  }
}

// Key widths run one after another on the stream and reuse the same workspace.
template <typename Key>
size_t selection_workspace_bytes(const ThresholdRequest& request) {
  Workspace measured(nullptr);
  std::vector<TableEntry> table;
  lay_out_selection<Key>(request, measured, table);
  return measured.bytes();
}

inline size_t thresholds_workspace_bytes(const ThresholdRequest& request) {
  return std::max({selection_workspace_bytes<uint64_t>(request),
                   selection_workspace_bytes<uint32_t>(request),
                   selection_workspace_bytes<uint16_t>(request)});
}

template <typename Key>
void launch_thresholds_of(Launcher& launcher, const ThresholdRequest& request, void* memory) {
  Workspace workspace(memory);
  std::vector<TableEntry> table;
  const Selection<Key> selection = lay_out_selection<Key>(request, workspace, table);
  if (!table.empty()) launch_selection(launcher, selection, table);
}

inline cudaError_t launch_thresholds(const ThresholdRequest& request, void* workspace,
                                     cudaStream_t stream) {
  Launcher launcher(stream, request.limits);
  launch_thresholds_of<uint64_t>(launcher, request, workspace);
  launch_thresholds_of<uint32_t>(launcher, request, workspace);
  launch_thresholds_of<uint16_t>(launcher, request, workspace);
  return launcher.error();
}

}  // namespace pdp
