// N:M groups: M consecutive weights along one dimension, many groups at a time.
//
// In a dense layout the elements of a dimension are `stride` apart, and the dimensions below it
// fill [0, stride). So member j of group q is at (q - i) M + i + j stride with i = q % stride, for
// any other dimensions. A block of groups is transposed to M rows (row j holds member j of every
// group), so that all arithmetic runs across groups and vectorises for every M.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "../magnitude.h"
#include "parallel.h"

namespace pdp::cpu {

constexpr int kMaxMembers = 32;

// Groups per block: with 32 members, the rows of one block take 16 KiB of float32.
constexpr int kGroups = 128;

struct GroupLayout {
  int members;     // M
  int64_t stride;  // in elements, from one member to the next
};

template <typename Value>
struct GroupBlock {
  Value rows[kMaxMembers][kGroups];

  PDP_INLINE void clear(int members) { std::fill_n(&rows[0][0], members * kGroups, Value(0)); }
};

// Compilers vectorise the transposition only if they know the number of members.
template <int kMembers, typename Value>
PDP_INLINE void transpose(const Value* values, int members, int count, GroupBlock<Value>& block) {
  const int step = kMembers > 0 ? kMembers : members;
  for (int j = 0; j < step; ++j) {
    for (int q = 0; q < count; ++q) block.rows[j][q] = values[q * step + j];
  }
}

template <int kMembers, typename Value>
PDP_INLINE void transpose(const GroupBlock<Value>& block, int members, Value* values) {
  const int step = kMembers > 0 ? kMembers : members;
  for (int q = 0; q < kGroups; ++q) {
    for (int j = 0; j < step; ++j) values[q * step + j] = block.rows[j][q];
  }
}

// Like transpose<4> of the magnitude keys, with each group in ascending order. Compilers keep the
// four in registers, whereas the passes of a sorting network over rows go through memory.
template <typename Real, typename Key = typename Magnitude<Real>::Key>
PDP_INLINE void sort_fours(const Real* values, int count, GroupBlock<Key>& keys) {
  for (int q = 0; q < count; ++q) {
    const Key a = magnitude_key(values[4 * q]), b = magnitude_key(values[4 * q + 1]);
    const Key c = magnitude_key(values[4 * q + 2]), d = magnitude_key(values[4 * q + 3]);
    const Key low_ab = a < b ? a : b, high_ab = a < b ? b : a;
    const Key low_cd = c < d ? c : d, high_cd = c < d ? d : c;
    const Key lower = low_ab < low_cd ? low_cd : low_ab;
    const Key upper = high_ab < high_cd ? high_ab : high_cd;
    keys.rows[0][q] = low_ab < low_cd ? low_ab : low_cd;
    keys.rows[1][q] = lower < upper ? lower : upper;
    keys.rows[2][q] = lower < upper ? upper : lower;
    keys.rows[3][q] = high_ab < high_cd ? high_cd : high_ab;
  }
}

// Calls body(position in the rows, offset of member 0, length) for each span of groups that are
// neighbours in memory.
template <typename Body>
PDP_INLINE void for_each_span(GroupLayout layout, int64_t first, int count, const Body& body) {
  for (int position = 0; position < count;) {
    const int64_t group = first + position;
    const int64_t inside = group % layout.stride;
    const auto length =
        static_cast<int>(std::min<int64_t>(count - position, layout.stride - inside));
    body(position, (group - inside) * layout.members + inside, length);
    position += length;
  }
}

// Fills the block from the groups [first, first + count). load(offset, length, buffer) returns
// neighbouring elements, which may be in the buffer.
template <typename Value, typename Load>
PDP_INLINE void read_groups(GroupLayout layout, int64_t first, int count, GroupBlock<Value>& block,
                            const Load& load) {
  // The arithmetic runs over full rows, so places without a group must hold numbers.
  if (count < kGroups) block.clear(layout.members);
  if (layout.stride == 1) {
    Value buffer[kMaxMembers * kGroups];
    const Value* values = load(first * layout.members, count * layout.members, buffer);
    switch (layout.members) {
      case 4:
        return transpose<4>(values, 4, count, block);
      case 8:
        return transpose<8>(values, 8, count, block);
      default:
        return transpose<0>(values, layout.members, count, block);
    }
  }
  for_each_span(layout, first, count, [&](int position, int64_t offset, int length) PDP_LAMBDA {
    for (int j = 0; j < layout.members; ++j) {
      Value* row = &block.rows[j][position];
      const Value* values = load(offset + j * layout.stride, length, row);
      if (values != row) std::copy_n(values, length, row);
    }
  });
}

// The inverse of read_groups. store(values, offset, length) writes neighbouring elements.
template <typename Value, typename Store>
PDP_INLINE void write_groups(const GroupBlock<Value>& block, GroupLayout layout, int64_t first,
                             int count, const Store& store) {
  if (layout.stride == 1) {
    Value values[kMaxMembers * kGroups];
    switch (layout.members) {
      case 4:
        transpose<4>(block, 4, values);
        break;
      case 8:
        transpose<8>(block, 8, values);
        break;
      default:
        transpose<0>(block, layout.members, values);
    }
    return store(values, first * layout.members, count * layout.members);
  }
  for_each_span(layout, first, count, [&](int position, int64_t offset, int length) PDP_LAMBDA {
    for (int j = 0; j < layout.members; ++j) {
      store(&block.rows[j][position], offset + j * layout.stride, length);
    }
  });
}

// Returns the comparators that sort `count` rows: Batcher's merge exchange, Knuth, TAOCP 3, 5.2.2,
// Algorithm M.
inline std::vector<std::pair<int, int>> sorting_network(int count) {
  std::vector<std::pair<int, int>> comparators;
  int top = 1;
  while (top * 2 < count) top *= 2;
  for (int p = top; p > 0; p /= 2) {
    int q = top, r = 0, d = p;
    while (true) {
      for (int i = 0; i + d < count; ++i) {
        if ((i & p) == r) comparators.emplace_back(i, i + d);
      }
      if (q == p) break;
      d = q - p;
      q /= 2;
      r = p;
    }
  }
  return comparators;
}

// The selection that all blocks make: which order statistics, and the sorting network.
struct GroupSelection {
  int members;
  int pruned;  // k, the same in every group: from 0 to M
  std::vector<std::pair<int, int>> network;

  GroupSelection(int members, int64_t pruned)
      : members(members),
        pruned(static_cast<int>(std::clamp<int64_t>(pruned, 0, members))),
        network(sorting_network(members)) {}

  // Writes the magnitude keys of every group in ascending order.
  template <typename Real, typename Key = typename Magnitude<Real>::Key>
  PDP_INLINE void sort(const GroupBlock<Real>& weight, GroupBlock<Key>& keys) const {
    for (int j = 0; j < members; ++j) {
      for (int q = 0; q < kGroups; ++q) keys.rows[j][q] = magnitude_key(weight.rows[j][q]);
    }
    for (const auto& [low, high] : network) {
      Key* lows = keys.rows[low];
      Key* highs = keys.rows[high];
      for (int q = 0; q < kGroups; ++q) {
        const Key a = lows[q], b = highs[q];
        lows[q] = a < b ? a : b;
        highs[q] = a < b ? b : a;
      }
    }
  }
};

}  // namespace pdp::cpu
