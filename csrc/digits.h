// The digits of a magnitude's key, from the highest on: a radix select counts one at a time.
#pragma once

#include <cstdint>
#include <iterator>

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
struct DigitBits {
  const int* bits;
  int64_t count;
};

inline DigitBits digit_bits(int64_t weight_bytes) {
  static constexpr int kEight[] = {11, 11, 11, 10, 10, 10}, kFour[] = {11, 10, 10}, kTwo[] = {8, 7};
  if (weight_bytes == 8) return {kEight, std::size(kEight)};
  if (weight_bytes == 4) return {kFour, std::size(kFour)};
  return {kTwo, std::size(kTwo)};
}

inline Digit counted_digit(int64_t weight_bytes, int64_t index) {
  const int* bits = digit_bits(weight_bytes).bits;
  int shift = static_cast<int>(8 * weight_bytes - 1);
  for (int64_t i = 0; i <= index; ++i) shift -= bits[i];
  return {shift, bits[index], index == 0, shift == 0};
}

}  // namespace pdp
