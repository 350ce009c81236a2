#include "soft_mask_nm.h"

#include <limits>

#include "../mask_math.h"
#include "flush.h"

namespace pdp::cpu {
namespace {

// The fewest elements worth a thread.
constexpr int64_t kGrain = 16384;

template <typename Real>
PDP_INLINE void read_block(Array array, GroupLayout layout, int64_t first, int count,
                           GroupBlock<Real>& block) {
  read_groups(layout, first, count, block,
              [&](int64_t offset, int length, Real* buffer)
                  PDP_LAMBDA { return load(array, offset, length, buffer); });
}

// Finds each group's threshold, as threshold_between of magnitude.h does.
template <typename Real>
PDP_INLINE void find_thresholds(const GroupSelection& selection, Array weight, GroupLayout layout,
                                int64_t first, int count, Real* thresholds) {
  GroupBlock<typename Magnitude<Real>::Key> keys;
  if (layout.members == 4 && layout.stride == 1) {
    Real buffer[4 * kGroups];
    const Real* values = load(weight, 4 * first, 4 * count, buffer);
    sort_fours(values, count, keys);
  } else {
    GroupBlock<Real> weights;
    read_block(weight, layout, first, count, weights);
    selection.sort(weights, keys);
  }
  const auto* kth = keys.rows[selection.pruned - 1];
  const auto* next = keys.rows[selection.pruned];
  for (int q = 0; q < count; ++q) {
    const Real low = bit_cast<Real>(kth[q]);
    const Real high = bit_cast<Real>(next[q]);
    const Real halves = Real(0.5) * low + Real(0.5) * high;
    const Real half_sum = Real(0.5) * (low + high);
    thresholds[q] = high > 1 ? halves : half_sum;
  }
}

template <int kMembers, typename Real>
PDP_INLINE void repeat(const Real* thresholds, int members, int count, Real* repeated) {
  const int step = kMembers > 0 ? kMembers : members;
  for (int q = 0; q < count; ++q) {
    for (int j = 0; j < step; ++j) repeated[q * step + j] = thresholds[q];
  }
}

// Writes the threshold of each element of groups whose members are neighbours.
template <typename Real>
PDP_INLINE void repeat(const Real* thresholds, int members, int count, Real* repeated) {
  switch (members) {
    case 4:
      return repeat<4>(thresholds, 4, count, repeated);
    case 8:
      return repeat<8>(thresholds, 8, count, repeated);
    default:
      return repeat<0>(thresholds, members, count, repeated);
  }
}

// Calls run(offset, length, thresholds) for runs of neighbouring elements of the groups
// [first, first + count), with the threshold of each element. `run` is compiled once, so that a
// weight's result does not depend on the layout.
template <typename Real, typename Run>
PDP_INLINE void for_each_run(const GroupSelection& selection, Array weight, GroupLayout layout,
                             int64_t first, int count, const Run& run) {
  Real of_groups[kGroups], of_elements[kMaxMembers * kGroups];
  const Real* thresholds = of_groups;
  if (selection.pruned == 0 || selection.pruned == layout.members) {
    const Real infinity = std::numeric_limits<Real>::infinity();
    std::fill_n(of_groups, count, selection.pruned == 0 ? -infinity : infinity);
  } else {
    find_thresholds(selection, weight, layout, first, count, of_groups);
  }
  if (layout.stride == 1) {
    // Treated as groups of one element, which are all neighbours.
    repeat(of_groups, layout.members, count, of_elements);
    thresholds = of_elements;
    first *= layout.members;
    count *= layout.members;
    layout = {1, std::numeric_limits<int64_t>::max()};
  }
  for_each_span(layout, first, count, [&](int position, int64_t offset, int length) PDP_LAMBDA {
    for (int j = 0; j < layout.members; ++j) {
      run(offset + j * layout.stride, length, thresholds + position);
    }
  });
}

// Elements between two prefetches, without which the sorting of the next block waits for its
// weights.
constexpr int kChunk = 128;

template <typename Body>
PDP_INLINE void for_each_chunk(int length, const Body& body) {
  for (int begin = 0; begin < length; begin += kChunk)
    body(begin, std::min(begin + kChunk, length));
}

struct Forward {
  GroupSelection selection;
  GroupLayout layout;
  Array weight, w_hat, mask;

