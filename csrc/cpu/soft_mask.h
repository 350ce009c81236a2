// Fused soft mask for CPU: mask, masked weight and the analytic backward in one pass each.
#pragma once

#include "array.h"
#include "parallel.h"

namespace pdp::cpu {

// Writes w_hat = m w and, unless mask.data is null, m. `threshold` and `tau` point to one double
// for float64 weights, to one float otherwise.
void soft_mask(Array weight, const void* threshold, const void* tau, bool relative, Array w_hat,
               Array mask, int64_t numel, ParallelFor parallel_for);

// Writes dw of Eq. 2 to grad, which has the weight's type. grad_w_hat.data or grad_mask.data may be
// null (no gradient).
void soft_mask_backward(Array grad_w_hat, Array grad_mask, Array weight, const void* threshold,
                        const void* tau, bool relative, Array grad, int64_t numel,
                        ParallelFor parallel_for);

}  // namespace pdp::cpu
