#include "soft_mask_channel.h"

#include <algorithm>
#include <vector>

#include "../mask_math.h"

namespace pdp::cpu {
namespace {

// Elements worked on at a time: the converted copies of three arrays stay in a 32 KiB L1.
constexpr int kBlock = 1024;

// The fewest elements worth a thread.
constexpr int64_t kGrain = 16384;

// Elements of a chunk. The sums of chunks are added in order, so that a result does not depend on
// the number of threads.
constexpr int64_t kChunk = 32768;

// The fewest outer rows of a chunk that has all channels, and the most such chunks: each has a sum
// for every channel. The number of rows does not depend on the number of channels, so that a shard
// of channels gets the sums that they have in the global weight.
constexpr int64_t kChunkRows = 8;
constexpr int64_t kMaxRowChunks = 64;

// A channel has short runs if fewer of its elements are neighbours: see columns_of.
constexpr int64_t kShortRun = 64;

// Independent sums, for the latency of an addition.
constexpr int kLanes = 16;

// From this many channels on, a thread handles entire channels.
constexpr int64_t kMinChannelsApart = 64;

// Returns the sum of a b in double, where the product of two floats is exact and no square of a
// float overflows.
template <typename Real>
PDP_INLINE double dot(const Real* a, const Real* b, int count) {
  double lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    prefetch_ahead(a + i, kLanes);
    if (a != b) prefetch_ahead(b + i, kLanes);
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += static_cast<double>(a[i + lane]) * static_cast<double>(b[i + lane]);
    }
  }
  double sum = 0;
  for (; i < count; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return add_lanes(lanes) + sum;
}

// Calls body(offset in memory, channel, length) for spans of [begin, end) of the storage:
// neighbours of one channel, or neighbouring channels of one element each (inner == 1).
template <typename Body>
PDP_INLINE void for_each_span(ChannelLayout layout, int64_t begin, int64_t end, const Body& body) {
  const bool alone = layout.inner == 1;
  const int64_t period = alone ? layout.channels : layout.inner;
  for (int64_t offset = begin; offset < end;) {
    const int64_t inside = offset % period;
    const int64_t length = std::min({end - offset, period - inside, int64_t{kBlock}});
    body(offset, alone ? inside : offset / period % layout.channels, static_cast<int>(length));
    offset += length;
  }
}

struct Products {
  Array a, b;
  ChannelLayout layout;

  // Returns the sum over the elements [begin, end) of a channel; outer == 1.
  template <typename Real>
  PDP_INLINE double run(int64_t channel, int64_t begin, int64_t end) const {
    Real buffers[2][kBlock];
    double sum = 0;
    for (int64_t i = begin; i < end; i += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, end - i));
      const int64_t offset = channel * layout.inner + i;
      const Real* left = load(a, offset, count, buffers[0]);
      const Real* right = a.data == b.data ? left : load(b, offset, count, buffers[1]);
      sum += dot(left, right, count);
    }
    return sum;
  }

  // Adds the elements of the outer rows [begin, end) to the sums of their channels.
  template <typename Real>
  PDP_INLINE void rows(int64_t begin, int64_t end, double* sums) const {
    Real buffers[2][kBlock];
    const int64_t row = layout.channels * layout.inner;
    for_each_span(layout, begin * row, end * row,
                  [&](int64_t offset, int64_t channel, int length) PDP_LAMBDA {
                    const Real* left = load(a, offset, length, buffers[0]);
                    const Real* right =
                        a.data == b.data ? left : load(b, offset, length, buffers[1]);
                    if (layout.inner > 1) {
                      sums[channel] += dot(left, right, length);
                      return;
                    }
                    double* __restrict own = sums + channel;
                    for (int i = 0; i < length; ++i) {
                      own[i] += static_cast<double>(left[i]) * static_cast<double>(right[i]);
                    }
                  });
  }
};

