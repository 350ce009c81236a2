// prune_counts: writes how many weights of each tensor to prune, which the host has computed.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "launch.cuh"
#include "upload.cuh"

namespace pdp {

constexpr int kSmallCountChunk = 32;
constexpr int kLargeCountChunk = 2048;

inline cudaError_t launch_prune_counts(const std::vector<int64_t>& values, int64_t* counts,
                                       cudaStream_t stream) {
  Launcher launcher(stream);
  launch_write<kSmallCountChunk, kLargeCountChunk>(launcher, values, counts);
  return launcher.error();
}

}  // namespace pdp
