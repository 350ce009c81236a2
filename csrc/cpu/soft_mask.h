// Fused soft mask for CPU: mask, masked weight and the analytic backward in one pass each.
#pragma once

#include <vector>

#include "array.h"
#include "parallel.h"

namespace pdp::cpu {

// `threshold` and `tau` point to one double for float64 weights, to one float otherwise.
struct MaskedWeight {
  Array weight;
  const void* threshold;
  const void* tau;
  Array w_hat;
  Array mask;  // data may be null: the mask is not wanted
  int64_t numel;
};

// grad has the weight's type. grad_w_hat.data or grad_mask.data may be null (no gradient).
struct MaskedGradient {
  Array grad_w_hat;
  Array grad_mask;
  Array weight;
  const void* threshold;
  const void* tau;
  Array grad;
  int64_t numel;
};

// Writes w_hat = m w and m of each weight of a list. All are float64, or none.
void soft_mask(const std::vector<MaskedWeight>& list, bool relative, ParallelFor parallel_for);

// Writes dw of Eq. 2 to grad, for each weight of a list.
void soft_mask_backward(const std::vector<MaskedGradient>& list, bool relative,
                        ParallelFor parallel_for);

}  // namespace pdp::cpu
