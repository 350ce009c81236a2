// power_sums: (d, sum |w|^p, sum |w|^q) over the unpruned weights of each group.
#pragma once

#include <cstdint>
#include <vector>

#include "../powers.h"
#include "array.h"
#include "parallel.h"

namespace pdp::cpu {

// One tensor: `rows` groups that lie one after another in memory, of equal size.
struct Rows {
  Array weight;
  const bool* kept;  // null: no weight is pruned
  int64_t rows;
  int64_t numel;
};

// Writes the sums of every group, in order. The same bits whatever the number of threads.
void power_sums(const std::vector<Rows>& tensors, double p, double q, PowerSums* results,
                ParallelFor parallel_for);

}  // namespace pdp::cpu
