// Conversions between storage types and the type of the arithmetic. On a CPU they are plain integer
// and float operations, so that compilers vectorise them for every instruction set.
#pragma once

#include "magnitude.h"

namespace pdp {

PDP_HOST_DEVICE float widen(BFloat16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

PDP_HOST_DEVICE float widen(Half value) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7FFF;
  // A subnormal counts units of 2^-24, as do the lowest bits of a float in [0.5, 1): this is exact.
  // (A multiplication of a subnormal float would not survive a CPU that flushes those.)
  const float subnormal = bit_cast<float>(0x3F000000 | magnitude) - 0.5f;
  // A normal half moves up to float's exponent, rebiased by 112; infinity and NaN by 112 more.
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t rebiased = magnitude >= 0x7C00 ? normal + (112u << 23) : normal;
  const uint32_t result = magnitude < 0x400 ? bit_cast<uint32_t>(subnormal) : rebiased;
  return bit_cast<float>(sign | result);
#endif
}

PDP_HOST_DEVICE float widen(float value) { return value; }
PDP_HOST_DEVICE double widen(double value) { return value; }

// Round to nearest, ties to even.
PDP_HOST_DEVICE void narrow(float value, BFloat16& result) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = bits + 0x7FFF + ((bits >> 16) & 1);
  result.bits = static_cast<uint16_t>((value != value ? 0x7FC00000 : rounded) >> 16);
#endif
}

PDP_HOST_DEVICE void narrow(float value, Half& result) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  // Rebias the exponent by -112 and round at bit 13; a carry runs into the exponent, up to inf.
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  // The addition of 0.5 rounds a subnormal and leaves its bits in the lowest bits of the sum.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000;
  const uint32_t special = magnitude > 0x7F800000 ? 0x7E00 : 0x7C00;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t result_magnitude = magnitude >= (143u << 23) ? special : finite;
  result.bits = static_cast<uint16_t>(((bits >> 16) & 0x8000) | result_magnitude);
#endif
}

PDP_HOST_DEVICE void narrow(float value, float& result) { result = value; }
PDP_HOST_DEVICE void narrow(float value, double& result) { result = value; }
PDP_HOST_DEVICE void narrow(double value, double& result) { result = value; }
PDP_HOST_DEVICE void narrow(double value, float& result) { result = static_cast<float>(value); }
PDP_HOST_DEVICE void narrow(double value, BFloat16& result) {
  narrow(static_cast<float>(value), result);
}
PDP_HOST_DEVICE void narrow(double value, Half& result) {
  narrow(static_cast<float>(value), result);
}

}  // namespace pdp
