// power_sums: (d, sum |w|^p, sum |w|^q) over the unpruned weights of each group of a list. A group
// is cut into tiles, and a warp sums each tile. The sums of the tiles are added in a fixed order,
// so that the results are bitwise repeatable.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../powers.h"
#include "block.cuh"
#include "lane_sums.cuh"
#include "launch.cuh"
#include "upload.cuh"
#include "workspace.cuh"

namespace pdp {

constexpr int kSumThreads = 256;
constexpr int kSumBlocksPerMultiprocessor = 4;  // not yet measured on a GPU

// Weights of a tile. 25 million weights have 6,000 tiles; of 10^9 weights, one block has to add up
// 250,000 tiles, which are 6 MB.
constexpr int64_t kSumTile = 4096;

// Tiles that the block of a group adds side by side, and how many of them a thread loads at once.
// 60 KB in flight are what the L2 cache can send to one multiprocessor within its latency.
constexpr int kAddedTiles = 320;
constexpr int kAddedInFlight = 8;

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

__device__ inline double magnitude(double weight) { return std::fabs(weight); }
template <typename Weight>
__device__ double magnitude(Weight weight) {
  return Magnitude<Weight>::value(magnitude_key(weight));
}

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
  uint32_t float_to_double;  // kFloatToDouble
  int32_t tensors;
  int64_t tiles;
  int64_t split_groups;  // groups of several tiles
  int64_t most_tiles;    // of a group
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

// Weights that one warp sums.
struct SumTile {
  const void* data;
  const uint8_t* kept;  // null: no weight is pruned
  int size;
  WeightType type;
  PowerSums* result;
};

__device__ inline SumTile tile_at(const SumPlan& plan, int64_t tile) {
  const SumEntry entry =
      entry_at(plan, tile, [](const SumEntry& entry) { return entry.tile_begin; });
  const int64_t row = (tile - entry.tile_begin) / entry.tiles_per_row;
  const int64_t offset = (tile - entry.tile_begin) % entry.tiles_per_row * kSumTile;
  const int64_t begin = row * entry.row_size + offset;
  const auto* kept = reinterpret_cast<const uint8_t*>(entry.kept);
  return {static_cast<const char*>(entry.data) + begin * bytes_of(entry.type),
          kept == nullptr ? nullptr : kept + begin,
          static_cast<int>(min(kSumTile, entry.row_size - offset)), entry.type,
          entry.tiles_per_row > 1 ? &plan.tile_sums[tile] : &plan.results[entry.group_begin + row]};
}

// Returns a lane's sums of a tile; those of PacketSums are right if they fit.
template <Norms kNorms, typename Weight>
__device__ PowerSums sum_lane(const SumTile& tile, const SumPlan& plan) {
  const auto* weights = static_cast<const Weight*>(tile.data);
  if constexpr (kNorms != Norms::kAny && !std::is_same_v<Weight, double>) {
    return sum_packets<kNorms>(weights, tile.kept, tile.size, plan.float_to_double);
  } else {
    const auto magnitude_at = [&](int i) { return magnitude(load_weight(&weights[i])); };
    return sum_each<kNorms, 4>(magnitude_at, tile.kept, tile.size, plan.p, plan.q);
  }
}

// Returns a lane's sums of any weights narrower than float64.
template <Norms kNorms>
__device__ PowerSums sum_lane_of_any(const SumTile& tile, const SumPlan& plan) {
  const auto magnitude_at = [&](int i) {
    if (tile.type == WeightType::kFloat32) {
      return magnitude(load_weight(static_cast<const float*>(tile.data) + i));
    }
    const auto* bits = static_cast<const uint16_t*>(tile.data) + i;
    if (tile.type == WeightType::kBFloat16) return magnitude(BFloat16{__ldg(bits)});
    return magnitude(Half{__ldg(bits)});
  };
  return sum_each<kNorms, 1>(magnitude_at, tile.kept, tile.size, plan.p, plan.q);
}

// Returns the sums of a tile in every lane of a warp.
template <Norms kNorms>
__device__ PowerSums sum_tile(const SumTile& tile, const SumPlan& plan) {
  PowerSums sums;
  if (tile.type == WeightType::kFloat64) {
    return warp_sum(sum_lane<kNorms, double>(tile, plan));
  } else if (tile.type < WeightType::kBFloat16) {
    sums = sum_lane<kNorms, float>(tile, plan);
  } else if (tile.type == WeightType::kBFloat16) {
    sums = sum_lane<kNorms, BFloat16>(tile, plan);
  } else {
    sums = sum_lane<kNorms, Half>(tile, plan);
  }
  sums = warp_sum(sums);
  if (kNorms == Norms::kAny || PacketSums<kNorms>::fit(sums)) return sums;
  return warp_sum(sum_lane_of_any<kNorms>(tile, plan));
}

template <Norms kNorms>
__global__ void __launch_bounds__(kSumThreads, kSumBlocksPerMultiprocessor)
    sum_tiles_kernel(const __grid_constant__ SumPlan plan) {
  constexpr int kWarps = kSumThreads / kWarp;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  for (int64_t i = warp; i < plan.tiles; i += static_cast<int64_t>(gridDim.x) * kWarps) {
    const SumTile tile = tile_at(plan, i);
    const PowerSums sums = sum_tile<kNorms>(tile, plan);
    if (threadIdx.x % kWarp == 0) *tile.result = sums;
  }
}

constexpr int kValues = sizeof(PowerSums) / sizeof(double);

template <int kTiles>
struct AddTilesShared {
  double sums[kTiles * kValues];
};

// One block for each group of several tiles, with a thread for each value of kTiles tiles: each
// thread adds every kTiles-th. Then warp 0 adds the counts of the threads, and warps 1 and 2 their
// sums. If a group has no more than kTiles tiles, a larger kTiles gives the same bits.
template <int kTiles>
__global__ void __launch_bounds__(kTiles* kValues)
    add_tiles_kernel(const __grid_constant__ SumPlan plan) {
  constexpr int kThreads = kTiles * kValues, kRound = kThreads * kAddedInFlight;
  auto& shared = shared_memory<AddTilesShared<kTiles>>();
  const int64_t place = blockIdx.x;
  const SumEntry entry =
      entry_at(plan, place, [](const SumEntry& entry) { return entry.split_begin; });
  const int64_t row = place - entry.split_begin;
  const auto* values = reinterpret_cast<const double*>(plan.tile_sums + entry.tile_begin +
                                                       row * entry.tiles_per_row);
  double sum = 0;
  values += threadIdx.x;
#pragma unroll 1
  for (int64_t left = entry.tiles_per_row * kValues - threadIdx.x; left > 0; left -= kRound) {
    double loaded[kAddedInFlight];
#pragma unroll
    for (int i = 0; i < kAddedInFlight; ++i) {
      loaded[i] = i * kThreads < left ? values[i * kThreads] : 0;
    }
#pragma unroll
    for (int i = 0; i < kAddedInFlight; ++i) sum += loaded[i];
    values += kRound;
  }
  shared.sums[threadIdx.x] = sum;
  __syncthreads();
  const int value = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (value >= kValues) return;
  double total = 0;
#pragma unroll
  for (int tile = 0; tile < kTiles; tile += kWarp) {
    total += shared.sums[(tile + lane) * kValues + value];
  }
  total = warp_reduce(total, [](double a, double b) { return a + b; });
  auto* result = reinterpret_cast<double*>(&plan.results[entry.group_begin + row]);
  if (lane == 0) result[value] = total;
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
    plan.most_tiles = std::max(plan.most_tiles, tiles);
    groups += tensor.rows;
  }
  plan.tensors = static_cast<int32_t>(table.size());
  plan.entries = workspace.take<SumEntry>(plan.tensors);
  plan.tile_sums = workspace.take<PowerSums>(plan.split_groups > 0 ? plan.tiles : 0);
  plan.results = request.results;
  plan.p = request.p;
  plan.q = request.q;
  plan.float_to_double = kFloatToDouble;
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

template <int kTiles>
void launch_add_tiles(Launcher& launcher, const SumPlan& plan) {
  launcher.launch(add_tiles_kernel<kTiles>, plan.split_groups, kTiles * kValues,
                  sizeof(AddTilesShared<kTiles>), plan);
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
    if (plan.most_tiles <= kWarp) {
      launch_add_tiles<kWarp>(launcher, plan);
    } else {
      launch_add_tiles<kAddedTiles>(launcher, plan);
    }
  }
  return launcher.error();
}

}  // namespace pdp
