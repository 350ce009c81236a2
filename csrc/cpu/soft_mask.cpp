#include "soft_mask.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "convert.h"

namespace pdp::cpu {
namespace {

// Elements worked on at a time: the converted copies of three arrays stay in a 32 KiB L1.
constexpr int kBlock = 1024;

// Fewest elements worth a thread.
constexpr int64_t kGrain = 16384;

// e^-x for x >= 0, to one unit in the last place, in operations that vectorise: e^-x = 2^n e^r with
// |r| <= ln(2) / 2, e^r by its Taylor series (the next term is below 6e-9), 2^n in two factors, so
// that denormal results are reached.
PDP_INLINE float exp_negative(float x) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High =
      0.693145752f;  // ln 2 with 9 zero bits at the end: n * kLn2High is exact
  constexpr float kLn2Low = 1.42860677e-6f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer below
  constexpr float kUnderflow = 104.0f;   // e^-104 rounds to 0
  const float y = x > kUnderflow ? -kUnderflow : -x;
  const float shifted = y * kLog2E + kRound;
  const float n = shifted - kRound;
  const float r = (y - n * kLn2High) - n * kLn2Low;
  float series = 1.0f / 5040;
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 1.0f / 2;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  const int32_t power = bit_cast<int32_t>(shifted) - bit_cast<int32_t>(kRound);
  const int32_t half = power >> 1;
  return series * bit_cast<float>((half + 127) << 23) * bit_cast<float>((power - half + 127) << 23);
}

PDP_INLINE double exp_negative(double x) { return std::exp(-x); }

// z = ((|w| - t) / q) ((|w| + |t|) / q) / tau', with q and tau' as in
// reference.scale_and_temperature; q = 1 is not divided by.
template <typename Real, bool kRelative>
struct Mask {
  Real threshold;
  Real scale;
  Real tau;

  Mask(Real threshold, Real tau) : threshold(threshold), scale(1), tau(tau) {
    constexpr Real kTiny = std::numeric_limits<Real>::min();
    if (!kRelative) return;
    if (!std::isinf(threshold)) scale = std::fabs(threshold);
    if (threshold == 0) scale = this->tau = kTiny;
  }

  PDP_INLINE Real scaled(Real value) const { return kRelative ? value / scale : value; }

  PDP_INLINE Real exponent(Real weight) const {
    const Real magnitude = std::fabs(weight);
    return scaled(magnitude - threshold) * scaled(magnitude + std::fabs(threshold)) / tau;
  }
};

template <typename Real, bool kRelative>
PDP_INLINE void forward_block(Mask<Real, kRelative> at, const Real* __restrict weight,
                              Real* __restrict w_hat, Real* __restrict mask, int count) {
  for (int i = 0; i < count; ++i) {
    const Real z = at.exponent(weight[i]);
    const Real decay = exp_negative(std::fabs(z));
    const Real m = (z >= 0 ? Real(1) : decay) / (1 + decay);
    w_hat[i] = m * weight[i];
    mask[i] = m;
  }
}

// Where the slope m (1 - m) has underflowed to 0 its factor may have overflowed: 0 * inf is no
// number, so such terms are chosen to be 0.
template <typename Real, bool kRelative>
PDP_INLINE void backward_block(Mask<Real, kRelative> at, const Real* grad_w_hat, const Real* weight,
                               Real* grad, int count) {
  for (int i = 0; i < count; ++i) {
    const Real z = at.exponent(weight[i]);
    const Real decay = exp_negative(std::fabs(z));
    const Real inverse = 1 / (1 + decay);
    const Real m = (z >= 0 ? Real(1) : decay) * inverse;
    const Real slope = decay * inverse * inverse;
    const Real scaled = at.scaled(weight[i]);
    const Real boost = 2 * scaled * scaled / at.tau * slope;
    grad[i] = grad_w_hat[i] * (m + (slope == 0 ? Real(0) : boost));
  }
}

template <typename Real, bool kRelative>
PDP_INLINE void add_mask_gradient(Mask<Real, kRelative> at, const Real* grad_mask,
                                  const Real* weight, Real* grad, int count) {
  for (int i = 0; i < count; ++i) {
    const Real decay = exp_negative(std::fabs(at.exponent(weight[i])));
    const Real slope = decay / ((1 + decay) * (1 + decay));
    const Real factor = 2 * (at.scaled(weight[i]) / at.scale) / at.tau * slope;
    grad[i] += grad_mask[i] * (slope == 0 ? Real(0) : factor);
  }
}

// One block of an array as Reals: the array itself if it is of that type, else a converted copy.
template <typename Real>
PDP_INLINE const Real* load(Array array, int64_t offset, int count, Real* buffer) {
  const Real* values = buffer;
  visit(array.data, array.type, [&](const auto* data) PDP_LAMBDA {
    if constexpr (std::is_same_v<decltype(data), const Real*>) {
      values = data + offset;
    } else {
      for (int i = 0; i < count; ++i) buffer[i] = static_cast<Real>(widen(data[offset + i]));
    }
  });
  return values;
}

// Where a block's results go: the array itself if it is of that type, else the buffer.
template <typename Real>
PDP_INLINE Real* destination(Array array, int64_t offset, Real* buffer) {
  constexpr auto kOwn = std::is_same_v<Real, double> ? WeightType::kFloat64 : WeightType::kFloat32;
  const bool direct = array.data != nullptr && array.type == kOwn;
  return direct ? static_cast<Real*>(array.data) + offset : buffer;
}

template <typename Real>
PDP_INLINE void store(const Real* values, Array array, int64_t offset, int count) {
  if (array.data == nullptr) return;
  visit(array.data, array.type, [&](const auto* data) PDP_LAMBDA {
    using Stored = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    if constexpr (!std::is_same_v<Stored, Real>) {
      Stored* results = static_cast<Stored*>(array.data) + offset;
      for (int i = 0; i < count; ++i) narrow(values[i], results[i]);
    }
  });
}

template <typename Real, bool kRelative>
PDP_INLINE void forward(Mask<Real, kRelative> at, Array weight, Array w_hat, Array mask,
                        int64_t begin, int64_t end) {
  Real weight_buffer[kBlock], w_hat_buffer[kBlock], mask_buffer[kBlock];
  for (int64_t offset = begin; offset < end; offset += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - offset));
    const Real* values = load(weight, offset, count, weight_buffer);
    Real* w_hat_values = destination(w_hat, offset, w_hat_buffer);
    Real* mask_values = destination(mask, offset, mask_buffer);
    forward_block(at, values, w_hat_values, mask_values, count);
    store(w_hat_values, w_hat, offset, count);
    store(mask_values, mask, offset, count);
  }
}

