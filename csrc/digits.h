// The digits of a magnitude's key, from the highest on: a radix select counts one at a time.
#pragma once

#include <cstdint>

#include "magnitude.h"

namespace pdp {

struct Digit {
  int shift;
  int bits;
  bool first;
  bool last;

  PDP_HOST_DEVICE int32_t bins() const { return 1 << bits; }
};

// The digits of digit_counts, by the bytes of a weight: DIGIT_BITS of reference.py.
inline Digit counted_digit(int64_t weight_bytes, int64_t index) {
  static constexpr int kEight[] = {11, 11, 11, 10, 10, 10}, kFour[] = {11, 10, 10}, kTwo[] = {8, 7};
  const int* bits = weight_bytes == 8 ? kEight : weight_bytes == 4 ? kFour : kTwo;
  int shift = static_cast<int>(8 * weight_bytes - 1);
  for (int64_t i = 0; i <= index; ++i) shift -= bits[i];
  return {shift, bits[index], index == 0, shift == 0};
}

}  // namespace pdp
