// How many weights of a tensor to prune, from its sparsity. Shared by the bindings of both devices.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace pdp {

// k = floor(r * n + 1/2)
inline int64_t prune_count(double sparsity, int64_t size) {
  const double rounded = std::floor(sparsity * static_cast<double>(size) + 0.5);
  return std::max<int64_t>(0, std::min(static_cast<int64_t>(rounded), size));
}

}  // namespace pdp
