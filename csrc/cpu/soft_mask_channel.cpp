#include "soft_mask_channel.h"

#include <algorithm>
#include <vector>

#include "mask_math.h"

namespace pdp::cpu {
namespace {

// Elements worked on at a time: the converted copies of three arrays stay in a 32 KiB L1.
constexpr int kBlock = 1024;

// Fewest elements worth a thread.
constexpr int64_t kGrain = 16384;

// Sums are cut into pieces of this many elements, added up in order, so that a result does not
// depend on the number of threads.
constexpr int64_t kPiece = 32768;

// Of rows of all channels a piece has this many at least, and there are no more pieces than that:
// each has a sum for every channel. How many rows does not depend on the number of channels, so
// that the part of them that another rank holds gets the same sums there.
constexpr int64_t kPieceRows = 8;
constexpr int64_t kMostRowPieces = 64;

// Of a channel's neighbours fewer are a short run: see columns_of.
constexpr int64_t kShortRun = 64;

// Independent sums, for the latency of an addition.
constexpr int kLanes = 16;

// From this many channels on they are shared out among threads whole.
constexpr int64_t kFewestRows = 64;

// sum of a b in double: products of two floats are exact in it, so that only their sum rounds, and
// no square leaves its range.
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

// Calls body(offset in memory, channel, length) for the stretches of [begin, end) of the storage:
// one channel's neighbours, or neighbouring channels where each is alone (inner == 1).
template <typename Body>
PDP_INLINE void for_each_stretch(ChannelLayout layout, int64_t begin, int64_t end,
                                 const Body& body) {
  const bool alone = layout.inner == 1;
  const int64_t span = alone ? layout.channels : layout.inner;
  for (int64_t offset = begin; offset < end;) {
    const int64_t inside = offset % span;
    const int64_t length = std::min({end - offset, span - inside, int64_t{kBlock}});
    body(offset, alone ? inside : offset / span % layout.channels, static_cast<int>(length));
    offset += length;
  }
}

struct Products {
  Array a, b;
  ChannelLayout layout;

  // The sum of one channel's elements in [begin, end) of its own run; outer == 1.
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
    for_each_stretch(layout, begin * row, end * row,
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

// The sum of a b over one channel, in the pieces of channel_products; outer == 1.
template <typename Real>
double whole_channel(const Products& products, int64_t channel) {
  double sum = 0;
  for (int64_t begin = 0; begin < products.layout.inner; begin += kPiece) {
    sum += run<Real>(products, channel, begin, std::min(begin + kPiece, products.layout.inner));
  }
  return sum;
}

// Short runs of a channel (the 9 weights of a 3 x 3 kernel) are worked on as columns of their own,
// so that loops go along whole rows.
bool has_short_runs(ChannelLayout layout) {
  return layout.outer > 1 && layout.inner > 1 && layout.inner < kShortRun;
}

ChannelLayout columns_of(ChannelLayout layout) {
  return {layout.outer, layout.channels * layout.inner, 1};
}

// The sum of a b over every channel.
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
  // outer == 1: pieces of one channel each. Else: pieces of whole rows, for all channels at once.
  const bool in_runs = layout.outer == 1;
  const int64_t row = layout.channels * layout.inner;
  const int64_t step = in_runs ? kPiece : std::max(kPieceRows, layout.outer / kMostRowPieces);
  const int64_t length = in_runs ? layout.inner : layout.outer;
  const int64_t pieces = (length + step - 1) / step;
  std::vector<double> partial(pieces * layout.channels);
  if (in_runs) {
    const auto run = is_double ? run_double : run_float;
    parallel_for(layout.channels * pieces, std::max<int64_t>(1, kGrain / std::min(step, length)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t item = begin; item < end; ++item) {
                     const int64_t first = item % pieces * step;
                     partial[item % pieces * layout.channels + item / pieces] =
                         run(products, item / pieces, first, std::min(first + step, length));
                   }
                 });
  } else {
    const auto rows = is_double ? rows_double : rows_float;
    parallel_for(pieces, std::max<int64_t>(1, kGrain / (step * row)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t piece = begin; piece < end; ++piece) {
                     rows(products, piece * step, std::min((piece + 1) * step, length),
                          &partial[piece * layout.channels]);
                   }
                 });
  }
  for (int64_t piece = 0; piece < pieces; ++piece) {
    for (int64_t c = 0; c < layout.channels; ++c) sums[c] += partial[piece * layout.channels + c];
  }
  return sums;
}

// Eq. 1 and 2 at norms, in double whatever the weights are: there is one of each per channel, and
// 2/tau alone overflows float for a relative temperature in a layer of small weights.
template <typename Real, bool kRelative>
struct NormMask {
  const Real* norms;
  Mask<double, kRelative> at;

  explicit NormMask(const ChannelMask& given)
      : norms(static_cast<const Real*>(given.norms)),
        at(*static_cast<const Real*>(given.threshold),
           Temperature<double>(*static_cast<const Real*>(given.tau))) {}

  // What dW_c = mask g_c + pull W_c has of mask and, for a gradient of 1 through the mask, of pull.
  double mask(int64_t channel) const { return at.value(norms[channel]); }
  double pull(int64_t channel) const {
    const double norm = norms[channel];
    // A channel of zeros, whose norm has no derivative, gets none through its norm.
    return norm == 0 ? 0 : at.mask_gradient(norm) / norm;
  }
};

// result = left x + right y with factors of every channel; without y, result = left x.
struct Combine {
  Array x, y, result;
  ChannelLayout layout;

