// Fused N:M soft mask for CPU: every group of M weights has a threshold of its own, which is never
// written to memory.
#pragma once

#include "array.h"
#include "groups.h"

namespace pdp::cpu {

// Like soft_mask, with t between the k-th and k+1-th magnitude of each group, k = pruned: -inf for
// k <= 0, +inf for k >= M.
void soft_mask_nm(Array weight, const void* tau, GroupLayout layout, int64_t pruned, bool relative,
                  Array w_hat, Array mask, int64_t numel, ParallelFor parallel_for);

void soft_mask_nm_backward(Array grad_w_hat, Array grad_mask, Array weight, const void* tau,
                           GroupLayout layout, int64_t pruned, bool relative, Array grad,
                           int64_t numel, ParallelFor parallel_for);

// Sets `kept` to whether each weight is kept when exactly `pruned` of each group are pruned. Of
// equal magnitudes the lowest index is pruned first.
void hard_mask_nm(Array weight, GroupLayout layout, int64_t pruned, bool* kept, int64_t numel,
                  ParallelFor parallel_for);

}  // namespace pdp::cpu
