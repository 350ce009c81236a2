// power_sums: (d, sum |w|^p, sum |w|^q) over the unpruned weights of each group.
#pragma once

#include <cstdint>
#include <vector>

#include "../powers.h"
#include "array.h"
#include "parallel.h"

namespace pdp::cpu {

// A tensor: `rows` groups of equal size, one after another in memory.
struct Rows {
  Array weight;
  const bool* kept;  // null: no weight is pruned
  int64_t rows;
  int64_t numel;
};

// Writes the sums of every group, in order. Bitwise the same for every number of threads.
void power_sums(const std::vector<Rows>& tensors, double p, double q, PowerSums* results,
                ParallelFor parallel_for);

}  // namespace pdp::cpu
