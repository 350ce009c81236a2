// prune_counts: how many weights of each tensor to prune. The host computes it from the sparsities.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "launch.cuh"
#include "upload.cuh"

namespace pdp {

// k = floor(r * n + 1/2)
inline int64_t prune_count(double sparsity, int64_t size) {
  const double rounded = std::floor(sparsity * static_cast<double>(size) + 0.5);
  return std::max<int64_t>(0, std::min(static_cast<int64_t>(rounded), size));
}

constexpr int kSmallCountChunk = 32;
constexpr int kLargeCountChunk = 2048;

inline cudaError_t launch_prune_counts(const std::vector<int64_t>& values, int64_t* counts,
                                       cudaStream_t stream) {
  Launcher launcher(stream);
  launch_write<kSmallCountChunk, kLargeCountChunk>(launcher, values, counts);
  return launcher.error();
}

}  // namespace pdp
