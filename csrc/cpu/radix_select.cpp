#include "radix_select.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <memory>
#include <mutex>

#include "convert.h"

// A weight is read once. A small sample of it brackets the k-th magnitude between two keys; one
// pass counts the keys below the bracket and gathers those inside (a few percent), and a radix
// select of the gathered keys, digit by digit, finds v_k and v_{k+1}. A bracket that turns out to
// have missed is replaced by a bin of a full histogram: whatever the sample, the answer is exact.
// 16-bit weights need no bracket: one pass counts their 2^15 magnitudes.

namespace pdp::cpu {
namespace {

constexpr int kDigitBits = 11;

// Weights up to this size are gathered whole: a sample would save nothing.
constexpr int64_t kWholeGather = 1 << 13;

constexpr int64_t kSampleSize = 2048;

// Keys are gathered through a buffer of this many on the stack.
constexpr int kBlock = 4096;

// The search for one weight's order statistics: passes over the weight until it concludes.
class Search {
 public:
  virtual ~Search() = default;

  // Elements that one thread should handle at a time.
  virtual int64_t tile() const = 0;

  // Looks at the elements [begin, end); called from several threads at once.
  virtual void scan(int64_t begin, int64_t end) = 0;

  // Called when all elements were scanned: true when `found` is complete, else scan again.
  virtual bool conclude() = 0;

  OrderStatistics found;
};

// Where a rank (from 0) falls in a histogram: the bin, and how many are counted before it.
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

// v_k, and the next key above it unless it is the largest, among keys that share all bits above the
// lowest `bits`. Reorders the keys.
template <typename Key>
OrderStatistics radix_select_keys(Key* keys, int64_t count, int64_t rank, int bits) {
  constexpr Key kNone = ~Key{0};
  OrderStatistics found;
  Key next = kNone;
  std::array<uint32_t, 1 << kDigitBits> histogram;
  while (bits > 0) {
    const int width = std::min(bits, kDigitBits);
    bits -= width;
    const Key digits = (Key{1} << width) - 1;
    std::fill_n(histogram.begin(), digits + 1, 0);
    for (int64_t i = 0; i < count; ++i) ++histogram[(keys[i] >> bits) & digits];
    const Bin bin = find_bin(histogram, rank);
    int64_t matching = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Key key = keys[i];
      const Key digit = (key >> bits) & digits;
      keys[matching] = key;
      matching += digit == static_cast<Key>(bin.index);
      if (digit > static_cast<Key>(bin.index)) next = std::min(next, key);
    }
    found.below += bin.before;
    rank -= bin.before;
    count = matching;
  }
  found.kth = keys[0];
  found.equal = count;
  found.next = rank + 1 < count ? keys[0] : next;
  return found;
}

template <typename Stored, typename Key>
PDP_INLINE int gather_block(const Stored* data, int count, Key low, Key high, Key* keys,
                            int64_t* below) {
  int under = 0;
  for (int i = 0; i < count; ++i) {
    keys[i] = magnitude_key(data[i]);
    under += keys[i] < low;
  }
  int gathered = 0;
  for (int i = 0; i < count; ++i) {
    const Key key = keys[i];
    keys[gathered] = key;
    gathered += static_cast<Key>(key - low) <= static_cast<Key>(high - low);
  }
  *below += under;
  return gathered;
}

// target_clones takes functions, not templates.
#define PDP_GATHER(Stored, Key)                                                              \
  PDP_MULTIVERSION int gather(const Stored* data, int count, Key low, Key high, Key* keys,   \
                              int64_t* below) {                                              \
    return gather_block(data, count, low, high, keys, below);                                \
  }
PDP_GATHER(double, uint64_t)
PDP_GATHER(float, uint32_t)
PDP_GATHER(BFloat16, uint32_t)
PDP_GATHER(Half, uint32_t)
#undef PDP_GATHER

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
    keys_.reset(new Key[capacity]);
  }

  // Of a sample of S the rank k / n S is off by about sqrt(S) / 2 at most (one standard deviation);
  // five of them miss about once in a million.
  void bracket_from_sample() {
    std::array<Key, kSampleSize> sample;
    const int64_t stride = numel_ / kSampleSize;
    for (int64_t i = 0; i < kSampleSize; ++i) {
      // A step that varies inside the stride, so that a periodic weight is sampled evenly.
      sample[i] = magnitude_key(data_[i * stride + i * 0x9E3779B1 % stride]);
    }
    const double share = static_cast<double>(rank_) / numel_;
    const double margin = 5 * std::sqrt(kSampleSize * share * (1 - share)) + 2;
    const auto ordered = [&](double position) {
      const auto at = sample.begin() + static_cast<int64_t>(position);
      std::nth_element(sample.begin(), at, sample.end());
      return *at;
    };
    const double centre = share * kSampleSize;
    const Key low = centre - margin < 0 ? 0 : ordered(centre - margin);
    const Key high = centre + margin >= kSampleSize ? kNaN : ordered(centre + margin);
    set_bracket(low, high, numel_ / 8);
  }

  void gather_range(int64_t begin, int64_t end) {
    Key keys[kBlock];
    int64_t below = 0;
    for (int64_t offset = begin; offset < end; offset += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, end - offset));
      const int gathered = gather(data_ + offset, count, low_, high_, keys, &below);
      const int64_t position = gathered_.fetch_add(gathered);
      // What does not fit is counted only: conclude() sees it.
      if (position + gathered <= capacity_) std::copy_n(keys, gathered, &keys_[position]);
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
      for (int64_t i = 0; i < gathered_; ++i) keys_[i] -= low_;
      int bits = 0;
      while ((high_ - low_) >> bits != 0) ++bits;
      found = radix_select_keys(keys_.get(), gathered_, rank, bits);
      found.kth += low_;
      found.next += low_;
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

  // The bracket ended with v_k: v_{k+1} is the least key above it.
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
  Key low_, high_;  // both inside the bracket
  int64_t capacity_;
  std::atomic<int64_t> below_, gathered_;
  std::unique_ptr<Key[]> keys_;
  std::vector<int64_t> histogram_;
  std::mutex mutex_;
  std::atomic<Key> next_{~Key{0}};
};

