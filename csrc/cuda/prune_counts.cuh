// prune_counts: numbers the host knows, written to the device by a kernel that has them as an
// argument, which needs no synchronisation and is kept by value in a captured graph.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "launch.cuh"

namespace pdp {

// k = floor(r * n + 1/2)
inline int64_t prune_count(double sparsity, int64_t size) {
  const double rounded = std::floor(sparsity * static_cast<double>(size) + 0.5);
  return std::max<int64_t>(0, std::min(static_cast<int64_t>(rounded), size));
}

constexpr int kSmallCountChunk = 32;
constexpr int kLargeCountChunk = 2048;

template <int kCapacity>
struct CountChunk {
  int64_t counts[kCapacity];
};

template <int kCapacity>
__global__ void write_counts_kernel(const __grid_constant__ CountChunk<kCapacity> chunk, int count,
                                    int64_t* counts) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) counts[i] = chunk.counts[i];
}

template <int kCapacity>
void launch_write_counts(Launcher& launcher, const std::vector<int64_t>& values, int64_t* counts) {
  constexpr int kThreads = 256;
  for (size_t first = 0; first < values.size(); first += kCapacity) {
    const size_t count = std::min<size_t>(kCapacity, values.size() - first);
    CountChunk<kCapacity> chunk = {};
    std::copy_n(values.begin() + static_cast<int64_t>(first), count, chunk.counts);
    launcher.launch(write_counts_kernel<kCapacity>, 1, kThreads, 0, chunk, static_cast<int>(count),
                    counts + first);
  }
}

inline cudaError_t launch_prune_counts(const std::vector<int64_t>& values, int64_t* counts,
                                       cudaStream_t stream) {
  Launcher launcher(stream);
  if (values.size() <= kSmallCountChunk) {
    launch_write_counts<kSmallCountChunk>(launcher, values, counts);
  } else {
    launch_write_counts<kLargeCountChunk>(launcher, values, counts);
  }
  return launcher.error();
}

}  // namespace pdp
