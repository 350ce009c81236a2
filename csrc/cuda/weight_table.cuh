// A list of weights on the device: a table with one entry per tensor, how the work is distributed
// over blocks, and the state of the selection in each tensor.
//
// Each tensor is cut into tiles, and every block handles one run of consecutive tiles of the list.
// A run has one slice of each tensor it touches: a contiguous range. At most one tensor is cut at
// each border between blocks, so few histograms have to be merged in device memory.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../magnitude.h"
#include "block.cuh"
#include "launch.cuh"

namespace pdp {

// A tensor as the host describes it; position is its index in the caller's list.
struct WeightView {
  const void* data;
  int64_t size;
  int64_t position;
  WeightType type;
};

// 16 KiB of weights: large enough to fill a block's loads, small enough to spread 10^6 weights over
// all multiprocessors. Not yet measured on a GPU.
template <typename Key>
constexpr int64_t kTile = 16 * 1024 / sizeof(Key);

// 32 bits are enough for 32 TiB of weights.
template <typename Key>
PDP_HOST_DEVICE int32_t tiles_of(int64_t size) {
  return static_cast<int32_t>((size + kTile<Key> - 1) / kTile<Key>);
}

// Room for the keys that share v_k's first digits. Of normally distributed float32 weights, the bin
// of the median or of the 90th percentile (an eighth of an octave) holds 2 to 6%.
PDP_HOST_DEVICE int64_t candidate_capacity(int64_t size) { return size / 8; }

struct TableEntry {
  const void* data;
  int64_t size;
  int64_t candidates_begin;  // its first place in the list's candidate buffer
  int32_t tile_begin;        // its first tile among those of the list
  int32_t position;
  WeightType type;
};

// The search for v_k, the k-th smallest key of one tensor, after some of its digits.
template <typename Key>
struct SelectionState {
  Key prefix;        // the digits of v_k found so far; at the end v_k itself
  Key next;          // the smallest key found so far whose digits are above the prefix
  int64_t rank;      // 0-based rank of v_k among the keys with the prefix; -1: nothing to select
  int64_t count;     // how many keys have the prefix
  int64_t buffered;  // how many candidates the buffer holds, or 0: read the weights
  // Weights whose key is v_k are pruned up to this index.
  int64_t last_pruned;
  Count reserved;    // candidates that blocks have claimed room for
  Count tiles_done;  // tiles counted in the running pass
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

// Tensors of one key width, and the run of tiles of every block.
template <typename Key>
struct WeightTable {
  TableEntry* entries;
  int32_t tensors;
  int32_t blocks;

  // Every block has a run of run_tiles tiles, the first longer_runs blocks one more.
  int32_t run_tiles;
  int32_t longer_runs;

  void assign_tiles(int32_t tiles, int32_t most_blocks) {
    blocks = std::min(tiles, most_blocks);
    if (blocks == 0) return;
    run_tiles = tiles / blocks;
    longer_runs = tiles % blocks;
  }

  __device__ int32_t run_begin(int32_t block) const {
    return block * run_tiles + min(block, longer_runs);
  }
  __device__ int32_t block_of(int32_t tile) const {
    const int32_t in_longer = longer_runs * (run_tiles + 1);
    if (tile < in_longer) return tile / (run_tiles + 1);
    return longer_runs + (tile - in_longer) / run_tiles;
  }
};

// What every pass of a selection needs.
template <typename Key>
struct Selection : WeightTable<Key> {
  const int64_t* prune_counts;  // by position
  ThresholdOutput thresholds;   // by position
  int32_t bins;                 // per histogram
  int64_t keys_per_flush;       // a block must merge its histogram after as many
  SelectionState<Key>* states;
  Count* histograms;  // zero between passes
  Key* candidates;
};

// The tiles of one tensor that one block handles.
template <typename Key>
struct Slice {
  TableEntry entry;
  int32_t tensor;
  int32_t first_tile;  // within the tensor
  int32_t tiles;
  bool more;  // the block has tiles of later tensors too

  __device__ bool is_whole_tensor() const { return tiles == tiles_of<Key>(entry.size); }

