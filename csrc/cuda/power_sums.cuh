// power_sums: (d, sum |w|^p, sum |w|^q) over the unpruned weights of each group of a list. A group
// is cut into tiles, and a warp sums each tile. The sums of the tiles are added in a fixed order,
// so that the results are bitwise repeatable.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../powers.h"
#include "block.cuh"
#include "launch.cuh"
#include "upload.cuh"
#include "workspace.cuh"

namespace pdp {

constexpr int kSumThreads = 256;
constexpr int kSumBlocksPerMultiprocessor = 8;  // not yet measured on a GPU

// Weights of a tile. 25 million weights have 6,000 tiles; of 10^9 weights, one block has to add up
// 250,000 tiles. Not yet measured on a GPU.
constexpr int64_t kSumTile = 4096;

// A tensor as the host describes it: `rows` groups of equal size, one after another in memory.
struct RowsView {
  const void* data;
  const bool* kept;  // null: no weight is pruned
  int64_t rows;
  int64_t size;
  WeightType type;
};

// The operator's arguments, without the workspace.
struct PowerSumsRequest {
  std::vector<RowsView> tensors;
  double p, q;
  PowerSums* results;
  DeviceLimits limits;
};

struct SumEntry {
  const void* data;
  const bool* kept;
  int64_t row_size;
  int64_t tiles_per_row;  // at least 1, so that an empty row is written too
  int64_t tile_begin;     // index of its first tile in the list
  int64_t group_begin;    // index of its first group
  int64_t split_begin;    // index of its first group among those of several tiles
  WeightType type;
};

struct SumPlan {
  SumEntry* entries;
  PowerSums* tile_sums;  // of groups of several tiles
  PowerSums* results;
  double p, q;
  int32_t tensors;
  int64_t tiles;
  int64_t split_groups;  // groups of several tiles
};

constexpr int kSmallSumChunk = 16;
constexpr int kLargeSumChunk = 480;

// Returns the entry that holds `place`: the last one that begins at or before it, since an empty
// entry begins where the next one does.
template <typename BeginOf>
__device__ SumEntry entry_at(const SumPlan& plan, int64_t place, BeginOf begin_of) {
  int32_t low = 0, high = plan.tensors - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (begin_of(plan.entries[middle]) <= place) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return plan.entries[low];
}

__device__ inline PowerSums warp_sum(PowerSums sums) {
  const auto add = [](double a, double b) { return a + b; };
  return {warp_reduce(sums.count, add), warp_reduce(sums.p, add), warp_reduce(sums.q, add)};
}

// Returns a lane's sums of [begin, end): every 32nd weight, in order.
template <Norms kNorms, typename Weight>
__device__ PowerSums sum_lane(const Weight* weights, const bool* kept, int64_t begin, int64_t end,
                              double p, double q) {
  using Real = std::conditional_t<std::is_same_v<Weight, double>, double, float>;
  PowerSums sums;
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x % kWarp; i < end; i += kWarp) {
    const bool counts = kept == nullptr || kept[i];
    const double value = Magnitude<Weight>::value(magnitude_key(weights[i]));
    const Real magnitude = counts ? static_cast<Real>(value) : Real(0);
    sums.count += counts;
    sums.p += power_p<kNorms>(magnitude, p);
    sums.q += power_q<kNorms>(magnitude, q);
  }
  return sums;
}

template <Norms kNorms>
__device__ PowerSums sum_lane(const SumEntry& entry, int64_t begin, int64_t end, double p,
                              double q) {
  const auto sum = [&](auto weight) {
    return sum_lane<kNorms>(static_cast<const decltype(weight)*>(entry.data), entry.kept, begin,
                            end, p, q);
  };
  switch (entry.type) {
    case WeightType::kFloat64:
      return sum(double{});
    case WeightType::kFloat32:
      return sum(float{});
    case WeightType::kBFloat16:
      return sum(BFloat16{});
    default:
      return sum(Half{});
  }
}

template <Norms kNorms>
__global__ void __launch_bounds__(kSumThreads)
    sum_tiles_kernel(const __grid_constant__ SumPlan plan) {
  constexpr int kWarps = kSumThreads / kWarp;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  for (int64_t tile = warp; tile < plan.tiles; tile += static_cast<int64_t>(gridDim.x) * kWarps) {
    const SumEntry entry =
        entry_at(plan, tile, [](const SumEntry& entry) { return entry.tile_begin; });
    const int64_t row = (tile - entry.tile_begin) / entry.tiles_per_row;
    const int64_t tile_of_row = (tile - entry.tile_begin) % entry.tiles_per_row;
    const int64_t begin = row * entry.row_size + tile_of_row * kSumTile;
    const int64_t end = min(begin + kSumTile, (row + 1) * entry.row_size);
    const PowerSums sums = warp_sum(sum_lane<kNorms>(entry, begin, end, plan.p, plan.q));
    PowerSums* result =
        entry.tiles_per_row > 1 ? &plan.tile_sums[tile] : &plan.results[entry.group_begin + row];
    if (threadIdx.x % kWarp == 0) *result = sums;
  }
}

