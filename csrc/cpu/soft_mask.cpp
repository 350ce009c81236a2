#include "soft_mask.h"

#include <algorithm>

#include "../mask_math.h"
#include "flush.h"

namespace pdp::cpu {
namespace {

// Elements worked on at a time: the converted copies of three arrays stay in a 32 KiB L1.
constexpr int kBlock = 1024;

// The fewest elements worth a thread.
constexpr int64_t kGrain = 16384;

template <bool kWithMask, typename Real, bool kRelative>
PDP_INLINE void forward_block(SoftMask<Real, kRelative> at, const Real* __restrict weight,
                              Real* __restrict w_hat, Real* __restrict mask, int count) {
  for (int i = 0; i < count; ++i) {
    const Real m = at.value(weight[i]);
    w_hat[i] = multiply(m, weight[i]);
    if (kWithMask) mask[i] = flush(m);
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

struct Forward {
  Array weight, w_hat, mask;

  template <typename Real, bool kRelative>
  PDP_INLINE void operator()(SoftMask<Real, kRelative> at, int64_t begin, int64_t end) const {
    Real weight_buffer[kBlock], w_hat_buffer[kBlock], mask_buffer[kBlock];
    for (int64_t offset = begin; offset < end; offset += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, end - offset));
      const Real* values = load(weight, offset, count, weight_buffer);
      Real* w_hats = destination(w_hat, offset, w_hat_buffer);
      Real* masks = destination(mask, offset, mask_buffer);
      if (mask.data != nullptr) {
        forward_block<true>(at, values, w_hats, masks, count);
      } else {
        forward_block<false>(at, values, w_hats, masks, count);
      }
      store(w_hats, w_hat_buffer, w_hat, offset, count);
      store(masks, mask_buffer, mask, offset, count);
    }
  }
};

struct Backward {
  Array grad_w_hat, grad_mask, weight, grad;

  template <typename Real, bool kRelative>
  PDP_INLINE void operator()(SoftMask<Real, kRelative> at, int64_t begin, int64_t end) const {
    Real gradient_buffer[kBlock], weight_buffer[kBlock], grad_buffer[kBlock];
    for (int64_t offset = begin; offset < end; offset += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, end - offset));
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
  }
};

template <typename Real, typename Pass>
PDP_INLINE void run_range(const Pass& pass, const void* threshold, const void* tau, bool relative,
                          int64_t begin, int64_t end) {
  const Real t = *static_cast<const Real*>(threshold);
  const Real temperature = *static_cast<const Real*>(tau);
  if (relative) {
    pass(SoftMask<Real, true>(t, temperature), begin, end);
  } else {
    pass(SoftMask<Real, false>(t, temperature), begin, end);
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
