// The CPU operators: the one file of the CPU module that talks to torch, through its stable ABI.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/version.h>

#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/compress.h"
#include "cpu/digit_counts.h"
#include "cpu/hard_mask.h"
#include "cpu/power_sums.h"
#include "cpu/radix_select.h"
#include "cpu/soft_mask.h"
#include "cpu/soft_mask_channel.h"
#include "cpu/soft_mask_nm.h"
#include "prune_count.h"
#include "tensors.h"

namespace {

using pdp::empty_like;
using pdp::in_order_of;
using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace cpu = pdp::cpu;

void parallel_for(int64_t count, int64_t grain, const cpu::RangeBody& body) {
  torch::stable::parallel_for(0, count, grain, body);
}

cpu::Array array(const Tensor& tensor) { return {tensor.data_ptr(), pdp::weight_type(tensor)}; }

constexpr cpu::Array kNoArray{nullptr, pdp::WeightType::kFloat32};

Tensor prune_counts(std::vector<Tensor> weights, std::vector<double> sparsities) {
  pdp::check_weights(weights, DeviceType::CPU);
  pdp::check_sparsities(weights, sparsities);
  const int64_t count = static_cast<int64_t>(weights.size());
  Tensor counts = torch::stable::empty({count}, ScalarType::Long);
  int64_t* k = counts.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    k[i] = pdp::prune_count(sparsities[i], weights[i].numel());
  }
  return counts;
}

cpu::Weight selectable(const Tensor& weight) {
  return {weight.data_ptr(), weight.numel(), pdp::weight_type(weight)};
}

template <typename Stored>
double threshold(const cpu::OrderStatistics& found, int64_t k, int64_t numel) {
  using Key = typename pdp::Magnitude<Stored>::Key;
  return pdp::threshold_between<Stored>(static_cast<Key>(found.kth), static_cast<Key>(found.next),
                                        k, numel);
}

double threshold(const cpu::Weight& weight, const cpu::OrderStatistics& found, int64_t k) {
  switch (weight.type) {
    case pdp::WeightType::kFloat64:
      return threshold<double>(found, k, weight.numel);
    case pdp::WeightType::kFloat32:
      return threshold<float>(found, k, weight.numel);
    case pdp::WeightType::kBFloat16:
      return threshold<pdp::BFloat16>(found, k, weight.numel);
    default:
      return threshold<pdp::Half>(found, k, weight.numel);
  }
}

Tensor thresholds(std::vector<Tensor> weights, Tensor prune_counts) {
  pdp::check_weights(weights, DeviceType::CPU);
  pdp::check_integers(prune_counts, weights.size(), weights[0], "prune_counts");
  const size_t count = weights.size();
  std::vector<cpu::Weight> selected(count);
  ScalarType dtype = ScalarType::Float;
  for (size_t i = 0; i < count; ++i) {
    // The order of elements does not matter to a selection, so it reads every dense layout as it
    // is.
    if (!pdp::is_dense(weights[i])) weights[i] = torch::stable::contiguous(weights[i]);
    selected[i] = selectable(weights[i]);
    if (weights[i].scalar_type() == ScalarType::Double) dtype = ScalarType::Double;
  }
  const Tensor counts = torch::stable::contiguous(prune_counts);
  const int64_t* k = counts.const_data_ptr<int64_t>();
  const auto found = cpu::radix_select(selected, k, parallel_for);

  Tensor result = torch::stable::empty({static_cast<int64_t>(count)}, dtype);
  for (size_t i = 0; i < count; ++i) {
    const double t = threshold(selected[i], found[i], k[i]);
    if (dtype == ScalarType::Double) {
      result.mutable_data_ptr<double>()[i] = t;
    } else {
      result.mutable_data_ptr<float>()[i] = static_cast<float>(t);
    }
  }
  return result;
}

std::tuple<Tensor, Tensor> digit_counts(std::vector<Tensor> weights, Tensor prefixes,
                                        int64_t digit) {
  pdp::check_weights(weights, DeviceType::CPU);
  pdp::check_integers(prefixes, weights.size(), weights[0], "prefixes");
  pdp::check_digit(weights, digit);
  std::vector<cpu::Weight> selected;
  for (Tensor& weight : weights) {
    if (!pdp::is_dense(weight)) weight = torch::stable::contiguous(weight);
    selected.push_back(selectable(weight));
  }
  const pdp::Digit counted = pdp::key_digits(weights[0].element_size()).digit(digit);
  prefixes = torch::stable::contiguous(prefixes);
  const int64_t count = static_cast<int64_t>(selected.size());
  Tensor counts = torch::stable::empty({count, counted.bins()}, ScalarType::Long);
  Tensor above = torch::stable::empty({count}, ScalarType::Long);
  cpu::digit_counts(selected, prefixes.const_data_ptr<int64_t>(), counted,
                    counts.mutable_data_ptr<int64_t>(), above.mutable_data_ptr<int64_t>(),
                    parallel_for);
  return {counts, above};
}

