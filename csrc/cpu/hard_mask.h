// Hard mask for CPU: exactly k weights pruned.
#pragma once

#include "parallel.h"
#include "radix_select.h"

namespace pdp::cpu {

// Sets kept[i] to whether weight i is kept when exactly k are pruned. Of equal magnitudes the
// lowest index is pruned first.
void hard_mask(Weight weight, int64_t k, bool* kept, ParallelFor parallel_for);

}  // namespace pdp::cpu
