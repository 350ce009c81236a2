// How many weights of a tensor to prune, from its sparsity. Shared by the bindings of both devices.
#pragma once

#include <cmath>
#include <cstdint>

namespace pdp {

// Returns k = floor(r n + 1/2), or the nearer of 0 and n where it is not between them. NaN gives 0.
inline int64_t prune_count(double sparsity, int64_t size) {
  const double rounded = std::floor(sparsity * static_cast<double>(size) + 0.5);
  if (rounded >= static_cast<double>(size)) return size;
  return rounded > 0 ? static_cast<int64_t>(rounded) : 0;
}

}  // namespace pdp
