#include "soft_mask.h"

#include <algorithm>

#include "../mask_math.h"
#include "flush.h"

namespace pdp::cpu {
namespace {

// Elements worked on at a time: the converted copies of three arrays stay in a 32 KiB L1.
constexpr int kBlock = 1024;

// Elements that are done over if there are subnormal numbers among them.
constexpr int64_t kQuickBlock = 4096;

// The fewest elements worth a thread.
constexpr int64_t kGrain = 16384;

template <typename Real, bool kRelative>
PDP_INLINE void forward_block(SoftMask<Real, kRelative> at, const Real* __restrict weight,
                              Real* __restrict w_hat, Real* __restrict mask, int count) {
  for (int i = 0; i < count; ++i) {
    const Real m = at.value(weight[i]);
    w_hat[i] = multiply(m, weight[i]);
    mask[i] = m;
  }
}

template <typename Real, bool kRelative>
PDP_INLINE void backward_block(SoftMask<Real, kRelative> at, const Real* grad_w_hat,
                               const Real* weight, Real* grad, int count) {
  for (int i = 0; i < count; ++i) {
    grad[i] = multiply(at.w_hat_slope(weight[i]), grad_w_hat[i]);
  }
}

template <typename Real, bool kRelative>
PDP_INLINE void add_mask_gradient(SoftMask<Real, kRelative> at, const Real* grad_mask,
                                  const Real* weight, Real* grad, int count) {
  for (int i = 0; i < count; ++i) grad[i] += grad_mask[i] * at.mask_slope(weight[i]);
}

// Finds subnormal numbers among some: the smallest magnitude but 0, as bits less one.
struct Smallest {
  uint32_t bits = ~0u;

  PDP_INLINE void add(float x) { bits = std::min(bits, bit_cast<uint32_t>(std::fabs(x)) - 1); }
  PDP_INLINE bool is_subnormal() const { return bits < 0x007FFFFF; }
};

// The same in one loop that converts too, without a mask, while the CPU flushes products: the
// comparisons of `multiply` would take a sixth of the time. Returns false if a weight is subnormal:
// its product may be one that should stay so.
template <bool kRelative, typename Weight, typename Result>
PDP_INLINE bool forward_flushing(SoftMask<float, kRelative> at, const Weight* __restrict weight,
                                 Result* __restrict w_hat, int count) {
  Smallest smallest;
  for (int i = 0; i < count; ++i) {
    const float w = widen(weight[i]);
    smallest.add(w);
    narrow(at.value(w) * w, w_hat[i]);
  }
  return !smallest.is_subnormal();
}

template <bool kRelative, typename Gradient, typename Weight>
PDP_INLINE bool backward_flushing(SoftMask<float, kRelative> at,
                                  const Gradient* __restrict grad_w_hat,
                                  const Weight* __restrict weight, Weight* __restrict grad,
                                  int count) {
  Smallest smallest;
  for (int i = 0; i < count; ++i) {
    const float gradient = widen(grad_w_hat[i]);
    smallest.add(gradient);
    narrow(at.w_hat_slope(widen(weight[i])) * gradient, grad[i]);
  }
  return !smallest.is_subnormal();
}

// Calls body with a pointer to the array's numbers and returns its answer. Returns false for
// float64 and float16, which are too rare for loops of their own.
template <typename Body>
PDP_INLINE bool visit_common(Array array, int64_t offset, const Body& body) {
  if (array.type == WeightType::kFloat32) return body(static_cast<float*>(array.data) + offset);
  if (array.type == WeightType::kBFloat16) {
    return body(static_cast<BFloat16*>(array.data) + offset);
  }
  return false;
}

struct Forward {
  Array weight, w_hat, mask;

  // Returns whether it did the work; else `block` has to.
  template <bool kRelative>
  PDP_INLINE bool quick(SoftMask<float, kRelative> at, int64_t offset, int count) const {
    if (!Flushing::kAvailable || mask.data != nullptr) return false;
    const Flushing flushing;
    return visit_common(weight, offset, [&](const auto* values) PDP_LAMBDA {
      return visit_common(w_hat, offset, [&](auto* results) PDP_LAMBDA {
        return forward_flushing(at, values, results, count);
      });
    });
  }

  template <typename Real, bool kRelative>
  PDP_INLINE void block(SoftMask<Real, kRelative> at, int64_t offset, int count) const {
    Real weight_buffer[kBlock], w_hat_buffer[kBlock], mask_buffer[kBlock];
    const Real* values = load(weight, offset, count, weight_buffer);
    Real* w_hats = destination(w_hat, offset, w_hat_buffer);
    Real* masks = destination(mask, offset, mask_buffer);
    forward_block(at, values, w_hats, masks, count);
    store(w_hats, w_hat_buffer, w_hat, offset, count);
    store(masks, mask_buffer, mask, offset, count);
  }
};

struct Backward {
  Array grad_w_hat, grad_mask, weight, grad;

