// A list of weights on the device: a table with one entry per tensor, and how the work is
// distributed over blocks.
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

// A tensor of so few keys is selected in by one block, which holds them in shared memory. It has no
// tiles.
template <typename Key>
constexpr int64_t kWhole = 64 * 1024 / sizeof(Key);

struct TableEntry {
  const void* data;
  int64_t size;
  int64_t candidates_begin;  // its first place in the list's buffer of candidates and survivors
  int32_t tile_begin;        // its first tile among those of the list
  int32_t tiles;
  int32_t position;
  WeightType type;
};

// Tensors of one key width, and the run of tiles of every block.
template <typename Key>
struct WeightTable {
  TableEntry* entries;
  int32_t* first_tensors;  // of each block: where its run begins
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

  // Writes an entry, and where blocks begin in its tensor. Called by all threads of a block.
  __device__ void write(int32_t tensor, const TableEntry& entry) const {
    if (threadIdx.x == 0) entries[tensor] = entry;
    if (entry.tiles == 0) return;
    const int32_t last = block_of(entry.tile_begin + entry.tiles - 1);
    int32_t first = block_of(entry.tile_begin);
    first += run_begin(first) < entry.tile_begin;
    for (int32_t block = first + threadIdx.x; block <= last; block += blockDim.x) {
      first_tensors[block] = tensor;
    }
  }
};

// The tiles of one tensor that one block handles.
template <typename Key>
struct Slice {
  TableEntry entry;
  int32_t tensor;
  int32_t first_tile;  // within the tensor
  int32_t tiles;
  bool more;  // the block has tiles of later tensors too

  __device__ bool is_whole_tensor() const { return tiles == entry.tiles; }

  struct Range {
    int64_t begin, end;
  };

  __device__ int64_t weights_begin() const { return first_tile * kTile<Key>; }
  __device__ int64_t weights_end() const {
    return min((first_tile + tiles) * kTile<Key>, entry.size);
  }

  // The places of this slice among `size` values that replace the tensor's weights. Only the device
  // knows how many there are: each tile stands for an equal number.
  __device__ Range range_of(int64_t size) const {
    constexpr int64_t kPerPacket = 16 / sizeof(Key);
    const int64_t per_tile = (size / entry.tiles + kPerPacket) / kPerPacket * kPerPacket;
    const int64_t begin = min(first_tile * per_tile, size);
    return {begin, min(begin + tiles * per_tile, size)};
  }
};

// Calls function(pointer to the weights, of their type).
template <typename Key, typename Function>
__device__ void with_weights(const TableEntry& entry, Function function) {
  if constexpr (sizeof(Key) == sizeof(double)) {
    function(static_cast<const double*>(entry.data));
  } else if constexpr (sizeof(Key) == sizeof(float)) {
    function(static_cast<const float*>(entry.data));
  } else if (entry.type == WeightType::kBFloat16) {
    function(static_cast<const BFloat16*>(entry.data));
  } else {
    function(static_cast<const Half*>(entry.data));
  }
}

// Calls process() for every tensor that this block has tiles of, and for tensors without tiles
// between them. `slice`, in shared memory, says which tiles. One thread calls prepare(tensor)
// before, so that what it loads comes together with the entry. Called by all threads.
template <typename Key, typename Prepare, typename Process>
__device__ void for_each_slice(const WeightTable<Key>& table, Slice<Key>& slice, Prepare prepare,
                               Process process) {
  const auto block = static_cast<int32_t>(blockIdx.x);
  const auto take = [&](int32_t tensor, int32_t tile) {
    const TableEntry entry = table.entries[tensor];
    prepare(tensor);
    const int32_t run_end = table.run_begin(block + 1);
    const int32_t end = min(run_end, entry.tile_begin + entry.tiles);
    slice = {entry, tensor, tile - entry.tile_begin, end - tile, end < run_end};
  };
  if (threadIdx.x == 0) take(table.first_tensors[block], table.run_begin(block));
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
                         const std::vector<TableEntry>& table, int threads, size_t shared_bytes) {
  const auto entries = static_cast<int32_t>(table.size());
  for (int32_t first = 0; first < entries; first += kCapacity) {
    const int32_t count = std::min(kCapacity, entries - first);
    TableChunk<kCapacity> chunk = {};
    std::copy_n(table.begin() + first, count, chunk.entries);
    launcher.launch(kernel, count, threads, shared_bytes, plan, chunk, first);
  }
}

// One launch, or one per kLargeChunk tensors, of the kernel for chunks of either size.
template <typename Plan>
void launch_start(Launcher& launcher, StartKernel<Plan, kSmallChunk> small_chunks,
                  StartKernel<Plan, kLargeChunk> large_chunks, const Plan& plan,
                  const std::vector<TableEntry>& table, int threads = 256,
                  size_t shared_bytes = 0) {
  if (table.size() <= kSmallChunk) {
    launch_start_chunks(launcher, small_chunks, plan, table, threads, shared_bytes);
  } else {
    launch_start_chunks(launcher, large_chunks, plan, table, threads, shared_bytes);
  }
}

}  // namespace pdp
