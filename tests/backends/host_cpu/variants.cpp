// The CPU kernels behind C functions over raw pointers, compiled for the instruction set level of
// the command line. Types are numbered as in pdp::WeightType.
#include <string_view>
#include <vector>

namespace {

// The x86-64 level of this machine's CPU: 1 (any), 3 or 4.
int level_of_this_cpu() {
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("fma");
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return !v3 ? 1 : v4 ? 4 : 3;
}

constexpr bool compiled_for(std::string_view feature) {
#if defined(__AVX512F__)
  return true;
#elif defined(__AVX2__)
  return feature.substr(0, 6) != "avx512";
#else
  return false;
#endif
}

}  // namespace

// gather.cpp then chooses what the level has, not what the CPU has.
#define __builtin_cpu_supports(feature) compiled_for(feature)

#include "../../../csrc/cpu/compress.cpp"
#include "../../../csrc/cpu/digit_counts.h"
#include "../../../csrc/cpu/gather.cpp"
#include "../../../csrc/cpu/hard_mask.cpp"
#include "../../../csrc/cpu/power_sums.cpp"
#include "../../../csrc/cpu/radix_select.cpp"
#include "../../../csrc/cpu/soft_mask.cpp"
#include "../../../csrc/cpu/soft_mask_channel.h"
#include "../../../csrc/cpu/soft_mask_nm.h"

