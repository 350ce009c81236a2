// digit_counts: one pass of a radix select over shards of weights. The caller adds up the counts of
// all shards and goes on with the selection.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../digits.h"
#include "../magnitude.h"
#include "block.cuh"
#include "launch.cuh"
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

// The keys that have a prefix. Their digits are counted.
template <typename Key>
struct KeyRange {
  // Differences of keys need one more bit: a negative one wraps around, and is larger than any key.
  using Number = std::conditional_t<sizeof(Key) < sizeof(uint32_t), uint32_t, Key>;

  Number first;
  Number size;
  int shift;

  __device__ KeyRange(Number prefix, Digit digit)
      : first(prefix << (digit.shift + digit.bits)),
        size(Number{1} << (digit.shift + digit.bits)),
        shift(digit.shift) {}

  // Counts the digit of a weight's key. Keys out of the range all count in the bin after the last:
  // a branch around the atomic would take more instructions. `nearest` becomes the distance from
  // the end of the range to the least key so far above it.
  template <typename Weight>
  __device__ void count(Weight weight, uint32_t* counters, Number& nearest) const {
    using Signed = std::make_signed_t<Number>;
    constexpr Number kSignless = (Number{1} << Magnitude<Weight>::kBits) - 1;
    constexpr Number kNaN = Magnitude<Weight>::kInfinity + 1;  // magnitude_key
    const Number bits = bit_cast<Key>(weight) & kSignless;
    const auto place = static_cast<Number>(
        min(static_cast<Signed>(bits - first), static_cast<Signed>(kNaN - first)));
    atomicAdd(&counters[min(place, size) >> shift], 1u);
    nearest = min(nearest, place - size);
  }

  // Returns the least key above the range, or kNoKey.
  __device__ Count above(Number nearest) const {
    constexpr Number kFarthest = ~Number{0} / 2;
    return nearest <= kFarthest ? Count{first} + size + nearest : kNoKey;
  }
};

template <typename Key>
struct DigitCountsShared {
  static constexpr int kBins = 1 << key_digits(sizeof(Key)).bits[0];

  // Weights crowd into a few exponents, but threads of a warp that meet in one bin cost one access
  // only: the hardware adds their number (ATOMS.POPC.INC). No counter overflows: a block never has
  // 2^32 weights of a slice.
  uint32_t counters[kBins + 1];
  Slice<Key> slice;
  Count above;
};

// A StartKernel: initialises the tensor's results.
template <typename Key, int kCapacity>
__global__ void start_counting_kernel(const __grid_constant__ DigitCounts<Key> plan,
                                      const __grid_constant__ TableChunk<kCapacity> chunk,
                                      int32_t first) {
  const int32_t tensor = first + static_cast<int32_t>(blockIdx.x);
  plan.write(tensor, chunk.entries[blockIdx.x]);
  if (threadIdx.x == 0) plan.above[tensor] = kNoKey;
  const int32_t bins = plan.digit.bins();
  Count* counts = plan.counts + static_cast<int64_t>(tensor) * bins;
  for (int32_t bin = threadIdx.x; bin < bins; bin += blockDim.x) counts[bin] = 0;
}

template <typename Key>
__global__ void __launch_bounds__(kCountThreads, kCountBlocksPerMultiprocessor)
    count_digit_kernel(const __grid_constant__ DigitCounts<Key> plan) {
  auto& shared = shared_memory<DigitCountsShared<Key>>();
  const auto nothing_else = [](int32_t) {};
  for_each_slice(plan, shared.slice, nothing_else, [&] {
    const Slice<Key>& slice = shared.slice;
    using Range = KeyRange<Key>;
    using Number = typename Range::Number;
    const Range range(static_cast<Number>(plan.prefixes[slice.tensor]), plan.digit);
    const int32_t bins = plan.digit.bins();
    for (int32_t bin = threadIdx.x; bin < bins; bin += kCountThreads) shared.counters[bin] = 0;
    if (threadIdx.x == 0) shared.above = kNoKey;
    __syncthreads();

    Number nearest = ~Number{0};
    const auto count = [&](auto weight) { range.count(weight, shared.counters, nearest); };
    const int64_t begin = slice.weights_begin(), end = slice.weights_end();
    with_weights<Key>(slice.entry, [&](const auto* weights) {
      for_each<kCountThreads>(weights, begin, end, count);
    });

    if (plan.digit.last) {
      const Count above =
          warp_reduce(range.above(nearest), [](Count a, Count b) { return min(a, b); });
      if (threadIdx.x % kWarp == 0) atomicMin(&shared.above, above);
    }
    __syncthreads();
    Count* row = plan.counts + static_cast<int64_t>(slice.tensor) * bins;
    for (int32_t bin = threadIdx.x; bin < bins; bin += kCountThreads) {
      const Count count = shared.counters[bin];
      if (count > 0) atomicAdd(&row[bin], count);
    }
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
    const int32_t own_tiles = tiles_of<Key>(weight.size);
    table.push_back({weight.data, weight.size, 0, tiles, own_tiles,
                     static_cast<int32_t>(weight.position), weight.type});
    tiles += own_tiles;
  }
  DigitCounts<Key> plan = {};
  plan.tensors = static_cast<int32_t>(table.size());
  plan.assign_tiles(tiles, request.limits.multiprocessors * kCountBlocksPerMultiprocessor);
  plan.entries = workspace.take<TableEntry>(plan.tensors);
  plan.first_tensors = workspace.take<int32_t>(plan.blocks);
  plan.prefixes = request.prefixes;
  plan.digit = request.digit;
  plan.counts = reinterpret_cast<Count*>(request.counts);
  plan.above = reinterpret_cast<Count*>(request.above);
  return plan;
}

// The widest keys have the most tiles, and so the most blocks.
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
