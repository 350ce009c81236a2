// The hot loop of the PQ Index at p = 1/2 and q = 1 over float32 weights.
#pragma once

#include "../powers.h"

namespace pdp::cpu {

// Adds sqrt|w| and |w| of the first weights to `sums` and returns how many those are: on a CPU
// without AVX-512, or where weights are very small, none.
int add_root_sums(const float* values, int count, PowerSums& sums);

}  // namespace pdp::cpu
