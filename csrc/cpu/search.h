// The search for the order statistics of one weight, and a radix select of gathered keys.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "radix_select.h"

namespace pdp::cpu {

constexpr int kDigitBits = 11;

// Among so few keys comparisons select, for a histogram has more bins to clear and to add up: 256
// float32 weights take 1.6 us, and with histograms 2.4.
constexpr int64_t kFewKeys = 256;

// Makes passes over a weight until it has found the order statistics.
class Search {
 public:
  virtual ~Search() = default;

  // Elements that one thread should handle at a time.
  virtual int64_t tile() const = 0;

  // Reads the elements [begin, end). Several threads call it at once.
  virtual void scan(int64_t begin, int64_t end) = 0;

  // Called once all of a pass has been scanned. Returns true if `found` is complete, false if
  // another pass is needed.
  virtual bool conclude() = 0;

  OrderStatistics found;
};

// The bin of a histogram that holds a 0-based rank, and how many elements are in the bins before.
struct Bin {
  int64_t index;
  int64_t before;
};

template <typename Counts>
Bin find_bin(const Counts& counts, int64_t rank) {
  Bin bin{0, 0};
  while (bin.before + static_cast<int64_t>(counts[bin.index]) <= rank) {
    bin.before += counts[bin.index++];
  }
  return bin;
}

// Finds the key of a 0-based rank, and the next one, among keys from `low` to `low` + 2^bits - 1.
// The next one is ~Key{0} if the key is the last. Reorders the keys.
template <typename Key>
OrderStatistics radix_select_keys(Key* keys, int64_t count, int64_t rank, Key low, int bits) {
  OrderStatistics found;
  Key next = ~Key{0};
  std::array<int64_t, 1 << kDigitBits> histogram;
  while (bits > 0 && count > kFewKeys) {
    const int width = std::min(bits, kDigitBits);
    bits -= width;
    const Key digits = (Key{1} << width) - 1;
    std::fill_n(histogram.begin(), digits + 1, 0);
    for (int64_t i = 0; i < count; ++i) ++histogram[((keys[i] - low) >> bits) & digits];
    const Bin bin = find_bin(histogram, rank);
    int64_t matching = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Key key = keys[i];
      const Key digit = ((key - low) >> bits) & digits;
      keys[matching] = key;
      matching += digit == static_cast<Key>(bin.index);
      // No branch: a processor would guess wrong for every second key.
      next = std::min(next, digit > static_cast<Key>(bin.index) ? key : ~Key{0});
    }
    found.below += bin.before;
    rank -= bin.before;
    count = matching;
  }
  if (bits > 0) std::nth_element(keys, keys + rank, keys + count);
  const Key kth = keys[rank];
  int64_t below = 0;
  for (int64_t i = 0; i < count; ++i) {
    below += keys[i] < kth;
    found.equal += keys[i] == kth;
    if (keys[i] > kth) next = std::min(next, keys[i]);
  }
  found.below += below;
  found.kth = kth;
  found.next = rank + 1 < below + found.equal ? kth : next;
  return found;
}

}  // namespace pdp::cpu