  template <bool kRelative>
  PDP_INLINE bool quick(SoftMask<float, kRelative> at, int64_t offset, int count) const {
    if (!Flushing::kAvailable || grad_w_hat.data == nullptr || grad_mask.data != nullptr) {
      return false;
    }
    const Flushing flushing;
    return visit_common(grad_w_hat, offset, [&](const auto* gradients) PDP_LAMBDA {
      return visit_common(weight, offset, [&](const auto* values) PDP_LAMBDA {
        auto* results =
            static_cast<std::remove_const_t<std::remove_pointer_t<decltype(values)>>*>(grad.data);
        return backward_flushing(at, gradients, values, results + offset, count);
      });
    });
  }

  template <typename Real, bool kRelative>
  PDP_INLINE void block(SoftMask<Real, kRelative> at, int64_t offset, int count) const {
    Real gradient_buffer[kBlock], weight_buffer[kBlock], grad_buffer[kBlock];
    const Real* values = load(weight, offset, count, weight_buffer);
    Real* results = destination(grad, offset, grad_buffer);
    if (grad_w_hat.data != nullptr) {
      const Real* gradients = load(grad_w_hat, offset, count, gradient_buffer);
      backward_block(at, gradients, values, results, count);
    } else {
      std::fill_n(results, count, Real(0));
    }
    if (grad_mask.data != nullptr) {
      const Real* gradients = load(grad_mask, offset, count, gradient_buffer);
      add_mask_gradient(at, gradients, values, results, count);
    }
    store(results, grad_buffer, grad, offset, count);
  }
};

template <typename Real, bool kRelative, typename Pass>
PDP_INLINE void run_blocks(const Pass& pass, SoftMask<Real, kRelative> at, int64_t begin,
                           int64_t end) {
  for (int64_t first = begin; first < end; first += kQuickBlock) {
    const int64_t stop = std::min(first + kQuickBlock, end);
    if constexpr (std::is_same_v<Real, float>) {
      if (pass.quick(at, first, static_cast<int>(stop - first))) continue;
    }
    for (int64_t offset = first; offset < stop; offset += kBlock) {
      pass.block(at, offset, static_cast<int>(std::min<int64_t>(kBlock, stop - offset)));
    }
  }
}

template <typename Real, typename Pass>
PDP_INLINE void run_range(const Pass& pass, const void* threshold, const void* tau, bool relative,
                          int64_t begin, int64_t end) {
  const Real t = *static_cast<const Real*>(threshold);
  const Real temperature = *static_cast<const Real*>(tau);
  if (relative) {
    run_blocks(pass, SoftMask<Real, true>(t, temperature), begin, end);
  } else {
    run_blocks(pass, SoftMask<Real, false>(t, temperature), begin, end);
  }
}

// target_clones takes functions, not templates.
PDP_MULTIVERSION void forward_float(const Forward& pass, const void* threshold, const void* tau,
                                    bool relative, int64_t begin, int64_t end) {
  run_range<float>(pass, threshold, tau, relative, begin, end);
}
PDP_MULTIVERSION void forward_double(const Forward& pass, const void* threshold, const void* tau,
                                     bool relative, int64_t begin, int64_t end) {
  run_range<double>(pass, threshold, tau, relative, begin, end);
}
PDP_MULTIVERSION void backward_float(const Backward& pass, const void* threshold, const void* tau,
                                     bool relative, int64_t begin, int64_t end) {
  run_range<float>(pass, threshold, tau, relative, begin, end);
}
PDP_MULTIVERSION void backward_double(const Backward& pass, const void* threshold, const void* tau,
                                      bool relative, int64_t begin, int64_t end) {
  run_range<double>(pass, threshold, tau, relative, begin, end);
}

// Calls run(entry, begin, end) for ranges of each weight. Threads divide the list as if it were one
// weight: many small ones keep all of them busy.
template <typename Entry, typename Run>
void over_list(const std::vector<Entry>& list, ParallelFor parallel_for, const Run& run) {
  std::vector<int64_t> ends;
  int64_t numel = 0;
  for (const Entry& entry : list) ends.push_back(numel += entry.numel);
  parallel_for(numel, kGrain, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (; begin < end; ++i) {
      const int64_t first = ends[i] - list[i].numel, stop = std::min(end, ends[i]);
      run(list[i], begin - first, stop - first);
      begin = stop;
    }
  });
}

}  // namespace

void soft_mask(const std::vector<MaskedWeight>& list, bool relative, ParallelFor parallel_for) {
  over_list(list, parallel_for, [=](const MaskedWeight& one, int64_t begin, int64_t end) {
    const Forward pass{one.weight, one.w_hat, one.mask};
    const auto run = one.weight.type == WeightType::kFloat64 ? forward_double : forward_float;
    run(pass, one.threshold, one.tau, relative, begin, end);
  });
}

void soft_mask_backward(const std::vector<MaskedGradient>& list, bool relative,
                        ParallelFor parallel_for) {
  over_list(list, parallel_for, [=](const MaskedGradient& one, int64_t begin, int64_t end) {
    const Backward pass{one.grad_w_hat, one.grad_mask, one.weight, one.grad};
    const auto run = one.weight.type == WeightType::kFloat64 ? backward_double : backward_float;
    run(pass, one.threshold, one.tau, relative, begin, end);
  });
}

}  // namespace pdp::cpu
