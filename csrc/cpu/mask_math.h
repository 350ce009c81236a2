// Eq. 1 and Eq. 2 for one weight, in operations that compilers vectorise.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "../magnitude.h"
#include "parallel.h"

namespace pdp::cpu {

// Returns e^-x for x >= 0, to one unit in the last place: e^-x = 2^n e^r with |r| <= ln(2) / 2, e^r
// by its Taylor series (the next term is below 6e-9). Subnormal results are flushed to 0: some CPUs
// take a hundred times as long over them, which made the mask of ResNet-50 3 times as slow.
PDP_INLINE float exp_negative(float x) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High =
      0.693145752f;  // ln 2 with 9 zero bits at the end: n * kLn2High is exact
  constexpr float kLn2Low = 1.42860677e-6f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer below
  constexpr float kUnderflow = 87.33f;   // e^-87.33 is 2^-126 (1 + 1e-3)
  const float y = x > kUnderflow ? -kUnderflow : -x;
  const float shifted = y * kLog2E + kRound;
  const float n = shifted - kRound;
  const float r = (y - n * kLn2High) - n * kLn2Low;
  float series = 1.0f / 5040;
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 1.0f / 2;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  const int32_t power = bit_cast<int32_t>(shifted) - bit_cast<int32_t>(kRound);
  const float result = series * bit_cast<float>((power + 127) << 23);
  return x > kUnderflow ? 0.0f : result;
}

PDP_INLINE double exp_negative(double x) { return std::exp(-x); }

// Returns factor x. If the product is subnormal but x is not, it is flushed to a zero of x's sign.
// Masks near 0 would make subnormal weights and gradients, and computing with them is slow: an
// epoch of an MLP on MNIST took 44 s instead of 1.5.
template <typename Real>
PDP_INLINE Real multiply(Real factor, Real x) {
  constexpr Real kTiny = std::numeric_limits<Real>::min();
  const Real product = factor * x;
  const bool made_subnormal = (std::fabs(product) < kTiny) & (std::fabs(x) >= kTiny);
  return made_subnormal ? x * Real(0) : product;
}

// 1/y for y > 0 in double-word precision: a leading term, rounded down, and a remainder > 0. x
// times their sum, rounded once, is x / y to within half a unit in the last place, and an infinite
// x stays infinite. That takes less than half the time of a division.
template <typename Real>
struct Reciprocal {
  Real divisor;
  Real inverse;
  Real remainder = 0;

  explicit PDP_INLINE Reciprocal(Real y) : divisor(y), inverse(1 / y) {
    constexpr Real kHuge = std::numeric_limits<Real>::max();
    if (inverse > kHuge) inverse = kHuge;
    if (!(inverse > 0)) return;  // y is infinite or NaN
    if (std::fma(-inverse, y, Real(1)) <= 0) {
      inverse = bit_cast<Real>(bit_cast<typename Magnitude<Real>::Key>(inverse) - 1);
    }
    remainder = std::fma(-inverse, y, Real(1)) * inverse;
  }

  PDP_INLINE Real times(Real x) const { return x * inverse + x * remainder; }
};

// tau, or c of tau = c t^2.
template <typename Real>
using Temperature = Reciprocal<Real>;

// The mask for one threshold: z = ((|w| - t) / q) ((|w| + |t|) / q) / tau', with q and tau' as in
// reference.scale_and_temperature; there is no division by q = 1. kReciprocal: a relative
// temperature multiplies by reciprocals instead of dividing, which saves 30% of the time if many
// weights share a threshold.
template <typename Real, bool kRelative, bool kReciprocal = std::is_same<Real, float>::value>
struct Mask {
  Real threshold;
  Temperature<Real> temperature;
  Real q = 1;
  Real tau;
  // 1/q is (1 / (q lift)) lift: q may be so small or large that 1/q overflows or is subnormal.
  Real lift = 1;
  Reciprocal<Real> lifted{Real(1)};

  PDP_INLINE Mask(Real t, Temperature<Real> given)
      : threshold(t), temperature(given), tau(given.divisor) {
    if (!kRelative) return;
    constexpr Real kTiny = std::numeric_limits<Real>::min();
    const Real size = std::fabs(t);
    q = size > std::numeric_limits<Real>::max() ? Real(1) : size == 0 ? kTiny : size;
    tau = size == 0 ? kTiny : given.divisor;
    if (!kReciprocal) return;
    constexpr Real kLift = 18446744073709551616.0;  // 2^64
    lift = q < 1 / kLift ? kLift : q > kLift ? 1 / kLift : Real(1);
    lifted = Reciprocal<Real>(q * lift);
    temperature = Temperature<Real>(tau);
  }

  PDP_INLINE Real scaled(Real value) const {
    if (!kRelative) return value;
    return kReciprocal ? lifted.times(value * lift) : value / q;
  }

  PDP_INLINE Real over_tau(Real value) const {
    return kRelative && !kReciprocal ? value / tau : temperature.times(value);
  }

  PDP_INLINE Real exponent(Real weight) const {
    const Real magnitude = std::fabs(weight);
    return over_tau(scaled(magnitude - threshold) * scaled(magnitude + std::fabs(threshold)));
  }

  // m
  PDP_INLINE Real value(Real weight) const {
    const Real z = exponent(weight);
    const Real decay = exp_negative(std::fabs(z));
    return (z >= 0 ? Real(1) : decay) / (1 + decay);
  }

  // dw_hat/dw = m + 2 w^2/tau m(1-m), with both m and m(1-m) as products of 1/(1 + decay). Where
  // the slope m(1-m) underflows to 0, its factor may overflow, and 0 * inf is NaN: the factor is
  // set to 0. The only sum is of a product and a plain value, which compilers can contract in one
  // way only: a weight's gradient is the same in a vector and in the scalar remainder of a loop.
  PDP_INLINE Real weight_gradient(Real weight) const {
    const Real z = exponent(weight);
    const Real decay = exp_negative(std::fabs(z));
    const Real inverse = 1 / (1 + decay);
    const Real boost = over_tau(2 * scaled(weight) * scaled(weight));
    const Real factor = decay == 0 ? Real(0) : boost;
    return ((z >= 0 ? Real(1) : decay) + factor * (decay * inverse)) * inverse;
  }

  // dm/dw = 2 w/tau m(1-m)
  PDP_INLINE Real mask_gradient(Real weight) const {
    const Real decay = exp_negative(std::fabs(exponent(weight)));
    const Real slope = decay / ((1 + decay) * (1 + decay));
    const Real factor = over_tau(2 * scaled(scaled(weight))) * slope;
    return slope == 0 ? Real(0) : factor;
  }
};

}  // namespace pdp::cpu
