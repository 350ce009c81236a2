// The CUDA implementations of the pdp operators: they pass tensors' pointers to the kernels, on the
// current stream.
// Schemas are defined in Python. Only the LibTorch stable ABI is used, so one build serves the
// torch it was built against and every later one.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cuda/digit_counts.cuh"
#include "cuda/hard_mask.cuh"
#include "cuda/power_sums.cuh"
#include "cuda/prune_counts.cuh"
#include "cuda/soft_mask_list.cuh"
#include "cuda/thresholds.cuh"
#include "prune_count.h"
#include "tensors.h"

namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

Tensor empty_on(const Tensor& tensor, int64_t size, ScalarType type) {
  return torch::stable::empty({size}, type, std::nullopt, tensor.device());
}

pdp::DeviceLimits device_limits(const Tensor& tensor) {
  pdp::DeviceLimits limits;
  STD_CUDA_CHECK(pdp::read_device_limits(tensor.get_device_index(), &limits));
  return limits;
}

pdp::WeightView view_of(const Tensor& weight, int64_t position) {
  return {weight.const_data_ptr(), weight.numel(), position, pdp::weight_type(weight)};
}

Tensor prune_counts(std::vector<Tensor> weights, std::vector<double> sparsities) {
  pdp::check_weights(weights, DeviceType::CUDA);
  pdp::check_sparsities(weights, sparsities);
  const torch::stable::accelerator::DeviceGuard guard(weights[0].get_device_index());
  std::vector<int64_t> counts;
  for (size_t i = 0; i < weights.size(); ++i) {
    counts.push_back(pdp::prune_count(sparsities[i], weights[i].numel()));
  }
  const Tensor result = empty_on(weights[0], static_cast<int64_t>(counts.size()), ScalarType::Long);
  STD_CUDA_CHECK(
      pdp::launch_prune_counts(counts, result.mutable_data_ptr<int64_t>(), current_stream(result)));
  return result;
}

Tensor thresholds(std::vector<Tensor> weights, Tensor prune_counts) {
  pdp::check_weights(weights, DeviceType::CUDA);
  pdp::check_integers(prune_counts, weights.size(), weights[0], "prune_counts");
  const torch::stable::accelerator::DeviceGuard guard(weights[0].get_device_index());
  const Tensor counts = torch::stable::contiguous(prune_counts);
  pdp::ThresholdRequest request = {};
  bool is_double = false;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!pdp::is_dense(weights[i])) weights[i] = torch::stable::contiguous(weights[i]);
    request.weights.push_back(view_of(weights[i], static_cast<int64_t>(i)));
    is_double |= request.weights.back().type == pdp::WeightType::kFloat64;
  }
  const Tensor result = empty_on(weights[0], static_cast<int64_t>(weights.size()),
                                 is_double ? ScalarType::Double : ScalarType::Float);
  request.prune_counts = counts.const_data_ptr<int64_t>();
  request.thresholds = {result.mutable_data_ptr(), is_double};
  request.limits = device_limits(result);
  const Tensor workspace = empty_on(
      result, static_cast<int64_t>(pdp::thresholds_workspace_bytes(request)), ScalarType::Byte);
  STD_CUDA_CHECK(
      pdp::launch_thresholds(request, workspace.mutable_data_ptr(), current_stream(result)));
  return result;
}

std::tuple<Tensor, Tensor> digit_counts(std::vector<Tensor> weights, Tensor prefixes,
                                        int64_t digit) {
  pdp::check_weights(weights, DeviceType::CUDA);
  pdp::check_integers(prefixes, weights.size(), weights[0], "prefixes");
  pdp::check_digit(weights, digit);
  const torch::stable::accelerator::DeviceGuard guard(weights[0].get_device_index());
  const auto tensors = static_cast<int64_t>(weights.size());
  prefixes = torch::stable::contiguous(prefixes);
  pdp::DigitCountsRequest request = {};
  for (int64_t i = 0; i < tensors; ++i) {
    if (!pdp::is_dense(weights[i])) weights[i] = torch::stable::contiguous(weights[i]);
    request.weights.push_back(view_of(weights[i], i));
  }
  request.prefixes = prefixes.const_data_ptr<int64_t>();
  request.digit = pdp::key_digits(static_cast<int64_t>(weights[0].element_size())).digit(digit);
  const Tensor counts = torch::stable::empty({tensors, request.digit.bins()}, ScalarType::Long,
                                             std::nullopt, prefixes.device());
  const Tensor above = empty_on(prefixes, tensors, ScalarType::Long);
  request.counts = counts.mutable_data_ptr<int64_t>();
  request.above = above.mutable_data_ptr<int64_t>();
  request.limits = device_limits(prefixes);
  const Tensor workspace = empty_on(
      prefixes, static_cast<int64_t>(pdp::digit_counts_workspace_bytes(request)), ScalarType::Byte);
  STD_CUDA_CHECK(
      pdp::launch_digit_counts(request, workspace.mutable_data_ptr(), current_stream(prefixes)));
  return {counts, above};
}