// target_clones takes functions, not templates.
PDP_MULTIVERSION double run_float(const Products& products, int64_t channel, int64_t begin,
                                  int64_t end) {
  return products.run<float>(channel, begin, end);
}
PDP_MULTIVERSION double run_double(const Products& products, int64_t channel, int64_t begin,
                                   int64_t end) {
  return products.run<double>(channel, begin, end);
}
PDP_MULTIVERSION void rows_float(const Products& products, int64_t begin, int64_t end,
                                 double* sums) {
  products.rows<float>(begin, end, sums);
}
PDP_MULTIVERSION void rows_double(const Products& products, int64_t begin, int64_t end,
                                  double* sums) {
  products.rows<double>(begin, end, sums);
}

template <typename Real>
double run(const Products& products, int64_t channel, int64_t begin, int64_t end) {
  return std::is_same_v<Real, double> ? run_double(products, channel, begin, end)
                                      : run_float(products, channel, begin, end);
}

// Returns the sum of a b over one channel, in the chunks of channel_products; outer == 1.
template <typename Real>
double channel_product(const Products& products, int64_t channel) {
  double sum = 0;
  for (int64_t begin = 0; begin < products.layout.inner; begin += kChunk) {
    sum += run<Real>(products, channel, begin, std::min(begin + kChunk, products.layout.inner));
  }
  return sum;
}

// Elements of short runs (the 9 weights of a 3 x 3 kernel) are handled as channels of their own, so
// that loops run along entire rows.
bool has_short_runs(ChannelLayout layout) {
  return layout.outer > 1 && layout.inner > 1 && layout.inner < kShortRun;
}

ChannelLayout columns_of(ChannelLayout layout) {
  return {layout.outer, layout.channels * layout.inner, 1};
}

// Returns the sum of a b over every channel.
std::vector<double> channel_products(const Products& products, bool is_double,
                                     ParallelFor parallel_for) {
  const ChannelLayout layout = products.layout;
  std::vector<double> sums(layout.channels);
  if (layout.numel() == 0) return sums;
  if (has_short_runs(layout)) {
    const Products columns{products.a, products.b, columns_of(layout)};
    const std::vector<double> of_columns = channel_products(columns, is_double, parallel_for);
    for (size_t i = 0; i < of_columns.size(); ++i) sums[i / layout.inner] += of_columns[i];
    return sums;
  }
  // outer == 1: chunks of one channel each. Else: chunks of entire rows, for all channels at once.
  const bool in_runs = layout.outer == 1;
  const int64_t row = layout.channels * layout.inner;
  const int64_t step = in_runs ? kChunk : std::max(kChunkRows, layout.outer / kMaxRowChunks);
  const int64_t length = in_runs ? layout.inner : layout.outer;
  const int64_t chunks = (length + step - 1) / step;
  std::vector<double> partial(chunks * layout.channels);
  if (in_runs) {
    const auto run = is_double ? run_double : run_float;
    parallel_for(layout.channels * chunks, std::max<int64_t>(1, kGrain / std::min(step, length)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t item = begin; item < end; ++item) {
                     const int64_t first = item % chunks * step;
                     partial[item % chunks * layout.channels + item / chunks] =
                         run(products, item / chunks, first, std::min(first + step, length));
                   }
                 });
  } else {
    const auto rows = is_double ? rows_double : rows_float;
    parallel_for(chunks, std::max<int64_t>(1, kGrain / (step * row)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t chunk = begin; chunk < end; ++chunk) {
                     rows(products, chunk * step, std::min((chunk + 1) * step, length),
                          &partial[chunk * layout.channels]);
                   }
                 });
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t c = 0; c < layout.channels; ++c) sums[c] += partial[chunk * layout.channels + c];
  }
  return sums;
}

// Eq. 1 and 2 for norms. In double for every weight type: each is needed once per channel only, and
// 2/tau alone overflows float for a relative temperature in a layer of small weights.
template <typename Real, bool kRelative>
struct NormMask {
  const Real* norms;
  SoftMask<double, kRelative> at;

  explicit NormMask(const ChannelMask& given)
      : norms(static_cast<const Real*>(given.norms)),
        at(*static_cast<const Real*>(given.threshold), *static_cast<const Real*>(given.tau)) {}

