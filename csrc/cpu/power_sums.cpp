#include "power_sums.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace pdp::cpu {
namespace {

// Weights summed by one call. A unit of work is a tile of a long row, or as many short rows as fit
// in a tile.
constexpr int64_t kSumTile = 16384;

// Weights added to the lanes before the lanes are added up: few enough to lose no precision.
constexpr int kSumBlock = 1024;

// Independent sums, for the vectors of every instruction set and the latency of an addition.
constexpr int kSumLanes = 32;

template <Norms kNorms, typename Real>
PDP_INLINE void add_block(const Real* values, int count, double p, double q, PowerSums& sums) {
  double p_lanes[kSumLanes] = {}, q_lanes[kSumLanes] = {};
  const auto add = [&](int lane, Real value) PDP_LAMBDA {
    const Real magnitude = std::fabs(value);
    p_lanes[lane] += power_p<kNorms>(magnitude, p);
    q_lanes[lane] += power_q<kNorms>(magnitude, q);
  };
  const Real* end = values + count;
  for (; end - values >= kSumLanes; values += kSumLanes) {
    prefetch_ahead(values, kSumLanes);
    for (int j = 0; j < kSumLanes; ++j) add(j, values[j]);
  }
  for (int j = 0; values < end; ++j, ++values) add(j, *values);
  sums.p += add_lanes(p_lanes);
  sums.q += add_lanes(q_lanes);
}

template <typename Real>
PDP_INLINE void add_block(Norms norms, const Real* values, int count, double p, double q,
                          PowerSums& sums) {
  switch (norms) {
    case Norms::kHalfOne:
      return add_block<Norms::kHalfOne>(values, count, p, q, sums);
    case Norms::kHalfTwo:
      return add_block<Norms::kHalfTwo>(values, count, p, q, sums);
    case Norms::kOneTwo:
      return add_block<Norms::kOneTwo>(values, count, p, q, sums);
    case Norms::kAny:
      return add_block<Norms::kAny>(values, count, p, q, sums);
  }
}

// Loads the block's weights, with 0 for pruned ones; returns how many are not pruned.
template <typename Real>
PDP_INLINE int load_kept(Array weight, const bool* kept, int64_t offset, int count, Real* buffer) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(kept + offset);
  visit(weight.data, weight.type, [&](const auto* data) PDP_LAMBDA {
    for (int i = 0; i < count; ++i) {
      const Real value = static_cast<Real>(widen(data[offset + i]));
      buffer[i] = bytes[i] != 0 ? value : Real(0);
    }
  });
  int unpruned = 0;
  for (int i = 0; i < count; ++i) unpruned += bytes[i] != 0;
  return unpruned;
}

struct Request {
  Norms norms;
  double p, q;
};

template <typename Real>
PDP_INLINE PowerSums sum_range(const Request& request, const Rows& tensor, int64_t begin,
                               int64_t end) {
  PowerSums sums{};
  Real buffer[kSumBlock];
  for (int64_t offset = begin; offset < end; offset += kSumBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kSumBlock, end - offset));
    const Real* values = buffer;
    if (tensor.kept != nullptr) {
      sums.count += load_kept(tensor.weight, tensor.kept, offset, count, buffer);
    } else {
      sums.count += count;
      values = load(tensor.weight, offset, count, buffer);
    }
    add_block(request.norms, values, count, request.p, request.q, sums);
  }
  return sums;
}

// target_clones takes functions, not templates.
PDP_MULTIVERSION PowerSums sum_float(const Request& request, const Rows& tensor, int64_t begin,
                                     int64_t end) {
  return sum_range<float>(request, tensor, begin, end);
}
PDP_MULTIVERSION PowerSums sum_double(const Request& request, const Rows& tensor, int64_t begin,
                                      int64_t end) {
  return sum_range<double>(request, tensor, begin, end);
}

PowerSums sum(const Request& request, const Rows& tensor, int64_t begin, int64_t end) {
  const bool is_double = tensor.weight.type == WeightType::kFloat64;
  return (is_double ? sum_double : sum_float)(request, tensor, begin, end);
}

// How a tensor is split into units of work: tiles of a long row, or several short rows.
struct Split {
  int64_t row_size;
  int64_t rows_per_unit;
  int64_t units_per_row;
  int64_t first_unit;  // index in the list
  int64_t first_group;

  int64_t units(int64_t rows) const {
    return units_per_row > 1 ? rows * units_per_row : (rows + rows_per_unit - 1) / rows_per_unit;
  }
};

std::vector<Split> split(const std::vector<Rows>& tensors) {
  std::vector<Split> splits;
  int64_t units = 0, groups = 0;
  for (const Rows& tensor : tensors) {
    const int64_t row_size = tensor.rows > 0 ? tensor.numel / tensor.rows : 0;
    splits.push_back({row_size, std::max<int64_t>(1, kSumTile / std::max<int64_t>(1, row_size)),
                      (row_size + kSumTile - 1) / kSumTile, units, groups});
    units += splits.back().units(tensor.rows);
    groups += tensor.rows;
  }
  splits.push_back({0, 1, 0, units, groups});
  return splits;
}

}  // namespace

void power_sums(const std::vector<Rows>& tensors, double p, double q, PowerSums* results,
                ParallelFor parallel_for) {
  const Request request{norms_of(p, q), p, q};
  const std::vector<Split> splits = split(tensors);
  const int64_t units = splits.back().first_unit;
  std::vector<PowerSums> tile_sums(units);  // of long rows

  const auto run_unit = [&](size_t i, int64_t unit) {
    const Rows& tensor = tensors[i];
    const Split& split = splits[i];
    if (split.units_per_row > 1) {
      const int64_t row = unit / split.units_per_row, tile = unit % split.units_per_row;
      const int64_t begin = row * split.row_size + tile * kSumTile;
      const int64_t end = std::min(begin + kSumTile, (row + 1) * split.row_size);
      tile_sums[split.first_unit + unit] = sum(request, tensor, begin, end);
      return;
    }
    const int64_t first = unit * split.rows_per_unit;
    const int64_t last = std::min(first + split.rows_per_unit, tensor.rows);
    for (int64_t row = first; row < last; ++row) {
      results[split.first_group + row] =
          sum(request, tensor, row * split.row_size, (row + 1) * split.row_size);
    }
  };

  int64_t numel = 0;
  for (const Rows& tensor : tensors) numel += tensor.numel;
  // A list that fits in one unit is not worth a second thread.
  const int64_t grain = numel <= kSumTile ? std::max<int64_t>(1, units) : 1;
  parallel_for(units, grain, [&](int64_t begin, int64_t end) {
    const auto after = [](int64_t unit, const Split& split) { return unit < split.first_unit; };
    size_t i = std::upper_bound(splits.begin(), splits.end(), begin, after) - splits.begin() - 1;
    for (int64_t unit = begin; unit < end; ++unit) {
      while (unit >= splits[i + 1].first_unit) ++i;
      run_unit(i, unit - splits[i].first_unit);
    }
  });

  for (size_t i = 0; i < tensors.size(); ++i) {
    if (splits[i].units_per_row <= 1) continue;
    const PowerSums* sums = &tile_sums[splits[i].first_unit];
    for (int64_t row = 0; row < tensors[i].rows; ++row) {
      PowerSums total{};
      for (int64_t tile = 0; tile < splits[i].units_per_row; ++tile, ++sums) {
        total = total + *sums;
      }
      results[splits[i].first_group + row] = total;
    }
  }
}

}  // namespace pdp::cpu