Tensor hard_mask(Tensor weight, Tensor prune_count) {
  pdp::check_weight(weight, DeviceType::CPU);
  pdp::check_integers(prune_count, 1, weight, "prune_count");
  weight = torch::stable::contiguous(weight);
  Tensor kept = torch::stable::empty(weight.sizes(), ScalarType::Bool);
  cpu::hard_mask(selectable(weight), *prune_count.const_data_ptr<int64_t>(),
                 kept.mutable_data_ptr<bool>(), parallel_for);
  return kept;
}

std::tuple<Tensor, Tensor> soft_mask(Tensor weight, Tensor threshold, Tensor tau, bool relative,
                                     std::optional<ScalarType> out_dtype, bool return_mask) {
  pdp::check_scalar(threshold, weight, "threshold");
  pdp::check_scalar(tau, weight, "tau");
  Tensor w_hat = empty_like(weight, out_dtype.value_or(weight.scalar_type()));
  Tensor mask = return_mask ? torch::stable::empty_like(w_hat)
                            : torch::stable::empty({0}, w_hat.scalar_type());
  const Tensor ordered = in_order_of(w_hat, weight);
  const cpu::MaskedWeight one{array(ordered),
                              threshold.data_ptr(),
                              tau.data_ptr(),
                              array(w_hat),
                              return_mask ? array(mask) : kNoArray,
                              weight.numel()};
  cpu::soft_mask({one}, relative, parallel_for);
  return {w_hat, mask};
}

Tensor soft_mask_backward(std::optional<Tensor> grad_w_hat, std::optional<Tensor> grad_mask,
                          Tensor weight, Tensor threshold, Tensor tau, bool relative) {
  pdp::check_like(grad_w_hat, weight, "grad_w_hat");
  pdp::check_like(grad_mask, weight, "grad_mask");
  pdp::check_scalar(threshold, weight, "threshold");
  pdp::check_scalar(tau, weight, "tau");
  Tensor grad = torch::stable::empty_like(weight);
  const Tensor ordered = in_order_of(grad, weight);
  if (grad_w_hat) grad_w_hat = in_order_of(grad, *grad_w_hat);
  if (grad_mask) grad_mask = in_order_of(grad, *grad_mask);
  const cpu::MaskedGradient one{grad_w_hat ? array(*grad_w_hat) : kNoArray,
                                grad_mask ? array(*grad_mask) : kNoArray,
                                array(ordered),
                                threshold.data_ptr(),
                                tau.data_ptr(),
                                array(grad),
                                weight.numel()};
  cpu::soft_mask_backward({one}, relative, parallel_for);
  return grad;
}

// Returns the address of a value of a table with one dimension and any stride.
const void* address(const Tensor& values, size_t index) {
  const int64_t offset = static_cast<int64_t>(index) * values.stride(0);
  return static_cast<const char*>(values.data_ptr()) +
         offset * static_cast<int64_t>(values.element_size());
}

std::vector<Tensor> soft_mask_list(std::vector<Tensor> weights, Tensor thresholds, Tensor taus,
                                   bool relative, std::optional<ScalarType> out_dtype) {
  pdp::check_mask_list(weights, thresholds, taus, DeviceType::CPU);
  std::vector<Tensor> w_hats;
  std::vector<cpu::MaskedWeight> list;
  for (size_t i = 0; i < weights.size(); ++i) {
    Tensor& weight = weights[i];
    w_hats.push_back(empty_like(weight, out_dtype.value_or(weight.scalar_type())));
    weight = in_order_of(w_hats[i], weight);  // the list keeps a copy alive
    list.push_back({array(weight), address(thresholds, i), address(taus, i), array(w_hats[i]),
                    kNoArray, weight.numel()});
  }
  cpu::soft_mask(list, relative, parallel_for);
  return w_hats;
}

std::vector<Tensor> soft_mask_list_backward(std::vector<std::optional<Tensor>> grads,
                                            std::vector<Tensor> weights, Tensor thresholds,
                                            Tensor taus, bool relative) {
  pdp::check_mask_list(weights, thresholds, taus, DeviceType::CPU);
  pdp::check_gradients(grads, weights);
  std::vector<Tensor> results;
  std::vector<cpu::MaskedGradient> list;
  for (size_t i = 0; i < weights.size(); ++i) {
    Tensor& weight = weights[i];
    if (!grads[i]) {
      results.push_back(torch::stable::empty({0}, weight.scalar_type()));
      continue;
    }
    results.push_back(torch::stable::empty_like(weight));
    weight = in_order_of(results[i], weight);
    grads[i] = in_order_of(results[i], *grads[i]);
    list.push_back({array(*grads[i]), kNoArray, array(weight), address(thresholds, i),
                    address(taus, i), array(results[i]), weight.numel()});
  }
  cpu::soft_mask_backward(list, relative, parallel_for);
  return results;
}