  // dW_c = mask g_c + coefficient d W_c, where d is the gradient with respect to the channel's
  // mask, over the fan-in if the norms are rms. A subnormal float mask is flushed: see flush.h.
  Real mask(int64_t channel) const {
    const Real m = static_cast<Real>(at.value(norms[channel]));
    return std::is_same_v<Real, float> && m < FLT_MIN ? 0 : m;
  }
  double coefficient(int64_t channel) const {
    const double norm = norms[channel];
    // The norm of a channel of zeros has no derivative: no gradient passes through it.
    return norm == 0 ? 0 : at.mask_slope(norm) / norm;
  }
};

// Returns the power of two by which a channel is multiplied before its coefficient, which is
// divided by it: the coefficient alone may be out of float's range where its product is not. In
// double the norm goes out of range first.
float lift_of(float norm) { return power_of_two(norm); }
double lift_of(double) { return 1; }

// The factors of every channel.
template <typename Real>
struct Factors {
  std::vector<Real> left, right, lift;
};

// result = left x + right (lift y), or one of the products where x or y is not given.
struct Combine {
  Array x, y, result;
  ChannelLayout layout;

  template <typename Real>
  PDP_INLINE void range(const Factors<Real>& factors, int64_t begin, int64_t end) const {
    if (layout.inner == 1) {
      range<Real, true>(factors, begin, end);
    } else {
      range<Real, false>(factors, begin, end);
    }
  }

  template <typename Real, bool kAlone>
  PDP_INLINE void range(const Factors<Real>& factors, int64_t begin, int64_t end) const {
    Real buffers[3][kBlock];
    const Real *left = factors.left.data(), *right = factors.right.data();
    const Real* lift = factors.lift.data();
    for_each_span(layout, begin, end, [&](int64_t offset, int64_t channel, int length) PDP_LAMBDA {
      Real* __restrict results = destination(result, offset, buffers[2]);
      const Real *lefts = left + channel, *rights = right + channel, *lifts = lift + channel;
      const Real* xs = x.data == nullptr ? nullptr : load(x, offset, length, buffers[0]);
      const Real* ys = y.data == nullptr ? nullptr : load(y, offset, length, buffers[1]);
      if (ys == nullptr) {
        for (int i = 0; i < length; ++i) results[i] = lefts[kAlone ? i : 0] * xs[i];
      } else if (xs == nullptr) {
        for (int i = 0; i < length; ++i) {
          results[i] = rights[kAlone ? i : 0] * (lifts[kAlone ? i : 0] * ys[i]);
        }
      } else {
        for (int i = 0; i < length; ++i) {
          results[i] = lefts[kAlone ? i : 0] * xs[i] +
                       rights[kAlone ? i : 0] * (lifts[kAlone ? i : 0] * ys[i]);
        }
      }
      store(results, buffers[2], result, offset, length);
    });
  }
};

PDP_MULTIVERSION void combine_range(const Combine& combine, const Factors<float>& factors,
                                    int64_t begin, int64_t end) {
  combine.range(factors, begin, end);
}
PDP_MULTIVERSION void combine_range(const Combine& combine, const Factors<double>& factors,
                                    int64_t begin, int64_t end) {
  combine.range(factors, begin, end);
}

template <typename Real>
std::vector<Real> repeat(const std::vector<Real>& values, int64_t times) {
  std::vector<Real> repeated;
  repeated.reserve(values.size() * times);
  for (const Real value : values) repeated.insert(repeated.end(), times, value);
  return repeated;
}

template <typename Real>
void combine_all(Combine combine, const Factors<Real>& factors, ParallelFor parallel_for) {
  if (has_short_runs(combine.layout)) {
    const int64_t times = combine.layout.inner;
    combine.layout = columns_of(combine.layout);
    const Factors<Real> of_columns{repeat(factors.left, times), repeat(factors.right, times),
                                   repeat(factors.lift, times)};
    return combine_all(combine, of_columns, parallel_for);
  }
  parallel_for(combine.layout.numel(), kGrain,
               [&](int64_t begin, int64_t end) { combine_range(combine, factors, begin, end); });
}

