// thresholds: launches the radix select over a list of weights. Free of Torch; the caller allocates
// the workspace.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "launch.cuh"
#include "radix_select.cuh"
#include "weight_table.cuh"
#include "workspace.cuh"

namespace pdp {

// The operator's arguments, without the workspace.
struct ThresholdRequest {
  std::vector<WeightView> weights;
  const int64_t* prune_counts;  // on the device, by position
  ThresholdOutput thresholds;
  DeviceLimits limits;
};

template <typename Key>
bool has_key(WeightType type) {
  if (type == WeightType::kFloat64) return sizeof(Key) == sizeof(double);
  if (type == WeightType::kFloat32) return sizeof(Key) == sizeof(float);
  return sizeof(Key) == sizeof(uint16_t);
}

// Whether the first digit has to be counted in SmallCounters.
template <typename Key>
bool lacks_shared_memory(const DeviceLimits& limits) {
  using Shared = FirstDigitShared<Key, typename RadixSelect<Key>::FirstCounters>;
  return limits.shared_bytes_per_block < static_cast<int>(sizeof(Shared));
}

// Returns null, or why this device cannot serve the request. The selection of 16-bit weights has a
// histogram of all magnitudes in shared memory; no other kernel of the package needs as much.
inline const char* obstacle(const ThresholdRequest& request) {
  using Shared = FirstDigitShared<uint16_t, RadixSelect<uint16_t>::SmallCounters>;
  const bool enough = request.limits.shared_bytes_per_block >= static_cast<int>(sizeof(Shared));
  for (const WeightView& weight : request.weights) {
    if (has_key<uint16_t>(weight.type) && !enough) {
      return "thresholds of 16-bit weights need 64.4 KiB of shared memory a block: a device of "
             "compute capability 8.0 or later";
    }
  }
  return nullptr;
}

// Lays out the selection in those weights of the request whose keys are of type Key, and appends
// their table to `table`.
template <typename Key>
Selection<Key> lay_out_selection(const ThresholdRequest& request, Workspace& workspace,
                                 std::vector<TableEntry>& table) {
  using Radix = RadixSelect<Key>;
  int32_t tiles = 0;
  int64_t candidates = 0;
  for (const WeightView& weight : request.weights) {
    if (!has_key<Key>(weight.type)) continue;
    table.push_back({weight.data, weight.size, candidates, tiles,
                     static_cast<int32_t>(weight.position), weight.type});
    tiles += tiles_of<Key>(weight.size);
    if (Radix::kDigits.count > 1) candidates += candidate_capacity(weight.size);
  }

  Selection<Key> selection = {};
  selection.prune_counts = request.prune_counts;
  selection.thresholds = request.thresholds;
  selection.tensors = static_cast<int32_t>(table.size());
  selection.assign_tiles(tiles, request.limits.multiprocessors * Radix::kBlocks);
  const bool small = lacks_shared_memory<Key>(request.limits);
  selection.bins = Radix::FirstCounters::kBins;
  selection.keys_per_flush =
      small ? Radix::SmallCounters::kMaxKeys : Radix::FirstCounters::kMaxKeys;
  int64_t histograms = selection.tensors;
  if (selection.tensors > selection.blocks) histograms = selection.blocks * (small ? 2 : 1);
  selection.entries = workspace.take<TableEntry>(selection.tensors);
  selection.states = workspace.take<SelectionState<Key>>(selection.tensors);
  selection.histograms = workspace.take<Count>(histograms * selection.bins);
  selection.candidates = workspace.take<Key>(candidates);
  return selection;
}

template <typename Key, typename Counters>
void launch_first_digit(Launcher& launcher, const Selection<Key>& selection, Digit digit) {
  launcher.launch(first_digit_kernel<Key, Counters>, selection.blocks, RadixSelect<Key>::kThreads,
                  sizeof(FirstDigitShared<Key, Counters>), selection, digit);
}

// One launch for each kLargeChunk tensors, and one for each digit.
template <typename Key>
void launch_selection(Launcher& launcher, const Selection<Key>& selection,
                      const std::vector<TableEntry>& table, const DeviceLimits& limits) {
  using Radix = RadixSelect<Key>;
  constexpr KeyDigits kDigits = Radix::kDigits;
  launch_start(launcher, start_selection_kernel<Key, kSmallChunk>,
               start_selection_kernel<Key, kLargeChunk>, selection, table);
  if (selection.blocks == 0) return;

  if (lacks_shared_memory<Key>(limits)) {
    launch_first_digit<Key, typename Radix::SmallCounters>(launcher, selection, kDigits.digit(0));
  } else {
    launch_first_digit<Key, typename Radix::FirstCounters>(launcher, selection, kDigits.digit(0));
  }
  if constexpr (kDigits.count > 1) {
    for (int i = 1; i < kDigits.count; ++i) {
      launcher.launch(later_digit_kernel<Key>, selection.blocks, Radix::kThreads,
                      sizeof(LaterDigitShared<Key>), selection, kDigits.digit(i));
    }
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
  if (!table.empty()) launch_selection(launcher, selection, table, request.limits);
}

inline cudaError_t launch_thresholds(const ThresholdRequest& request, void* workspace,
                                     cudaStream_t stream) {
  Launcher launcher(stream);
  launch_thresholds_of<uint64_t>(launcher, request, workspace);
  launch_thresholds_of<uint32_t>(launcher, request, workspace);
  launch_thresholds_of<uint16_t>(launcher, request, workspace);
  return launcher.error();
}

}  // namespace pdp
