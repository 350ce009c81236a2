#include "hard_mask.h"

#include <algorithm>

#include "visit.h"

namespace pdp::cpu {
namespace {

constexpr int64_t kTile = 1 << 16;

template <typename Stored>
PDP_INLINE int64_t count_equal(const Stored* data, int64_t begin, int64_t end, uint64_t kth) {
  const auto key = static_cast<typename Magnitude<Stored>::Key>(kth);
  int64_t equal = 0;
  for (int64_t i = begin; i < end; ++i) equal += magnitude_key(data[i]) == key;
  return equal;
}

template <typename Stored>
PDP_INLINE void keep_above(const Stored* data, int64_t begin, int64_t end, uint64_t kth,
                           bool* kept) {
  const auto key = static_cast<typename Magnitude<Stored>::Key>(kth);
  for (int64_t i = begin; i < end; ++i) kept[i] = magnitude_key(data[i]) > key;
}

PDP_MULTIVERSION int64_t count_equal(Weight weight, int64_t begin, int64_t end, uint64_t kth) {
  int64_t equal = 0;
  visit(weight.data, weight.type,
        [&](const auto* data) PDP_LAMBDA { equal = count_equal(data, begin, end, kth); });
  return equal;
}

PDP_MULTIVERSION void keep_above(Weight weight, int64_t begin, int64_t end, uint64_t kth,
                                 bool* kept) {
  visit(weight.data, weight.type,
        [&](const auto* data) PDP_LAMBDA { keep_above(data, begin, end, kth, kept); });
}

// Keeps all but the first `pruned` of the weights in [begin, end) that equal the k-th.
void keep_late_ties(Weight weight, int64_t begin, int64_t end, uint64_t kth, int64_t pruned,
                    bool* kept) {
  visit(weight.data, weight.type, [&](const auto* data) {
    for (int64_t i = begin; i < end; ++i) {
      if (magnitude_key(data[i]) == kth && --pruned < 0) kept[i] = true;
    }
  });
}

}  // namespace

void hard_mask(Weight weight, int64_t k, bool* kept, ParallelFor parallel_for) {
  const int64_t n = weight.numel;
  if (k <= 0 || k >= n) {
    std::fill_n(kept, n, k <= 0);
    return;
  }
  const OrderStatistics found = radix_select({weight}, &k, parallel_for)[0];
  const int64_t tied_and_pruned = k - found.below;

  const int64_t tiles = (n + kTile - 1) / kTile;
  std::vector<int64_t> ties_before(tiles + 1, 0);
  const bool split = tied_and_pruned < found.equal;
  parallel_for(tiles, 1, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t begin = tile * kTile, end = std::min(n, begin + kTile);
      keep_above(weight, begin, end, found.kth, kept);
      if (split) ties_before[tile + 1] = count_equal(weight, begin, end, found.kth);
    }
  });
  if (!split) return;

  for (int64_t tile = 0; tile < tiles; ++tile) ties_before[tile + 1] += ties_before[tile];
  parallel_for(tiles, 1, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t begin = tile * kTile, end = std::min(n, begin + kTile);
      const int64_t pruned = std::max<int64_t>(0, tied_and_pruned - ties_before[tile]);
      keep_late_ties(weight, begin, end, found.kth, pruned, kept);
    }
  });
}

}  // namespace pdp::cpu