  template <typename Real, bool kRelative>
  PDP_INLINE void block(Real tau, int64_t first, int count) const {
    Real buffers[3][kMaxMembers * kGroups];
    const auto run = [&](int64_t offset, int length, const Real* thresholds) PDP_LAMBDA {
      const Real* values = load(weight, offset, length, buffers[0]);
      Real* __restrict w_hats = destination(w_hat, offset, buffers[1]);
      Real* __restrict masks = destination(mask, offset, buffers[2]);
      for_each_chunk(length, [&](int begin, int end) PDP_LAMBDA {
        prefetch_ahead(values + begin, end - begin);
        for (int i = begin; i < end; ++i) {
          const Real m = SoftMask<Real, kRelative>(thresholds[i], tau).value(values[i]);
          w_hats[i] = multiply(m, values[i]);
          masks[i] = m;
        }
      });
      store(w_hats, buffers[1], w_hat, offset, length);
      store(masks, buffers[2], mask, offset, length);
    };
    for_each_run<Real>(selection, weight, layout, first, count, run);
  }
};

struct Backward {
  GroupSelection selection;
  GroupLayout layout;
  Array grad_w_hat, grad_mask, weight, grad;

  template <typename Real, bool kRelative>
  PDP_INLINE void block(Real tau, int64_t first, int count) const {
    Real buffers[3][kMaxMembers * kGroups];
    const auto run = [&](int64_t offset, int length, const Real* thresholds) PDP_LAMBDA {
      const Real* values = load(weight, offset, length, buffers[0]);
      Real* __restrict results = destination(grad, offset, buffers[1]);
      if (grad_w_hat.data != nullptr) {
        const Real* gradients = load(grad_w_hat, offset, length, buffers[2]);
        for_each_chunk(length, [&](int begin, int end) PDP_LAMBDA {
          prefetch_ahead(values + begin, end - begin);
          prefetch_ahead(gradients + begin, end - begin);
          for (int i = begin; i < end; ++i) {
            const SoftMask<Real, kRelative> at(thresholds[i], tau);
            results[i] = multiply(at.w_hat_slope(values[i]), gradients[i]);
          }
        });
      } else {
        std::fill_n(results, length, Real(0));
      }
      if (grad_mask.data != nullptr) {
        const Real* gradients = load(grad_mask, offset, length, buffers[2]);
        for (int i = 0; i < length; ++i) {
          const SoftMask<Real, kRelative> at(thresholds[i], tau);
          results[i] += gradients[i] * at.mask_slope(values[i]);
        }
      }
      store(results, buffers[1], grad, offset, length);
    };
    for_each_run<Real>(selection, weight, layout, first, count, run);
  }
};

struct Hard {
  GroupSelection selection;
  GroupLayout layout;
  Array weight;
  bool* kept;