cpu::GroupLayout group_layout(const Tensor& ordered, int64_t members, int64_t dim) {
  // A group of one may be along a dimension of size 1, whose stride is arbitrary.
  return {static_cast<int>(members), members > 1 ? ordered.stride(dim) : 1};
}

std::tuple<Tensor, Tensor> soft_mask_nm(Tensor weight, Tensor tau, int64_t m, Tensor pruned,
                                        int64_t dim, bool relative,
                                        std::optional<ScalarType> out_dtype, bool return_mask) {
  pdp::check_groups(weight, m, pruned, dim);
  pdp::check_scalar(tau, weight, "tau");
  Tensor w_hat = empty_like(weight, out_dtype.value_or(weight.scalar_type()));
  Tensor mask = return_mask ? torch::stable::empty_like(w_hat)
                            : torch::stable::empty({0}, w_hat.scalar_type());
  const Tensor ordered = in_order_of(w_hat, weight);
  cpu::soft_mask_nm(array(ordered), tau.data_ptr(), group_layout(w_hat, m, dim),
                    *pruned.const_data_ptr<int64_t>(), relative, array(w_hat),
                    return_mask ? array(mask) : kNoArray, weight.numel(), parallel_for);
  return {w_hat, mask};
}

Tensor soft_mask_nm_backward(std::optional<Tensor> grad_w_hat, std::optional<Tensor> grad_mask,
                             Tensor weight, Tensor tau, int64_t m, Tensor pruned, int64_t dim,
                             bool relative) {
  pdp::check_like(grad_w_hat, weight, "grad_w_hat");
  pdp::check_like(grad_mask, weight, "grad_mask");
  pdp::check_groups(weight, m, pruned, dim);
  pdp::check_scalar(tau, weight, "tau");
  Tensor grad = torch::stable::empty_like(weight);
  const Tensor ordered = in_order_of(grad, weight);
  if (grad_w_hat) grad_w_hat = in_order_of(grad, *grad_w_hat);
  if (grad_mask) grad_mask = in_order_of(grad, *grad_mask);
  cpu::soft_mask_nm_backward(
      grad_w_hat ? array(*grad_w_hat) : kNoArray, grad_mask ? array(*grad_mask) : kNoArray,
      array(ordered), tau.data_ptr(), group_layout(grad, m, dim), *pruned.const_data_ptr<int64_t>(),
      relative, array(grad), weight.numel(), parallel_for);
  return grad;
}

Tensor hard_mask_nm(Tensor weight, int64_t m, Tensor pruned, int64_t dim) {
  pdp::check_groups(weight, m, pruned, dim);
  Tensor kept = empty_like(weight, ScalarType::Bool);
  const Tensor ordered = in_order_of(kept, weight);
  cpu::hard_mask_nm(array(ordered), group_layout(kept, m, dim), *pruned.const_data_ptr<int64_t>(),
                    kept.mutable_data_ptr<bool>(), weight.numel(), parallel_for);
  return kept;
}

// Returns the layout of a dense tensor.
cpu::ChannelLayout channel_layout(const Tensor& ordered, int64_t dim) {
  const int64_t channels = ordered.size(dim);
  if (ordered.numel() == 0) return {0, channels, 0};
  // The stride of a dimension of size 1 is arbitrary: all weights are of its one channel.
  if (channels == 1) return {1, 1, ordered.numel()};
  const int64_t inner = ordered.stride(dim);
  return {ordered.numel() / (channels * inner), channels, inner};
}

Tensor channel_norms(Tensor weight, int64_t dim, bool rms) {
  pdp::check_dim(weight, dim);
  const Tensor ordered = pdp::is_dense(weight) ? weight : torch::stable::contiguous(weight);
  Tensor norms = torch::stable::empty({weight.size(dim)}, pdp::real_type(weight));
  cpu::channel_norms(array(ordered), channel_layout(ordered, dim), rms, norms.data_ptr(),
                     parallel_for);
  return norms;
}

cpu::ChannelMask channel_mask(const Tensor& norms, const Tensor& threshold, const Tensor& tau,
                              bool relative) {
  return {norms.data_ptr(), threshold.data_ptr(), tau.data_ptr(), relative};
}