template <typename Real, bool kRelative>
void forward(Array weight, const ChannelMask& given, ChannelLayout layout, Array w_hat, Array mask,
             ParallelFor parallel_for) {
  const NormMask<Real, kRelative> norm_mask(given);
  std::vector<Real> masks(layout.channels);
  for (int64_t c = 0; c < layout.channels; ++c) masks[c] = norm_mask.mask(c);
  write(masks.data(), mask, 0, static_cast<int>(layout.channels));
  combine_all(Combine{weight, {nullptr, weight.type}, w_hat, layout},
              Factors<Real>{masks, masks, masks}, parallel_for);
}

template <typename Real, bool kRelative>
void backward(Array grad_w_hat, Array grad_mask, Array weight, const ChannelMask& given,
              ChannelLayout layout, bool rms, Array grad, ParallelFor parallel_for) {
  const NormMask<Real, kRelative> norm_mask(given);
  const bool through_w_hat = grad_w_hat.data != nullptr;
  std::vector<Real> own(layout.channels);
  Factors<Real> factors{own, own, own};
  if (grad_mask.data != nullptr) read(grad_mask, 0, static_cast<int>(layout.channels), own.data());
  const auto find = [&](int64_t c, double product) {
    const double through_mask = (product + own[c]) / (rms ? layout.weights_per_channel() : 1);
    factors.left[c] = norm_mask.mask(c);
    factors.lift[c] = lift_of(norm_mask.norms[c]);
    factors.right[c] = static_cast<Real>(norm_mask.coefficient(c) * through_mask / factors.lift[c]);
  };
  const Products products{grad_w_hat, weight, layout};
  const Combine combine{grad_w_hat, weight, grad, layout};
  if (through_w_hat && layout.outer == 1 && layout.channels >= kMinChannelsApart) {
    // A channel is one run: its second read comes from the cache.
    parallel_for(layout.channels, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, layout.inner)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t c = begin; c < end; ++c) {
                     find(c, channel_product<Real>(products, c));
                     combine_range(combine, factors, c * layout.inner, (c + 1) * layout.inner);
                   }
                 });
    return;
  }
  std::vector<double> sums(layout.channels);
  if (through_w_hat) {
    sums = channel_products(products, std::is_same_v<Real, double>, parallel_for);
  }
  for (int64_t c = 0; c < layout.channels; ++c) find(c, sums[c]);
  combine_all(combine, factors, parallel_for);
}

}  // namespace

void channel_norms(Array weight, ChannelLayout layout, bool rms, void* norms,
                   ParallelFor parallel_for) {
  const bool is_double = weight.type == WeightType::kFloat64;
  const std::vector<double> squares =
      channel_products({weight, weight, layout}, is_double, parallel_for);
  for (int64_t c = 0; c < layout.channels; ++c) {
    const double norm = std::sqrt(squares[c] / (rms ? layout.weights_per_channel() : 1));
    if (is_double) {
      static_cast<double*>(norms)[c] = norm;
    } else {
      static_cast<float*>(norms)[c] = static_cast<float>(norm);
    }
  }
}

void soft_mask_channel(Array weight, ChannelMask given, ChannelLayout layout, Array w_hat,
                       Array mask, ParallelFor parallel_for) {
  const bool is_double = weight.type == WeightType::kFloat64;
  const auto run = given.relative ? is_double ? forward<double, true> : forward<float, true>
                   : is_double    ? forward<double, false>
                                  : forward<float, false>;
  run(weight, given, layout, w_hat, mask, parallel_for);
}

void soft_mask_channel_backward(Array grad_w_hat, Array grad_mask, Array weight, ChannelMask given,
                                ChannelLayout layout, bool rms, Array grad,
                                ParallelFor parallel_for) {
  const bool is_double = weight.type == WeightType::kFloat64;
  const auto run = given.relative ? is_double ? backward<double, true> : backward<float, true>
                   : is_double    ? backward<double, false>
                                  : backward<float, false>;
  run(grad_w_hat, grad_mask, weight, given, layout, rms, grad, parallel_for);
}

}  // namespace pdp::cpu
