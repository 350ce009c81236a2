// Eq. 1 and Eq. 2 for one weight. For CPU and CUDA kernels; triton_kernels/soft_mask.py has the
// same arithmetic.
//
// z = ((|w| - t) / q) ((|w| + |t|) / q) / tau', with q and tau' as in
// reference.scale_and_temperature. In float32 all divisions but one are of scalars, and the
// exponential is a power of two. In float64 the operations are those of the reference, for rounding
// log2(e) z costs more of its error budget than there is.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "magnitude.h"

namespace pdp {

#ifdef __CUDA_ARCH__

// Returns 2^x, off by at most 2 ulp; 0 where that is subnormal.
__device__ __forceinline__ float exp2_of(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// Returns 1 / x for x >= 1, off by at most 1 ulp; 0 where that is subnormal.
__device__ __forceinline__ float reciprocal(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}

// Returns 1 / (1 + 2^x); 0 where that is subnormal.
__device__ __forceinline__ float inverse_one_plus_exp2(float x) {
  return reciprocal(1 + exp2_of(x));
}

#else

// Returns x, or 0 if the condition holds. Compilers vectorise arithmetic on bits as it stands. Of
// `condition ? 0 : x` they make two copies of the code that follows.
PDP_HOST_DEVICE float zero_if(bool condition, float x) {
  return bit_cast<float>(bit_cast<uint32_t>(x) & (static_cast<uint32_t>(condition) - 1));
}

constexpr float kLargestExponent = 126;  // 2^-126 is the smallest normal number

// Returns 2^x for x <= kLargestExponent, off by at most 2.3 ulp; 0 where that is subnormal.
//
// It is 2^n 2^r with |r| at most 1/2, and 2^r by a polynomial with an error of 1.1e-7, exact at
// r = 0.
PDP_HOST_DEVICE float exp2_of(float x) {
  // 1.5 * 2^23, which leaves the nearest integer n below, and float's bias: n + 127 are the lowest
  // bits of the sum.
  constexpr float kRound = 12582912.0f + 127.0f;
  const float shifted = x + kRound;
  const float r = x - (shifted - kRound);
  float power = 1.32645993e-3f;
  power = power * r + 9.67151113e-3f;
  power = power * r + 5.55073395e-2f;
  power = power * r + 2.40222424e-1f;
  power = power * r + 6.93147004e-1f;
  power = power * r + 1.0f;
  power *= bit_cast<float>(bit_cast<uint32_t>(shifted) << 23);
  return zero_if(x < -kLargestExponent, power);
}

PDP_HOST_DEVICE float reciprocal(float x) { return 1 / x; }

// Returns 1 / (1 + 2^x); 0 where that is subnormal.
PDP_HOST_DEVICE float inverse_one_plus_exp2(float x) {
  return zero_if(x > kLargestExponent, reciprocal(1 + exp2_of(x)));
}

#endif

// Returns the smaller of a number and the largest finite one, as integers, which is what compilers
// vectorise best. NaN gives the latter.
PDP_HOST_DEVICE float at_most_largest(float x) {
  const int32_t bits = bit_cast<int32_t>(x), largest = 0x7F7FFFFF;
  return bit_cast<float>(bits < largest ? bits : largest);
}

// Returns a power of two whose product with a scale > 0 is in [1, 4), or below 1 if the scale is
// subnormal. The bits of 2^-n are those of 1, twice, less those of 2^n. Limits keep the result
// normal.
PDP_HOST_DEVICE float power_of_two(float scale) {
  const uint32_t exponent = bit_cast<uint32_t>(scale) & 0x7F800000;
  const uint32_t above = exponent > 0x00800000 ? exponent : 0x00800000;
  return bit_cast<float>(0x7F000000 - (above < 0x7E800000 ? above : 0x7E800000));
}

// The mask for one threshold.
template <typename Real, bool kRelative>
struct SoftMask;

template <bool kRelative>
struct SoftMask<float, kRelative> {
  // The lift takes q to about 1, for q^2 may be too large or too small for float.
  float lift = 1;
  float lower, upper;     // t lift and |t| lift
  float curvature;        // 2 / ((q lift)^2 tau')
  float minus_steepness;  // -log2(e) / ((q lift)^2 tau')

  PDP_HOST_DEVICE SoftMask(float threshold, float tau) {
    constexpr float kHalfLog2E = 0.721347520f;
    const float size = std::fabs(threshold);
    curvature = 2 / tau;
    if (kRelative) {
      const float scale = size > FLT_MAX ? 1.0f : size == 0 ? FLT_MIN : size;
      lift = power_of_two(scale);
      const float lifted = scale * lift;
      curvature = (size == 0 ? 2 / FLT_MIN : curvature) / (lifted * lifted);
    }
    // Infinity would make z NaN at |w| = t. 2^127 in its place is wrong only for subnormal numbers:
    // where tau and w^2 - t^2 are, and in the gradient at |w| = t where tau or t is.
    if (curvature > FLT_MAX) curvature = 2 / FLT_MIN;
    lower = threshold * lift;
    upper = size * lift;
    minus_steepness = -(curvature * kHalfLog2E);
  }

  // Returns -log2(e) z.
  PDP_HOST_DEVICE float minus_exponent(float w) const {
    // Products with `lift` are exact, so each sum may be one fused multiply-add.
    const float lifted = std::fabs(w) * lift;
    return (lifted - lower) * minus_steepness * (lifted + upper);
  }

  // Returns m.
  PDP_HOST_DEVICE float value(float w) const { return inverse_one_plus_exp2(minus_exponent(w)); }

  // Returns dw_hat/dw = m + 2 w^2/tau m(1-m).
  PDP_HOST_DEVICE float w_hat_slope(float w) const {
    const float exponent = minus_exponent(w);
    const float decay = exp2_of(-std::fabs(exponent));
    const float larger = reciprocal(1 + decay);
    const float smaller = decay * larger;
    // Where the slope m(1-m) underflows to 0, its factor may overflow, and 0 * inf is NaN.
    const float factor = at_most_largest(w * lift * curvature * (w * lift));
    // The only sum is of a product and a plain value, which compilers can contract in one way only:
    // a gradient is the same in a vector and in the scalar remainder of a loop.
    return (exponent > 0 ? smaller : larger) + factor * (larger * smaller);
  }

  // Returns dm/dw = 2 w/tau m(1-m).
  PDP_HOST_DEVICE float mask_slope(float w) const {
    const float decay = exp2_of(-std::fabs(minus_exponent(w)));
    const float larger = reciprocal(1 + decay);
    const float slope = larger * (decay * larger);
    return slope == 0 ? 0.0f : w * lift * curvature * slope * lift;
  }
};

template <bool kRelative>
struct SoftMask<double, kRelative> {
  double threshold, tau;
  double scale = 1;

  PDP_HOST_DEVICE SoftMask(double t, double given) : threshold(t), tau(given) {
    if (!kRelative) return;
    const double size = std::fabs(t);
    scale = size > DBL_MAX ? 1 : size == 0 ? DBL_MIN : size;
    tau = size == 0 ? DBL_MIN : given;
  }

  PDP_HOST_DEVICE double scaled(double value) const { return kRelative ? value / scale : value; }

  // Returns z.
  PDP_HOST_DEVICE double exponent(double w) const {
    const double magnitude = std::fabs(w);
    return scaled(magnitude - threshold) * scaled(magnitude + std::fabs(threshold)) / tau;
  }

  PDP_HOST_DEVICE double value(double w) const {
    const double z = exponent(w);
    const double decay = std::exp(-std::fabs(z));
    return (z >= 0 ? 1 : decay) / (1 + decay);
  }

  PDP_HOST_DEVICE double w_hat_slope(double w) const {
    const double z = exponent(w);
    const double decay = std::exp(-std::fabs(z));
    const double inverse = 1 / (1 + decay);
    const double boost = 2 * scaled(w) * scaled(w) / tau;
    const double factor = decay == 0 ? 0 : boost;
    return ((z >= 0 ? 1 : decay) + factor * (decay * inverse)) * inverse;
  }

  PDP_HOST_DEVICE double mask_slope(double w) const {
    const double decay = std::exp(-std::fabs(exponent(w)));
    const double slope = decay / ((1 + decay) * (1 + decay));
    return slope == 0 ? 0 : 2 * scaled(scaled(w)) / tau * slope;
  }
};

}  // namespace pdp