struct AddTilesShared {
  PowerSums warps[kSumThreads / kWarp];
};

// One block for each group of several tiles.
__global__ void __launch_bounds__(kSumThreads)
    add_tiles_kernel(const __grid_constant__ SumPlan plan) {
  auto& shared = shared_memory<AddTilesShared>();
  const int64_t place = blockIdx.x;
  const SumEntry entry =
      entry_at(plan, place, [](const SumEntry& entry) { return entry.split_begin; });
  const int64_t row = place - entry.split_begin;
  const PowerSums* tile_sums = plan.tile_sums + entry.tile_begin + row * entry.tiles_per_row;
  PowerSums sums;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < entry.tiles_per_row; i += kSumThreads)
    sums = sums + tile_sums[i];
  sums = warp_sum(sums);
  if (threadIdx.x % kWarp == 0) shared.warps[threadIdx.x / kWarp] = sums;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kSumThreads / kWarp; ++warp) sums = sums + shared.warps[warp];
  plan.results[entry.group_begin + row] = sums;
}

inline SumPlan lay_out_sums(const PowerSumsRequest& request, Workspace& workspace,
                            std::vector<SumEntry>& table) {
  SumPlan plan = {};
  int64_t groups = 0;
  for (const RowsView& tensor : request.tensors) {
    const int64_t row_size = tensor.rows > 0 ? tensor.size / tensor.rows : 0;
    const int64_t tiles = std::max<int64_t>(1, (row_size + kSumTile - 1) / kSumTile);
    table.push_back({tensor.data, tensor.kept, row_size, tiles, plan.tiles, groups,
                     plan.split_groups, tensor.type});
    plan.tiles += tensor.rows * tiles;
    plan.split_groups += tiles > 1 ? tensor.rows : 0;
    groups += tensor.rows;
  }
  plan.tensors = static_cast<int32_t>(table.size());
  plan.entries = workspace.take<SumEntry>(plan.tensors);
  plan.tile_sums = workspace.take<PowerSums>(plan.split_groups > 0 ? plan.tiles : 0);
  plan.results = request.results;
  plan.p = request.p;
  plan.q = request.q;
  return plan;
}

inline size_t power_sums_workspace_bytes(const PowerSumsRequest& request) {
  Workspace measured(nullptr);
  std::vector<SumEntry> table;
  lay_out_sums(request, measured, table);
  return measured.bytes();
}

template <Norms kNorms>
void launch_sum_tiles(Launcher& launcher, const SumPlan& plan, const DeviceLimits& limits) {
  constexpr int64_t kWarps = kSumThreads / kWarp;
  const int64_t blocks =
      std::min<int64_t>((plan.tiles + kWarps - 1) / kWarps,
                        static_cast<int64_t>(kSumBlocksPerMultiprocessor) * limits.multiprocessors);
  launcher.launch(sum_tiles_kernel<kNorms>, blocks, kSumThreads, 0, plan);
}

// Three launches, or two if no group has several tiles, and one more for each further
// kLargeSumChunk tensors.
inline cudaError_t launch_power_sums(const PowerSumsRequest& request, void* memory,
                                     cudaStream_t stream) {
  Launcher launcher(stream);
  Workspace workspace(memory);
  std::vector<SumEntry> table;
  const SumPlan plan = lay_out_sums(request, workspace, table);
  if (plan.tiles == 0) return cudaSuccess;
  launch_write<kSmallSumChunk, kLargeSumChunk>(launcher, table, plan.entries);
  switch (norms_of(request.p, request.q)) {
    case Norms::kHalfOne:
      launch_sum_tiles<Norms::kHalfOne>(launcher, plan, request.limits);
      break;
    case Norms::kHalfTwo:
      launch_sum_tiles<Norms::kHalfTwo>(launcher, plan, request.limits);
      break;
    case Norms::kOneTwo:
      launch_sum_tiles<Norms::kOneTwo>(launcher, plan, request.limits);
      break;
    case Norms::kAny:
      launch_sum_tiles<Norms::kAny>(launcher, plan, request.limits);
      break;
  }
  if (plan.split_groups > 0) {
    launcher.launch(add_tiles_kernel, plan.split_groups, kSumThreads, sizeof(AddTilesShared), plan);
  }
  return launcher.error();
}

}  // namespace pdp