  template <typename Real>
  PDP_INLINE void block(int64_t first, int count) const {
    using Key = typename Magnitude<Real>::Key;
    GroupBlock<Real> weights;
    GroupBlock<Key> keys;
    GroupBlock<uint8_t> keeps;
    read_block(weight, layout, first, count, weights);
    selection.sort(weights, keys);
    // How many of the keys equal to the k-th are still to be pruned, lowest index first.
    const Key* kth = keys.rows[selection.pruned - 1];
    Key missing[kGroups] = {};
    for (int j = 0; j < selection.pruned; ++j) {
      for (int q = 0; q < kGroups; ++q) missing[q] += keys.rows[j][q] == kth[q];
    }
    for (int j = 0; j < layout.members; ++j) {
      for (int q = 0; q < kGroups; ++q) {
        const Key key = magnitude_key(weights.rows[j][q]);
        const bool tied = key == kth[q];
        const bool pruned_tie = tied & (missing[q] > 0);
        keeps.rows[j][q] = (key > kth[q]) | (tied & !pruned_tie);
        missing[q] -= pruned_tie;
      }
    }
    write_groups(keeps, layout, first, count,
                 [&](const uint8_t* values, int64_t offset, int length) PDP_LAMBDA {
                   for (int i = 0; i < length; ++i) kept[offset + i] = values[i] != 0;
                 });
  }
};

template <typename Real, typename Pass>
PDP_INLINE void run_range(const Pass& pass, const void* tau, bool relative, int64_t begin,
                          int64_t end) {
  const Real temperature = *static_cast<const Real*>(tau);
  for (int64_t first = begin; first < end; first += kGroups) {
    const int count = static_cast<int>(std::min<int64_t>(kGroups, end - first));
    if (relative) {
      pass.template block<Real, true>(temperature, first, count);
    } else {
      pass.template block<Real, false>(temperature, first, count);
    }
  }
}

template <typename Real>
PDP_INLINE void run_range(const Hard& pass, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += kGroups) {
    pass.block<Real>(first, static_cast<int>(std::min<int64_t>(kGroups, end - first)));
  }
}

// target_clones takes functions, not templates.
PDP_MULTIVERSION void forward_float(const Forward& pass, const void* tau, bool relative,
                                    int64_t begin, int64_t end) {
  run_range<float>(pass, tau, relative, begin, end);
}
PDP_MULTIVERSION void forward_double(const Forward& pass, const void* tau, bool relative,
                                     int64_t begin, int64_t end) {
  run_range<double>(pass, tau, relative, begin, end);
}
PDP_MULTIVERSION void backward_float(const Backward& pass, const void* tau, bool relative,
                                     int64_t begin, int64_t end) {
  run_range<float>(pass, tau, relative, begin, end);
}
PDP_MULTIVERSION void backward_double(const Backward& pass, const void* tau, bool relative,
                                      int64_t begin, int64_t end) {
  run_range<double>(pass, tau, relative, begin, end);
}
PDP_MULTIVERSION void hard_float(const Hard& pass, int64_t begin, int64_t end) {
  run_range<float>(pass, begin, end);
}
PDP_MULTIVERSION void hard_double(const Hard& pass, int64_t begin, int64_t end) {
  run_range<double>(pass, begin, end);
}

}  // namespace

void soft_mask_nm(Array weight, const void* tau, GroupLayout layout, int64_t pruned, bool relative,
                  Array w_hat, Array mask, int64_t numel, ParallelFor parallel_for) {
  const Forward pass{GroupSelection(layout.members, pruned), layout, weight, w_hat, mask};
  const auto run = weight.type == WeightType::kFloat64 ? forward_double : forward_float;
  parallel_for(numel / layout.members, kGrain / layout.members,
               [&](int64_t begin, int64_t end) { run(pass, tau, relative, begin, end); });
}

void soft_mask_nm_backward(Array grad_w_hat, Array grad_mask, Array weight, const void* tau,
                           GroupLayout layout, int64_t pruned, bool relative, Array grad,
                           int64_t numel, ParallelFor parallel_for) {
  const Backward pass{
      GroupSelection(layout.members, pruned), layout, grad_w_hat, grad_mask, weight, grad};
  const auto run = weight.type == WeightType::kFloat64 ? backward_double : backward_float;
  parallel_for(numel / layout.members, kGrain / layout.members,
               [&](int64_t begin, int64_t end) { run(pass, tau, relative, begin, end); });
}

void hard_mask_nm(Array weight, GroupLayout layout, int64_t pruned, bool* kept, int64_t numel,
                  ParallelFor parallel_for) {
  if (pruned <= 0) {
    std::fill_n(kept, numel, true);
    return;
  }
  const Hard pass{GroupSelection(layout.members, pruned), layout, weight, kept};
  const auto run = weight.type == WeightType::kFloat64 ? hard_double : hard_float;
  parallel_for(numel / layout.members, kGrain / layout.members,
               [&](int64_t begin, int64_t end) { run(pass, begin, end); });
}

}  // namespace pdp::cpu
