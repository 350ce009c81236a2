// Selection in one read: a bracket around the k-th magnitude, and the few keys inside it.
//
// A small sample brackets the k-th magnitude between two keys. One pass counts the keys below the
// bracket and gathers those inside (a few percent); a radix select of the gathered keys finds v_k
// and v_{k+1}. If the bracket misses v_k or holds too many keys, a bin of a full histogram replaces
// it: the answer is exact for every sample.
#pragma once

#include <atomic>
#include <cmath>
#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>

#include "gather.h"
#include "search.h"

namespace pdp::cpu {

// All keys of weights up to this size are gathered: a sample would save nothing.
constexpr int64_t kWholeGather = 1 << 13;

// Elements for each sampled one, and the smallest and largest sample. A larger sample takes longer,
// a smaller one leaves more keys to gather (about n / sqrt(sample)). At 2.4M weights 256 and 512
// take equally long.
constexpr int64_t kPerSample = 256;
constexpr int64_t kMinSample = 1024;
constexpr int64_t kMaxSample = 16384;

// Neighbours that are sampled together: a cache line of float32. For GPT-2's 124 million weights
// one thread draws the samples in 1.1 ms, and one key at a time in 6 ms.
constexpr int64_t kChunk = 16;

// Keys are gathered through a buffer of this many on the stack.
constexpr int kGatherBlock = 4096;

template <typename Stored>
class BracketSearch final : public Search {
 public:
  BracketSearch(const Stored* data, int64_t numel, int64_t k)
      : data_(data), numel_(numel), rank_(k - 1) {
    if (numel <= kWholeGather) {
      set_bracket(0, kNaN, numel);
    } else {
      bracket_from_sample();
    }
  }

  int64_t tile() const override { return 1 << 16; }

  void scan(int64_t begin, int64_t end) override {
    switch (pass_) {
      case Pass::kGather:
        return gather_range(begin, end);
      case Pass::kHistogram:
        return histogram_range(begin, end);
      case Pass::kNext:
        return next_range(begin, end);
    }
  }

  bool conclude() override {
    switch (pass_) {
      case Pass::kGather:
        return conclude_gather();
      case Pass::kHistogram:
        return conclude_histogram();
      case Pass::kNext:
        found.next = next_.load();
        return true;
    }
    return true;
  }

 private:
  using Key = std::conditional_t<sizeof(Stored) == 8, uint64_t, uint32_t>;
  enum class Pass { kGather, kHistogram, kNext };

  static constexpr int kBits = Magnitude<Stored>::kBits;
  static constexpr int kTopShift = kBits - kDigitBits;
  static constexpr Key kNaN = Magnitude<Stored>::kInfinity + 1;

  void set_bracket(Key low, Key high, int64_t capacity) {
    pass_ = Pass::kGather;
    low_ = low;
    high_ = high;
    capacity_ = capacity;
    below_ = 0;
    gathered_ = 0;
    keys_.reset();
  }

  // Allocates the buffer once it is needed, when earlier weights have given theirs back.
  Key* keys() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!keys_) keys_.reset(new Key[capacity_]);
    return keys_.get();
  }

  // With p = k / n, the rank of v_k in a sample of S has mean S p and standard deviation
  // sqrt(S p (1 - p)). A margin of four deviations misses about once in 16,000 times, once in 200
  // if neighbours are so alike that the variance doubles. A miss costs two more passes.
  void bracket_from_sample() {
    const int64_t wanted = std::clamp(numel_ / kPerSample, kMinSample, kMaxSample);
    const int64_t chunks = wanted / kChunk, stride = numel_ / chunks;
    const int64_t size = chunks * kChunk;
    std::vector<Key> sample(size);
    for (int64_t i = 0; i < chunks; ++i) {
      // The place within the stride varies, so that a periodic weight is sampled evenly.
      const Stored* chunk = data_ + i * stride + i * 0x9E3779B1 % (stride - kChunk + 1);
      for (int64_t j = 0; j < kChunk; ++j) sample[i * kChunk + j] = magnitude_key(chunk[j]);
    }
    const double fraction = static_cast<double>(rank_) / numel_;
    const double centre = fraction * size;
    const double margin = 4 * std::sqrt(size * fraction * (1 - fraction)) + 2;
    Key low = 0, high = kNaN;
    auto from = sample.begin();
    if (centre - margin >= 0) {
      from += static_cast<int64_t>(centre - margin);
      std::nth_element(sample.begin(), from, sample.end());
      low = *from;
    }
    if (centre + margin < size) {
      // Everything from the lower end on is at least as large.
      const auto at = sample.begin() + static_cast<int64_t>(centre + margin);
      std::nth_element(from, at, sample.end());
      high = *at;
    }
    set_bracket(low, high, numel_ / 8);
  }

  void gather_range(int64_t begin, int64_t end) {
    Key keys[kGatherBlock];
    Key* const all_keys = this->keys();
    int64_t below = 0;
    for (int64_t offset = begin; offset < end; offset += kGatherBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kGatherBlock, end - offset));
      const int gathered = gather(data_ + offset, count, low_, high_, keys, &below);
      const int64_t position = gathered_.fetch_add(gathered);
      // Keys that do not fit are only counted, which conclude() sees.
      if (position + gathered <= capacity_) std::copy_n(keys, gathered, all_keys + position);
    }
    below_ += below;
  }

  bool conclude_gather() {
    const int64_t rank = rank_ - below_;
    const bool inside = rank >= 0 && rank < gathered_;
    if (!inside || (gathered_ > capacity_ && low_ < high_)) {
      pass_ = Pass::kHistogram;
      histogram_.assign(1 << kDigitBits, 0);
      return false;
    }
    if (low_ == high_) {
      found.kth = found.next = low_;
      found.equal = gathered_;
    } else {
      int bits = 0;
      while ((high_ - low_) >> bits != 0) ++bits;
      found = radix_select_keys<Key>(keys_.get(), gathered_, rank, low_, bits);
    }
    found.below += below_;
    if (rank + 1 < gathered_) return true;
    pass_ = Pass::kNext;
    return false;
  }

  void histogram_range(int64_t begin, int64_t end) {
    std::array<int64_t, 1 << kDigitBits> counts{};
    for (int64_t i = begin; i < end; ++i) ++counts[magnitude_key(data_[i]) >> kTopShift];
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t bin = 0; bin < counts.size(); ++bin) histogram_[bin] += counts[bin];
  }

  bool conclude_histogram() {
    const int64_t bin = find_bin(histogram_, rank_).index;
    const Key low = static_cast<Key>(bin) << kTopShift;
    set_bracket(low, low + ((Key{1} << kTopShift) - 1), histogram_[bin]);
    return false;
  }

  // v_k is the last key in the bracket: v_{k+1} is the least key above it.
  void next_range(int64_t begin, int64_t end) {
    Key next = ~Key{0};
    for (int64_t i = begin; i < end; ++i) {
      const Key key = magnitude_key(data_[i]);
      if (key > high_) next = std::min(next, key);
    }
    Key known = next_.load();
    while (next < known && !next_.compare_exchange_weak(known, next)) {
    }
  }

  const Stored* data_;
  const int64_t numel_;
  const int64_t rank_;  // k - 1: ranks count from 0

  Pass pass_;
  Key low_, high_;  // the bracket, both included
  int64_t capacity_;
  std::atomic<int64_t> below_, gathered_;
  std::unique_ptr<Key[]> keys_;
  std::vector<int64_t> histogram_;
  std::mutex mutex_;
  std::atomic<Key> next_{~Key{0}};
};

}  // namespace pdp::cpu
