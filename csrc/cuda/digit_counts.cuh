// digit_counts: one pass of a radix select over shards of weights. The caller adds up the counts of
// all shards and goes on with the selection.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../digits.h"
#include "../magnitude.h"
#include "block.cuh"
#include "counters.cuh"
#include "launch.cuh"
#include "radix_select.cuh"
#include "weight_table.cuh"
#include "workspace.cuh"

namespace pdp {

constexpr int kCountThreads = 256;
constexpr int kCountBlocksPerMultiprocessor = 6;  // not yet measured on a GPU

constexpr Count kNoKey = INT64_MAX;

// The operator's arguments, without the workspace.
struct DigitCountsRequest {
  std::vector<WeightView> weights;  // of one key width
  const int64_t* prefixes;          // on the device, like the results
  Digit digit;
  int64_t* counts;  // (weights, digit.bins())
  int64_t* above;   // (weights)
  DeviceLimits limits;
};

template <typename Key>
struct DigitCounts : WeightTable<Key> {
  const int64_t* prefixes;
  Digit digit;
  Count* counts;
  Count* above;
};

template <typename Key>
struct DigitCountsShared {
  WideCounters<1 << key_digits(sizeof(Key)).bits[0]> counters;
  Slice<Key> slice;
  Count above;
};

// A StartKernel: initialises the tensor's results.
template <typename Key, int kCapacity>
__global__ void start_counting_kernel(const __grid_constant__ DigitCounts<Key> plan,
                                      const __grid_constant__ TableChunk<kCapacity> chunk,
                                      int32_t first) {
  const int32_t tensor = first + static_cast<int32_t>(blockIdx.x);
  if (threadIdx.x == 0) {
    plan.entries[tensor] = chunk.entries[blockIdx.x];
    plan.above[tensor] = kNoKey;
  }
  const int32_t bins = plan.digit.bins();
  Count* counts = plan.counts + static_cast<int64_t>(tensor) * bins;
  for (int32_t bin = threadIdx.x; bin < bins; bin += blockDim.x) counts[bin] = 0;
}

template <typename Key>
__global__ void __launch_bounds__(kCountThreads, kCountBlocksPerMultiprocessor)
    count_digit_kernel(const __grid_constant__ DigitCounts<Key> plan) {
  auto& shared = shared_memory<DigitCountsShared<Key>>();
  for_each_slice(plan, shared.slice, [&] {
    const Slice<Key>& slice = shared.slice;
    const auto prefix = static_cast<Key>(plan.prefixes[slice.tensor]);
    shared.counters.clear();
    if (threadIdx.x == 0) shared.above = kNoKey;
    __syncthreads();

    constexpr Key kNone = static_cast<Key>(~Key{0});
    Key next = kNone;
    for_each_weight_key<Key, kCountThreads>(
        slice.entry, slice.weights_begin(), slice.weights_end(),
        [&](Key key) { count_digit(key, prefix, plan.digit, shared.counters, next); }, [] {});

    if (plan.digit.last) {
      const Count above = warp_reduce(next == kNone ? kNoKey : Count{next},
                                      [](Count a, Count b) { return min(a, b); });
      if (threadIdx.x % kWarp == 0) atomicMin(&shared.above, above);
    }
    __syncthreads();
    const int64_t row = static_cast<int64_t>(slice.tensor) * plan.digit.bins();
    merge_counters(shared.counters, plan.counts + row);
    if (threadIdx.x == 0 && shared.above != kNoKey) {
      atomicMin(&plan.above[slice.tensor], shared.above);
    }
  });
}

template <typename Key>
DigitCounts<Key> lay_out_counts(const DigitCountsRequest& request, Workspace& workspace,
                                std::vector<TableEntry>& table) {
  int32_t tiles = 0;
  for (const WeightView& weight : request.weights) {
    table.push_back(
        {weight.data, weight.size, 0, tiles, static_cast<int32_t>(weight.position), weight.type});
    tiles += tiles_of<Key>(weight.size);
  }
  DigitCounts<Key> plan = {};
  plan.tensors = static_cast<int32_t>(table.size());
  plan.assign_tiles(tiles, request.limits.multiprocessors * kCountBlocksPerMultiprocessor);
  plan.entries = workspace.take<TableEntry>(plan.tensors);
  plan.prefixes = request.prefixes;
  plan.digit = request.digit;
  plan.counts = reinterpret_cast<Count*>(request.counts);
  plan.above = reinterpret_cast<Count*>(request.above);
  return plan;
}

// The table takes the same bytes for every key width.
inline size_t digit_counts_workspace_bytes(const DigitCountsRequest& request) {
  Workspace measured(nullptr);
  std::vector<TableEntry> table;
  lay_out_counts<uint64_t>(request, measured, table);
  return measured.bytes();
}

// Two launches, and one more for each further kLargeChunk tensors.
template <typename Key>
cudaError_t launch_digit_counts_of(const DigitCountsRequest& request, void* memory,
                                   cudaStream_t stream) {
  Launcher launcher(stream);
  Workspace workspace(memory);
  std::vector<TableEntry> table;
  const DigitCounts<Key> plan = lay_out_counts<Key>(request, workspace, table);
  launch_start(launcher, start_counting_kernel<Key, kSmallChunk>,
               start_counting_kernel<Key, kLargeChunk>, plan, table);
  if (plan.blocks > 0) {
    launcher.launch(count_digit_kernel<Key>, plan.blocks, kCountThreads,
                    sizeof(DigitCountsShared<Key>), plan);
  }
  return launcher.error();
}

inline cudaError_t launch_digit_counts(const DigitCountsRequest& request, void* workspace,
                                       cudaStream_t stream) {
  switch (request.weights[0].type) {
    case WeightType::kFloat64:
      return launch_digit_counts_of<uint64_t>(request, workspace, stream);
    case WeightType::kFloat32:
      return launch_digit_counts_of<uint32_t>(request, workspace, stream);
    default:
      return launch_digit_counts_of<uint16_t>(request, workspace, stream);
  }
}

}  // namespace pdp