  template <typename Real>
  PDP_INLINE void range(const Real* left, const Real* right, int64_t begin, int64_t end) const {
    if (layout.inner == 1) {
      range<Real, true>(left, right, begin, end);
    } else {
      range<Real, false>(left, right, begin, end);
    }
  }

  template <typename Real, bool kAlone>
  PDP_INLINE void range(const Real* left, const Real* right, int64_t begin, int64_t end) const {
    Real buffers[3][kBlock];
    for_each_stretch(
        layout, begin, end, [&](int64_t offset, int64_t channel, int length) PDP_LAMBDA {
          const Real* xs = load(x, offset, length, buffers[0]);
          Real* __restrict results = destination(result, offset, buffers[2]);
          const Real* lefts = left + channel;
          if (y.data == nullptr) {
            for (int i = 0; i < length; ++i) results[i] = lefts[kAlone ? i : 0] * xs[i];
          } else {
            const Real* ys = load(y, offset, length, buffers[1]);
            const Real* rights = right + channel;
            for (int i = 0; i < length; ++i) {
              results[i] = lefts[kAlone ? i : 0] * xs[i] + rights[kAlone ? i : 0] * ys[i];
            }
          }
          store(results, buffers[2], result, offset, length);
        });
  }
};

PDP_MULTIVERSION void combine_float(const Combine& combine, const float* left, const float* right,
                                    int64_t begin, int64_t end) {
  combine.range<float>(left, right, begin, end);
}
PDP_MULTIVERSION void combine_double(const Combine& combine, const double* left,
                                     const double* right, int64_t begin, int64_t end) {
  combine.range<double>(left, right, begin, end);
}

void combine_range(const Combine& combine, const float* left, const float* right, int64_t begin,
                   int64_t end) {
  combine_float(combine, left, right, begin, end);
}
void combine_range(const Combine& combine, const double* left, const double* right, int64_t begin,
                   int64_t end) {
  combine_double(combine, left, right, begin, end);
}

template <typename Real>
std::vector<Real> repeat(const std::vector<Real>& values, int64_t times) {
  std::vector<Real> repeated;
  repeated.reserve(values.size() * times);
  for (const Real value : values) repeated.insert(repeated.end(), times, value);
  return repeated;
}

template <typename Real>
void combine_all(Combine combine, const std::vector<Real>& left, const std::vector<Real>& right,
                 ParallelFor parallel_for) {
  if (has_short_runs(combine.layout)) {
    const int64_t times = combine.layout.inner;
    combine.layout = columns_of(combine.layout);
    return combine_all(combine, repeat(left, times), repeat(right, times), parallel_for);
  }
  parallel_for(combine.layout.numel(), kGrain, [&](int64_t begin, int64_t end) {
    combine_range(combine, left.data(), right.data(), begin, end);
  });
}

template <typename Real, bool kRelative>
void forward(Array weight, const ChannelMask& given, ChannelLayout layout, Array w_hat, Array mask,
             ParallelFor parallel_for) {
  const NormMask<Real, kRelative> norm_mask(given);
  std::vector<Real> masks(layout.channels);
  for (int64_t c = 0; c < layout.channels; ++c) masks[c] = static_cast<Real>(norm_mask.mask(c));
  write(masks.data(), mask, 0, static_cast<int>(layout.channels));
  combine_all(Combine{weight, {nullptr, weight.type}, w_hat, layout}, masks, masks, parallel_for);
}

template <typename Real, bool kRelative>
void backward(Array grad_w_hat, Array grad_mask, Array weight, const ChannelMask& given,
              ChannelLayout layout, bool rms, Array grad, ParallelFor parallel_for) {
  const NormMask<Real, kRelative> norm_mask(given);
  const bool through_w_hat = grad_w_hat.data != nullptr;
  std::vector<Real> masks(layout.channels), pulls(layout.channels), own(layout.channels);
  if (grad_mask.data != nullptr) read(grad_mask, 0, static_cast<int>(layout.channels), own.data());
  const auto find = [&](int64_t c, double product) {
    const double through_mask = (product + own[c]) / (rms ? layout.weights_per_channel() : 1);
    masks[c] = static_cast<Real>(norm_mask.mask(c));
    pulls[c] = static_cast<Real>(norm_mask.pull(c) * through_mask);
  };
  const Products products{grad_w_hat, weight, layout};
  const Combine combine = through_w_hat ? Combine{grad_w_hat, weight, grad, layout}
                                        : Combine{weight, {nullptr, weight.type}, grad, layout};
  if (through_w_hat && layout.outer == 1 && layout.channels >= kFewestRows) {
    // A channel is one run: its second reading comes from the cache.
    parallel_for(layout.channels, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, layout.inner)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t c = begin; c < end; ++c) {
                     find(c, whole_channel<Real>(products, c));
                     combine_range(combine, masks.data(), pulls.data(), c * layout.inner,
                                   (c + 1) * layout.inner);
                   }
                 });
    return;
  }
  std::vector<double> sums(layout.channels);
  if (through_w_hat) {
    sums = channel_products(products, std::is_same_v<Real, double>, parallel_for);
  }
  for (int64_t c = 0; c < layout.channels; ++c) find(c, sums[c]);
  combine_all(combine, through_w_hat ? masks : pulls, pulls, parallel_for);
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
