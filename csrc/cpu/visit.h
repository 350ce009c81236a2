// Arrays whose storage type is known when the kernel runs.
#pragma once

#include "../magnitude.h"
#include "parallel.h"

namespace pdp::cpu {

// Calls body with a pointer of the array's type.
template <typename Body>
PDP_INLINE void visit(const void* data, WeightType type, const Body& body) {
  switch (type) {
    case WeightType::kFloat64:
      return body(static_cast<const double*>(data));
    case WeightType::kFloat32:
      return body(static_cast<const float*>(data));
    case WeightType::kBFloat16:
      return body(static_cast<const BFloat16*>(data));
    case WeightType::kFloat16:
      return body(static_cast<const Half*>(data));
  }
}

}  // namespace pdp::cpu
