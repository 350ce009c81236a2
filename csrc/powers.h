// |w|^p and |w|^q, and their sums, from which the PQ Index is computed. For CPU and CUDA kernels.
#pragma once

#include <cmath>

#include "magnitude.h"

namespace pdp {

// The sums of one group. p and q are not finite if an unpruned weight is not.
struct PowerSums {
  double count = 0, p = 0, q = 0;
};

PDP_HOST_DEVICE PowerSums operator+(PowerSums a, PowerSums b) {
  return {a.count + b.count, a.p + b.p, a.q + b.q};
}

// The pairs p < q that need no pow, and all others.
enum class Norms { kHalfOne, kHalfTwo, kOneTwo, kAny };

inline Norms norms_of(double p, double q) {
  if (p == 0.5 && q == 1) return Norms::kHalfOne;
  if (p == 0.5 && q == 2) return Norms::kHalfTwo;
  if (p == 1 && q == 2) return Norms::kOneTwo;
  return Norms::kAny;
}

// The rounding errors of roots in float do not cancel in a sum: equal weights have equal ones. One
// Newton step in double, sqrt(x) = s + (x - s^2) / 2s, leaves a relative error of 1e-14. On a CPU a
// square root in double takes twice as long. An infinite weight gives NaN.
PDP_HOST_DEVICE double square_root(float x) {
  constexpr float kNotZero = 1e-30f;  // far below the root of any weight but 0
  const float root = std::sqrt(x);
  const double wide = root;
  return wide + (x - wide * wide) * (0.5f / (root + kNotZero));
}
PDP_HOST_DEVICE double square_root(double x) { return std::sqrt(x); }

template <Norms kNorms, typename Real>
PDP_HOST_DEVICE double power_p(Real magnitude, double p) {
  if (kNorms == Norms::kAny) return std::pow(static_cast<double>(magnitude), p);
  return kNorms == Norms::kOneTwo ? static_cast<double>(magnitude) : square_root(magnitude);
}

// A float's square cannot overflow in double.
template <Norms kNorms, typename Real>
PDP_HOST_DEVICE double power_q(Real magnitude, double q) {
  const double wide = magnitude;
  if (kNorms == Norms::kAny) return std::pow(wide, q);
  return kNorms == Norms::kHalfOne ? wide : wide * wide;
}

}  // namespace pdp