namespace {

using namespace pdp::cpu;
using pdp::narrow;
using pdp::WeightType;
using pdp::widen;

// Two ranges, the later one first: results must not depend on where a range begins, nor on the
// order.
void two_ranges(int64_t count, int64_t, const RangeBody& body) {
  const int64_t middle = count / 2;
  if (middle < count) body(middle, count);
  if (middle > 0) body(0, middle);
}

Array array(void* data, int64_t type) { return {data, static_cast<WeightType>(type)}; }

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int cpu_level() { return level_of_this_cpu(); }

int gather_variant(int64_t variant, const float* data, int64_t count, int64_t low, int64_t high,
                   uint32_t* keys, int64_t* below) {
  const GatherFloat variants[] = {gather_portable<float, uint32_t>, gather_avx2, gather_avx512};
  return variants[variant](data, static_cast<int>(count), static_cast<uint32_t>(low),
                           static_cast<uint32_t>(high), keys, below);
}

void convert(const void* source, int64_t source_type, void* result, int64_t result_type,
             int64_t count) {
  visit(source, static_cast<WeightType>(source_type), [&](const auto* from) {
    visit(result, static_cast<WeightType>(result_type), [&](const auto* to) {
      auto* results = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(to)>>*>(to);
      for (int64_t i = 0; i < count; ++i) narrow(widen(from[i]), results[i]);
    });
  });
}

void thresholds(int64_t count, const void* const* data, const int64_t* numel, const int64_t* types,
                const int64_t* k, double* results) {
  std::vector<Weight> weights(count);
  for (int64_t i = 0; i < count; ++i) {
    weights[i] = {data[i], numel[i], static_cast<WeightType>(types[i])};
  }
  const std::vector<OrderStatistics> found = radix_select(weights, k, two_ranges);
  for (int64_t i = 0; i < count; ++i) {
    visit(data[i], weights[i].type, [&](const auto* typed) {
      using Stored = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
      results[i] = pdp::threshold_between<Stored>(found[i].kth, found[i].next, k[i], numel[i]);
    });
  }
}

void digit_counts(int64_t count, const void* const* data, const int64_t* numel,
                  const int64_t* types, const int64_t* prefixes, int64_t weight_bytes,
                  int64_t digit, int64_t* counts, int64_t* above) {
  std::vector<Weight> weights;
  for (int64_t i = 0; i < count; ++i) {
    weights.push_back({data[i], numel[i], static_cast<WeightType>(types[i])});
  }
  pdp::cpu::digit_counts(weights, prefixes, pdp::key_digits(weight_bytes).digit(digit), counts,
                         above, two_ranges);
}

void hard_mask(const void* weight, int64_t type, int64_t numel, int64_t k, bool* kept) {
  pdp::cpu::hard_mask({weight, numel, static_cast<WeightType>(type)}, k, kept, two_ranges);
}

void soft_mask(void* weight, int64_t type, const void* threshold, const void* tau, int64_t relative,
               void* w_hat, void* mask, int64_t out_type, int64_t numel) {
  const MaskedWeight one{array(weight, type),   threshold, tau, array(w_hat, out_type),
                         array(mask, out_type), numel};
  pdp::cpu::soft_mask({one}, relative, two_ranges);
}

void soft_mask_backward(void* grad_w_hat, void* grad_mask, int64_t grad_type, void* weight,
                        int64_t type, const void* threshold, const void* tau, int64_t relative,
                        void* grad, int64_t numel) {
  const MaskedGradient one{array(grad_w_hat, grad_type),
                           array(grad_mask, grad_type),
                           array(weight, type),
                           threshold,
                           tau,
                           array(grad, type),
                           numel};
  pdp::cpu::soft_mask_backward({one}, relative, two_ranges);
}

void soft_mask_nm(void* weight, int64_t type, const void* tau, int64_t members, int64_t stride,
                  int64_t pruned, int64_t relative, void* w_hat, void* mask, int64_t out_type,
                  int64_t numel) {
  pdp::cpu::soft_mask_nm(array(weight, type), tau, {static_cast<int>(members), stride}, pruned,
                         relative, array(w_hat, out_type), array(mask, out_type), numel,
                         two_ranges);
}

void soft_mask_nm_backward(void* grad_w_hat, void* grad_mask, int64_t grad_type, void* weight,
                           int64_t type, const void* tau, int64_t members, int64_t stride,
                           int64_t pruned, int64_t relative, void* grad, int64_t numel) {
  pdp::cpu::soft_mask_nm_backward(array(grad_w_hat, grad_type), array(grad_mask, grad_type),
                                  array(weight, type), tau, {static_cast<int>(members), stride},
                                  pruned, relative, array(grad, type), numel, two_ranges);
}

void hard_mask_nm(void* weight, int64_t type, int64_t members, int64_t stride, int64_t pruned,
                  bool* kept, int64_t numel) {
  pdp::cpu::hard_mask_nm(array(weight, type), {static_cast<int>(members), stride}, pruned, kept,
                         numel, two_ranges);
}

void channel_norms(void* weight, int64_t type, int64_t outer, int64_t channels, int64_t inner,
                   int64_t rms, void* norms) {
  pdp::cpu::channel_norms(array(weight, type), {outer, channels, inner}, rms, norms, two_ranges);
}

void soft_mask_channel(void* weight, int64_t type, const void* norms, const void* threshold,
                       const void* tau, int64_t relative, int64_t outer, int64_t channels,
                       int64_t inner, void* w_hat, void* mask, int64_t out_type) {
  pdp::cpu::soft_mask_channel(array(weight, type), {norms, threshold, tau, relative != 0},
                              {outer, channels, inner}, array(w_hat, out_type),
                              array(mask, out_type), two_ranges);
}

void soft_mask_channel_backward(void* grad_w_hat, void* grad_mask, int64_t grad_type, void* weight,
                                int64_t type, const void* norms, const void* threshold,
                                const void* tau, int64_t relative, int64_t rms, int64_t outer,
                                int64_t channels, int64_t inner, void* grad) {
  pdp::cpu::soft_mask_channel_backward(array(grad_w_hat, grad_type), array(grad_mask, grad_type),
                                       array(weight, type), {norms, threshold, tau, relative != 0},
                                       {outer, channels, inner}, rms, array(grad, type),
                                       two_ranges);
}

void compress_2to4(const void* weight, int64_t type, int64_t rows, int64_t cols, void* values,
                   uint16_t* metadata) {
  pdp::cpu::compress_2to4(weight, static_cast<WeightType>(type), rows, cols, values, metadata,
                          two_ranges);
}

void power_sums(int64_t tensors, void* const* data, const bool* const* kept, const int64_t* rows,
                const int64_t* numel, const int64_t* types, const double* norms,
                pdp::PowerSums* results) {
  std::vector<Rows> all;
  for (int64_t i = 0; i < tensors; ++i) {
    all.push_back({array(data[i], types[i]), kept[i], rows[i], numel[i]});
  }
  pdp::cpu::power_sums(all, norms[0], norms[1], results, two_ranges);
}

}  // extern "C"
#pragma GCC visibility pop