template <typename Real, bool kRelative>
PDP_INLINE void backward(Mask<Real, kRelative> at, Array grad_w_hat, Array grad_mask, Array weight,
                         Array grad, int64_t begin, int64_t end) {
  Real gradient_buffer[kBlock], weight_buffer[kBlock], result_buffer[kBlock];
  for (int64_t offset = begin; offset < end; offset += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - offset));
    const Real* values = load(weight, offset, count, weight_buffer);
    Real* results = destination(grad, offset, result_buffer);
    if (grad_w_hat.data != nullptr) {
      backward_block(at, load(grad_w_hat, offset, count, gradient_buffer), values, results, count);
    } else {
      std::fill_n(results, count, Real(0));
    }
    if (grad_mask.data != nullptr) {
      add_mask_gradient(at, load(grad_mask, offset, count, gradient_buffer), values, results,
                        count);
    }
    store(results, grad, offset, count);
  }
}

struct Forward {
  Array weight, w_hat, mask;
  template <typename Real, bool kRelative>
  PDP_INLINE void operator()(Mask<Real, kRelative> at, int64_t begin, int64_t end) const {
    forward(at, weight, w_hat, mask, begin, end);
  }
};

struct Backward {
  Array grad_w_hat, grad_mask, weight, grad;
  template <typename Real, bool kRelative>
  PDP_INLINE void operator()(Mask<Real, kRelative> at, int64_t begin, int64_t end) const {
    backward(at, grad_w_hat, grad_mask, weight, grad, begin, end);
  }
};

template <typename Real, typename Pass>
PDP_INLINE void run_range(const Pass& pass, const void* threshold, const void* tau, bool relative,
                          int64_t begin, int64_t end) {
  const Real t = *static_cast<const Real*>(threshold);
  const Real temperature = *static_cast<const Real*>(tau);
  if (relative) {
    pass(Mask<Real, true>(t, temperature), begin, end);
  } else {
    pass(Mask<Real, false>(t, temperature), begin, end);
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

}  // namespace

void soft_mask(Array weight, const void* threshold, const void* tau, bool relative, Array w_hat,
               Array mask, int64_t numel, ParallelFor parallel_for) {
  const Forward pass{weight, w_hat, mask};
  const auto run = weight.type == WeightType::kFloat64 ? forward_double : forward_float;
  parallel_for(numel, kGrain, [&](int64_t begin, int64_t end) {
    run(pass, threshold, tau, relative, begin, end);
  });
}

void soft_mask_backward(Array grad_w_hat, Array grad_mask, Array weight, const void* threshold,
                        const void* tau, bool relative, Array grad, int64_t numel,
                        ParallelFor parallel_for) {
  const Backward pass{grad_w_hat, grad_mask, weight, grad};
  const auto run = weight.type == WeightType::kFloat64 ? backward_double : backward_float;
  parallel_for(numel, kGrain, [&](int64_t begin, int64_t end) {
    run(pass, threshold, tau, relative, begin, end);
  });
}

}  // namespace pdp::cpu
