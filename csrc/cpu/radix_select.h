// Radix select for CPU: the k-th and k+1-th smallest magnitude of each weight of a list.
#pragma once

#include <vector>

#include "../magnitude.h"
#include "parallel.h"

namespace pdp::cpu {

struct Weight {
  const void* data;
  int64_t numel;
  WeightType type;
};

// The k-th smallest magnitude key v_k, the k+1-th, and how many keys are below v_k and equal to it.
// Zero unless 0 < k < n; otherwise neither the threshold nor the hard mask needs them.
struct OrderStatistics {
  uint64_t kth = 0;
  uint64_t next = 0;
  int64_t below = 0;
  int64_t equal = 0;
};

// k[i] is the number of weights to prune in weights[i].
std::vector<OrderStatistics> radix_select(const std::vector<Weight>& weights, const int64_t* k,
                                          ParallelFor parallel_for);

}  // namespace pdp::cpu