std::tuple<Tensor, Tensor> soft_mask_channel(Tensor weight, Tensor norms, Tensor threshold,
                                             Tensor tau, int64_t dim, bool relative,
                                             std::optional<ScalarType> out_dtype) {
  pdp::check_channels(weight, norms, dim);
  pdp::check_scalar(threshold, weight, "threshold");
  pdp::check_scalar(tau, weight, "tau");
  Tensor w_hat = empty_like(weight, out_dtype.value_or(weight.scalar_type()));
  Tensor mask = torch::stable::empty({weight.size(dim)}, w_hat.scalar_type());
  norms = torch::stable::contiguous(norms);
  const Tensor ordered = in_order_of(w_hat, weight);
  cpu::soft_mask_channel(array(ordered), channel_mask(norms, threshold, tau, relative),
                         channel_layout(w_hat, dim), array(w_hat), array(mask), parallel_for);
  return {w_hat, mask};
}

Tensor soft_mask_channel_backward(std::optional<Tensor> grad_w_hat, std::optional<Tensor> grad_mask,
                                  Tensor weight, Tensor norms, Tensor threshold, Tensor tau,
                                  int64_t dim, bool relative, bool rms) {
  pdp::check_like(grad_w_hat, weight, "grad_w_hat");
  pdp::check_channels(weight, norms, dim);
  pdp::check_channel_gradient(grad_mask, weight, dim);
  pdp::check_scalar(threshold, weight, "threshold");
  pdp::check_scalar(tau, weight, "tau");
  Tensor grad = torch::stable::empty_like(weight);
  norms = torch::stable::contiguous(norms);
  const Tensor ordered = in_order_of(grad, weight);
  if (grad_w_hat) grad_w_hat = in_order_of(grad, *grad_w_hat);
  if (grad_mask) grad_mask = torch::stable::contiguous(*grad_mask);
  cpu::soft_mask_channel_backward(grad_w_hat ? array(*grad_w_hat) : kNoArray,
                                  grad_mask ? array(*grad_mask) : kNoArray, array(ordered),
                                  channel_mask(norms, threshold, tau, relative),
                                  channel_layout(grad, dim), rms, array(grad), parallel_for);
  return grad;
}

std::tuple<Tensor, Tensor> compress_2to4(Tensor weight) {
  pdp::check_compressible(weight);
  weight = torch::stable::contiguous(weight);
  const int64_t rows = weight.size(0), cols = weight.size(1);
  Tensor values = torch::stable::empty({rows, cols / 2}, weight.scalar_type());
  Tensor metadata = torch::stable::empty({rows, cols / 16}, ScalarType::Short);
  cpu::compress_2to4(weight.data_ptr(), pdp::weight_type(weight), rows, cols, values.data_ptr(),
                     static_cast<uint16_t*>(metadata.data_ptr()), parallel_for);
  return {values, metadata};
}

Tensor power_sums(std::vector<Tensor> weights, std::vector<std::optional<Tensor>> masks, double p,
                  double q, bool per_row) {
  pdp::check_weights(weights, DeviceType::CPU);
  pdp::check_masks(masks, weights, per_row);
  std::vector<cpu::Rows> tensors;
  int64_t groups = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    pdp::bring_in_order(weights[i], masks[i], per_row);
    tensors.push_back({array(weights[i]), masks[i] ? masks[i]->const_data_ptr<bool>() : nullptr,
                       per_row ? weights[i].size(0) : 1, weights[i].numel()});
    groups += tensors.back().rows;
  }
  Tensor sums = torch::stable::empty({groups, 3}, ScalarType::Double);
  cpu::power_sums(tensors, p, q, static_cast<pdp::PowerSums*>(sums.data_ptr()), parallel_for);
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pdp, CPU, m) {
  m.impl("prune_counts", TORCH_BOX(&prune_counts));
  m.impl("thresholds", TORCH_BOX(&thresholds));
  m.impl("digit_counts", TORCH_BOX(&digit_counts));
  m.impl("hard_mask", TORCH_BOX(&hard_mask));
  m.impl("soft_mask", TORCH_BOX(&soft_mask));
  m.impl("soft_mask_backward", TORCH_BOX(&soft_mask_backward));
  m.impl("soft_mask_list", TORCH_BOX(&soft_mask_list));
  m.impl("soft_mask_list_backward", TORCH_BOX(&soft_mask_list_backward));
  m.impl("soft_mask_nm", TORCH_BOX(&soft_mask_nm));
  m.impl("soft_mask_nm_backward", TORCH_BOX(&soft_mask_nm_backward));
  m.impl("hard_mask_nm", TORCH_BOX(&hard_mask_nm));
  m.impl("compress_2to4", TORCH_BOX(&compress_2to4));
  m.impl("channel_norms", TORCH_BOX(&channel_norms));
  m.impl("soft_mask_channel", TORCH_BOX(&soft_mask_channel));
  m.impl("soft_mask_channel_backward", TORCH_BOX(&soft_mask_channel_backward));
  m.impl("power_sums", TORCH_BOX(&power_sums));
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = TORCH_VERSION;
    info["compiler"] = __VERSION__;
    return info;
  });
}
