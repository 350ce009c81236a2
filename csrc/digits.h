// The digits of a magnitude's key, highest first. Each pass of a radix select counts one of them.
#pragma once

#include <cstdint>

#include "magnitude.h"

namespace pdp {

struct Digit {
  int shift;
  int bits;
  bool first;
  bool last;

  PDP_HOST_DEVICE constexpr int32_t bins() const { return 1 << bits; }
};

struct KeyDigits {
  int count;
  int bits[6];  // highest digit first; no later digit is wider than the first

  PDP_HOST_DEVICE constexpr Digit digit(int64_t index) const {
    int shift = 0;
    for (int64_t lower = index + 1; lower < count; ++lower) shift += bits[lower];
    return {shift, bits[index], index == 0, index + 1 == count};
  }
};

// DIGIT_BITS of reference.py has the same widths.
constexpr KeyDigits key_digits(int64_t weight_bytes) {
  if (weight_bytes == 8) return {6, {11, 11, 11, 10, 10, 10}};
  if (weight_bytes == 4) return {3, {11, 10, 10}};
  return {2, {8, 7}};
}

}  // namespace pdp
