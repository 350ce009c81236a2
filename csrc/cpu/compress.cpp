#include "compress.h"

#include <algorithm>

namespace pdp::cpu {
namespace {

// Rows whose metadata is stored together.
constexpr int64_t kBlockRows = 32;
// Columns at a time: the metadata of 32 x 1024 weights, 4 KB, stays in the first-level cache.
constexpr int64_t kTileColumns = 1024;

// Returns the sort key of weight kIndex of a group: its magnitude above three bits that break ties,
// so that of equal magnitudes the highest index is kept. A zero at index 2 has priority over one at
// 3: the metadata of a group with its only nonzero at 0 or 1 names index 2 too, as in torch.
template <typename Stored, int kIndex>
PDP_INLINE uint32_t group_key(const Stored* group) {
  const uint32_t key = static_cast<uint32_t>(magnitude_key(group[kIndex])) << 3 | kIndex;
  return kIndex == 2 ? std::max(key, 6u) : key;
}

// Writes the two places kept in each group, first | second << 2 with first < second, and the
// weights there.
template <typename Stored>
PDP_INLINE void compress_groups(const Stored* __restrict weight, int64_t groups,
                                Stored* __restrict values, uint16_t* __restrict places) {
  for (int64_t i = 0; i < groups; ++i) {
    const Stored* group = weight + 4 * i;
    const uint32_t a = group_key<Stored, 0>(group), b = group_key<Stored, 1>(group);
    const uint32_t c = group_key<Stored, 2>(group), d = group_key<Stored, 3>(group);
    const uint32_t high_ab = std::max(a, b), high_cd = std::max(c, d);
    const uint32_t largest = std::max(high_ab, high_cd) & 3;
    // The second largest is the smaller of the pairs' maxima, or the larger of their minima.
    const uint32_t low = std::max(std::min(a, b), std::min(c, d));
    const uint32_t runner_up = std::max(std::min(high_ab, high_cd), low) & 3;
    const uint32_t first = std::min(largest, runner_up), second = std::max(largest, runner_up);
    const uint16_t w0 = group[0].bits, w1 = group[1].bits, w2 = group[2].bits, w3 = group[3].bits;
    values[2 * i].bits = first == 0 ? w0 : first == 1 ? w1 : w2;
    values[2 * i + 1].bits = second == 1 ? w1 : second == 2 ? w2 : w3;
    places[i] = static_cast<uint16_t>(first | second << 2);
  }
}

// Returns the place of the word of four groups. CUTLASS reads a block of 32 rows x 2 words as 64
// consecutive words, blocks of the same columns one after another.
PDP_INLINE int64_t metadata_offset(int64_t row, int64_t word, int64_t rows) {
  const int64_t lane = row % 8, quarter = row / 8 % 4;
  const int64_t block = word / 2 * (2 * rows) + row / kBlockRows * (2 * kBlockRows);
  return block + 8 * lane + 4 * (quarter / 2) + 2 * (word % 2) + quarter % 2;
}

template <typename Stored>
PDP_INLINE void compress_rows(const Stored* weight, int64_t row, int64_t rows, int64_t cols,
                              Stored* values, uint16_t* metadata) {
  uint16_t places[kTileColumns / 4];
  for (int64_t column = 0; column < cols; column += kTileColumns) {
    const int64_t count = std::min(kTileColumns, cols - column);
    for (int64_t r = row; r < row + kBlockRows; ++r) {
      const int64_t offset = r * cols + column;
      compress_groups(weight + offset, count / 4, values + offset / 2, places);
      for (int64_t i = 0; i < count / 16; ++i) {
        const uint16_t* four = places + 4 * i;
        metadata[metadata_offset(r, column / 16 + i, rows)] =
            static_cast<uint16_t>(four[0] | four[1] << 4 | four[2] << 8 | four[3] << 12);
      }
    }
  }
}

PDP_MULTIVERSION void compress_block(const void* weight, WeightType type, int64_t row, int64_t rows,
                                     int64_t cols, void* values, uint16_t* metadata) {
  if (type == WeightType::kBFloat16) {
    compress_rows(static_cast<const BFloat16*>(weight), row, rows, cols,
                  static_cast<BFloat16*>(values), metadata);
  } else {
    compress_rows(static_cast<const Half*>(weight), row, rows, cols, static_cast<Half*>(values),
                  metadata);
  }
}

}  // namespace

void compress_2to4(const void* weight, WeightType type, int64_t rows, int64_t cols, void* values,
                   uint16_t* metadata, ParallelFor parallel_for) {
  parallel_for(rows / kBlockRows, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      compress_block(weight, type, block * kBlockRows, rows, cols, values, metadata);
    }
  });
}

}  // namespace pdp::cpu