// 16-bit weights: a count of every magnitude.
template <typename Stored>
class CountingSearch final : public Search {
 public:
  CountingSearch(const Stored* data, int64_t k) : data_(data), rank_(k - 1), counts_(kMagnitudes) {}

  // Wide enough that adding up the 2^15 counts of each tile costs little.
  int64_t tile() const override { return 1 << 18; }

  void scan(int64_t begin, int64_t end) override {
    std::vector<uint32_t> counts(kMagnitudes);
    for (int64_t i = begin; i < end; ++i) ++counts[magnitude_key(data_[i])];
    const std::lock_guard<std::mutex> lock(mutex_);
    for (int key = 0; key < kMagnitudes; ++key) counts_[key] += counts[key];
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
  static constexpr int kMagnitudes = 1 << 15;

  const Stored* data_;
  const int64_t rank_;
  std::vector<int64_t> counts_;
  std::mutex mutex_;
};

std::unique_ptr<Search> make_search(const Weight& weight, int64_t k) {
  std::unique_ptr<Search> search;
  if (k <= 0 || k >= weight.numel) return search;
  visit(weight.data, weight.type, [&](const auto* data) {
    using Stored = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    if constexpr (sizeof(Stored) == 2) {
      if (weight.numel > kWholeGather) {
        search = std::make_unique<CountingSearch<Stored>>(data, k);
        return;
      }
    }
    search = std::make_unique<BracketSearch<Stored>>(data, weight.numel, k);
  });
  return search;
}

}  // namespace

std::vector<OrderStatistics> radix_select(const std::vector<Weight>& weights, const int64_t* k,
                                          ParallelFor parallel_for) {
  struct Tile {
    size_t weight;
    int64_t begin;
    int64_t end;
  };
  const int64_t count = static_cast<int64_t>(weights.size());
  std::vector<std::unique_ptr<Search>> searches(count);
  parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) searches[i] = make_search(weights[i], k[i]);
  });

  std::vector<OrderStatistics> found(count);
  std::vector<size_t> pending;
  for (int64_t i = 0; i < count; ++i) {
    if (searches[i]) pending.push_back(i);
  }
  while (!pending.empty()) {
    std::vector<Tile> tiles;
    for (const size_t i : pending) {
      const int64_t step = searches[i]->tile();
      for (int64_t begin = 0; begin < weights[i].numel; begin += step) {
        tiles.push_back({i, begin, std::min(weights[i].numel, begin + step)});
      }
    }
    parallel_for(tiles.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const Tile& tile = tiles[at];
        searches[tile.weight]->scan(tile.begin, tile.end);
      }
    });
    std::vector<char> concluded(pending.size());
    parallel_for(pending.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) concluded[at] = searches[pending[at]]->conclude();
    });
    std::vector<size_t> unfinished;
    for (size_t at = 0; at < pending.size(); ++at) {
      const size_t i = pending[at];
      if (concluded[at]) {
        found[i] = searches[i]->found;
        searches[i].reset();
      } else {
        unfinished.push_back(i);
      }
    }
    pending = std::move(unfinished);
  }
  return found;
}

}  // namespace pdp::cpu
