// Uploads from the host: a kernel takes values as an argument and writes them to device memory.
// That needs no synchronisation, and a captured graph keeps the values.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "launch.cuh"

namespace pdp {

template <typename Item, int kCapacity>
struct ItemChunk {
  Item items[kCapacity];
};

template <typename Item, int kCapacity>
__global__ void write_items_kernel(const __grid_constant__ ItemChunk<Item, kCapacity> chunk,
                                   int count, Item* items) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) items[i] = chunk.items[i];
}

template <int kCapacity, typename Item>
void launch_write_chunks(Launcher& launcher, const std::vector<Item>& values, Item* items) {
  constexpr int kThreads = 256;
  for (size_t first = 0; first < values.size(); first += kCapacity) {
    const size_t count = std::min<size_t>(kCapacity, values.size() - first);
    ItemChunk<Item, kCapacity> chunk = {};
    std::copy_n(values.begin() + static_cast<int64_t>(first), count, chunk.items);
    launcher.launch(write_items_kernel<Item, kCapacity>, 1, kThreads, 0, chunk,
                    static_cast<int>(count), items + first);
  }
}

// One launch for each chunk. Kernel arguments may take 32,764 bytes (CUDA 12.1 and later), which
// bounds kLarge. Short lists use a chunk of kSmall, which costs less to launch.
template <int kSmall, int kLarge, typename Item>
void launch_write(Launcher& launcher, const std::vector<Item>& values, Item* items) {
  if (values.size() <= kSmall) {
    launch_write_chunks<kSmall>(launcher, values, items);
  } else {
    launch_write_chunks<kLarge>(launcher, values, items);
  }
}

}  // namespace pdp