  __device__ int64_t weights_begin() const { return first_tile * kTile<Key>; }
  __device__ int64_t weights_end() const {
    return min((first_tile + tiles) * kTile<Key>, entry.size);
  }
};

// Calls process() for every tensor that this block has tiles of, and for empty tensors between
// them. `slice`, in shared memory, says which tiles. Called by all threads.
template <typename Key, typename Process>
__device__ void for_each_slice(const WeightTable<Key>& table, Slice<Key>& slice, Process process) {
  const auto block = static_cast<int32_t>(blockIdx.x);
  const auto take = [&](int32_t tensor, int32_t tile) {
    const TableEntry entry = table.entries[tensor];
    const int32_t run_end = table.run_begin(block + 1);
    const int32_t end = min(run_end, entry.tile_begin + tiles_of<Key>(entry.size));
    slice = {entry, tensor, tile - entry.tile_begin, end - tile, end < run_end};
  };
  const int32_t begin = table.run_begin(block);
  for (int32_t i = threadIdx.x; i < table.tensors; i += blockDim.x) {
    const TableEntry& entry = table.entries[i];
    const bool starts_here =
        entry.tile_begin <= begin && begin < entry.tile_begin + tiles_of<Key>(entry.size);
    if (starts_here) take(i, begin);
  }
  __syncthreads();
  while (true) {
    process();
    if (!slice.more) return;
    __syncthreads();
    if (threadIdx.x == 0) {
      const int32_t next = slice.tensor + 1;
      take(next, table.entries[next].tile_begin);
    }
    __syncthreads();
  }
}

// Returns the histogram in device memory of a tensor that is split over several blocks, or that one
// block counts in several rounds. At most one split tensor begins in each block.
template <typename Key>
__device__ Count* histogram_of(const Selection<Key>& selection, int32_t tensor,
                               const TableEntry& entry) {
  int64_t slot = tensor;
  if (selection.tensors > selection.blocks) {
    const int32_t first = selection.block_of(entry.tile_begin);
    const int32_t last = selection.block_of(entry.tile_begin + tiles_of<Key>(entry.size) - 1);
    slot = first < last ? first : selection.blocks + first;
  }
  return selection.histograms + slot * selection.bins;
}

// The table is a kernel argument, which a captured graph keeps by value. Arguments may take 32,764
// bytes (CUDA 12.1 and later). Short lists use a small chunk, which costs less to launch.
constexpr int kSmallChunk = 16;
constexpr int kLargeChunk = 768;

template <int kCapacity>
struct TableChunk {
  TableEntry entries[kCapacity];
};

// Block b of such a kernel writes entry first + b of the plan's table and initialises the plan's
// arrays for that tensor.
template <typename Plan, int kCapacity>
using StartKernel = void (*)(Plan plan, TableChunk<kCapacity> chunk, int32_t first);

template <typename Plan, int kCapacity>
void launch_start_chunks(Launcher& launcher, StartKernel<Plan, kCapacity> kernel, const Plan& plan,
                         const std::vector<TableEntry>& table) {
  constexpr int kThreads = 256;
  const auto entries = static_cast<int32_t>(table.size());
  for (int32_t first = 0; first < entries; first += kCapacity) {
    const int32_t count = std::min(kCapacity, entries - first);
    TableChunk<kCapacity> chunk = {};
    std::copy_n(table.begin() + first, count, chunk.entries);
    launcher.launch(kernel, count, kThreads, 0, plan, chunk, first);
  }
}

// One launch, or one per kLargeChunk tensors, of the kernel for chunks of either size.
template <typename Plan>
void launch_start(Launcher& launcher, StartKernel<Plan, kSmallChunk> small_chunks,
                  StartKernel<Plan, kLargeChunk> large_chunks, const Plan& plan,
                  const std::vector<TableEntry>& table) {
  if (table.size() <= kSmallChunk) {
    launch_start_chunks(launcher, small_chunks, plan, table);
  } else {
    launch_start_chunks(launcher, large_chunks, plan, table);
  }
}

// A StartKernel: initialises the tensor's state and histogram. If all weights or none are pruned,
// there is nothing to select, and the threshold is written here.
template <typename Key, int kCapacity>
__global__ void start_selection_kernel(const __grid_constant__ Selection<Key> selection,
                                       const __grid_constant__ TableChunk<kCapacity> chunk,
                                       int32_t first) {
  const int32_t tensor = first + static_cast<int32_t>(blockIdx.x);
  const TableEntry entry = chunk.entries[blockIdx.x];
  const int64_t size = entry.size;

  if (threadIdx.x == 0) {
    const int64_t k = selection.prune_counts[entry.position];
    const bool none = k <= 0 || size == 0;
    const bool all = !none && k >= size;
    SelectionState<Key> state = {};
    state.next = static_cast<Key>(~Key{0});
    state.prefix = all ? state.next : Key{0};
    state.rank = none || all ? -1 : k - 1;
    state.count = size;
    state.last_pruned = none ? -1 : size;
    selection.entries[tensor] = entry;
    selection.states[tensor] = state;
    const double infinity = Magnitude<double>::value(Magnitude<double>::kInfinity);
    if (none) selection.thresholds.store(entry.position, -infinity);
    if (all) selection.thresholds.store(entry.position, infinity);
  }

  if (size == 0) return;
  const int32_t last_tile = entry.tile_begin + tiles_of<Key>(size) - 1;
  const bool split = selection.block_of(entry.tile_begin) != selection.block_of(last_tile);
  if (!split && size <= selection.keys_per_flush) return;
  Count* histogram = histogram_of(selection, tensor, entry);
  for (int32_t bin = threadIdx.x; bin < selection.bins; bin += blockDim.x) {
    if (split) {
      histogram[bin] = 0;
    } else {
      atomicExch(&histogram[bin], Count{0});  // tensors of one block use the same histogram
    }
  }
}

}  // namespace pdp