Tensor hard_mask(Tensor weight, Tensor prune_count) {
  pdp::check_weight(weight, DeviceType::CUDA);
  pdp::check_integers(prune_count, 1, weight, "prune_count");
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  if (!weight.is_contiguous()) weight = torch::stable::contiguous(weight);
  const Tensor kept =
      torch::stable::empty(weight.sizes(), ScalarType::Bool, std::nullopt, weight.device());
  const Tensor threshold = empty_on(weight, 1, ScalarType::Double);
  pdp::HardMaskRequest request = {};
  request.selection = {{view_of(weight, 0)},
                       prune_count.const_data_ptr<int64_t>(),
                       {threshold.mutable_data_ptr(), true},
                       device_limits(weight)};
  request.kept = kept.mutable_data_ptr<bool>();
  const Tensor workspace = empty_on(
      weight, static_cast<int64_t>(pdp::hard_mask_workspace_bytes(request)), ScalarType::Byte);
  STD_CUDA_CHECK(
      pdp::launch_hard_mask(request, workspace.mutable_data_ptr(), current_stream(weight)));
  return kept;
}

Tensor power_sums(std::vector<Tensor> weights, std::vector<std::optional<Tensor>> masks, double p,
                  double q, bool per_row) {
  pdp::check_weights(weights, DeviceType::CUDA);
  pdp::check_masks(masks, weights, per_row);
  const torch::stable::accelerator::DeviceGuard guard(weights[0].get_device_index());
  pdp::PowerSumsRequest request = {};
  int64_t groups = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    pdp::bring_in_order(weights[i], masks[i], per_row);
    request.tensors.push_back(
        {weights[i].const_data_ptr(), masks[i] ? masks[i]->const_data_ptr<bool>() : nullptr,
         per_row ? weights[i].size(0) : 1, weights[i].numel(), pdp::weight_type(weights[i])});
    groups += request.tensors.back().rows;
  }
  const Tensor sums =
      torch::stable::empty({groups, 3}, ScalarType::Double, std::nullopt, weights[0].device());
  request.p = p;
  request.q = q;
  request.results = static_cast<pdp::PowerSums*>(sums.mutable_data_ptr());
  request.limits = device_limits(sums);
  const Tensor workspace = empty_on(
      sums, static_cast<int64_t>(pdp::power_sums_workspace_bytes(request)), ScalarType::Byte);
  STD_CUDA_CHECK(
      pdp::launch_power_sums(request, workspace.mutable_data_ptr(), current_stream(sums)));
  return sums;
}

pdp::SoftMaskListRequest mask_request(const Tensor& thresholds, const Tensor& taus, bool relative) {
  return {{},
          thresholds.const_data_ptr(),
          thresholds.stride(0),
          taus.const_data_ptr(),
          taus.stride(0),
          relative};
}

std::vector<Tensor> soft_mask_list(std::vector<Tensor> weights, Tensor thresholds, Tensor taus,
                                   bool relative, std::optional<ScalarType> out_dtype) {
  pdp::check_mask_list(weights, thresholds, taus, DeviceType::CUDA);
  const torch::stable::accelerator::DeviceGuard guard(weights[0].get_device_index());
  pdp::SoftMaskListRequest request = mask_request(thresholds, taus, relative);
  std::vector<Tensor> w_hats;
  for (Tensor& weight : weights) {
    const Tensor w_hat = pdp::empty_like(weight, out_dtype.value_or(weight.scalar_type()));
    weight = pdp::in_order_of(w_hat, weight);  // the list keeps a copy alive
    request.list.push_back({weight.const_data_ptr(), nullptr, w_hat.mutable_data_ptr(),
                            weight.numel(), pdp::weight_type(weight), pdp::weight_type(w_hat)});
    w_hats.push_back(w_hat);
  }
  STD_CUDA_CHECK(
      pdp::launch_soft_mask_list<pdp::MaskPass::kForward>(request, current_stream(thresholds)));
  return w_hats;
}

std::vector<Tensor> soft_mask_list_backward(std::vector<std::optional<Tensor>> grads,
                                            std::vector<Tensor> weights, Tensor thresholds,
                                            Tensor taus, bool relative) {
  pdp::check_mask_list(weights, thresholds, taus, DeviceType::CUDA);
  pdp::check_gradients(grads, weights);
  const torch::stable::accelerator::DeviceGuard guard(weights[0].get_device_index());
  pdp::SoftMaskListRequest request = mask_request(thresholds, taus, relative);
  std::vector<Tensor> results;
  for (size_t i = 0; i < weights.size(); ++i) {
    Tensor& weight = weights[i];
    const pdp::WeightType type = pdp::weight_type(weight);
    if (!grads[i]) {
      results.push_back(empty_on(weight, 0, weight.scalar_type()));
      request.list.push_back({nullptr, nullptr, nullptr, 0, type, type});
      continue;
    }
    const Tensor result = torch::stable::empty_like(weight);
    weight = pdp::in_order_of(result, weight);
    grads[i] = pdp::in_order_of(result, *grads[i]);
    request.list.push_back({weight.const_data_ptr(), grads[i]->const_data_ptr(),
                            result.mutable_data_ptr(), weight.numel(), type,
                            pdp::weight_type(*grads[i])});
    results.push_back(result);
  }
  STD_CUDA_CHECK(
      pdp::launch_soft_mask_list<pdp::MaskPass::kBackward>(request, current_stream(thresholds)));
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pdp, CUDA, m) {
  m.impl("prune_counts", TORCH_BOX(&prune_counts));
  m.impl("thresholds", TORCH_BOX(&thresholds));
  m.impl("digit_counts", TORCH_BOX(&digit_counts));
  m.impl("hard_mask", TORCH_BOX(&hard_mask));
  m.impl("soft_mask_list", TORCH_BOX(&soft_mask_list));
  m.impl("soft_mask_list_backward", TORCH_BOX(&soft_mask_list_backward));
  m.impl("power_sums", TORCH_BOX(&power_sums));
}
