// Selection of 16-bit weights in one read: a count of each of their 2^15 magnitudes.
#pragma once

#include <array>
#include <mutex>
#include <vector>

#include "search.h"

namespace pdp::cpu {

template <typename Stored>
class CountingSearch final : public Search {
 public:
  CountingSearch(const Stored* data, int64_t k) : data_(data), rank_(k - 1), counts_(kMagnitudes) {}

  // Large enough that adding up the 2^15 counts of each tile costs little.
  int64_t tile() const override { return 1 << 18; }

  void scan(int64_t begin, int64_t end) override {
    std::vector<uint32_t> counts(kMagnitudes);
    for (int64_t i = begin; i < end; ++i) ++counts[magnitude_key(data_[i])];
    // Part by part: threads that add up at the same time follow one another through the parts.
    for (int part = 0; part < kParts; ++part) {
      const int first = part * kPart;
      const std::lock_guard<std::mutex> lock(mutexes_[part]);
      for (int key = first; key < first + kPart; ++key) counts_[key] += counts[key];
    }
  }

  bool conclude() override {
    const Bin bin = find_bin(counts_, rank_);
    found.kth = found.next = bin.index;
    found.below = bin.before;
    found.equal = counts_[bin.index];
    if (rank_ + 1 == bin.before + found.equal) {
      do ++found.next;
      while (counts_[found.next] == 0);
    }
    return true;
  }

 private:
  static constexpr int kMagnitudes = 1 << 15, kPart = 1 << 10, kParts = kMagnitudes / kPart;

  const Stored* data_;
  const int64_t rank_;
  std::vector<int64_t> counts_;
  std::array<std::mutex, kParts> mutexes_;
};

}  // namespace pdp::cpu
