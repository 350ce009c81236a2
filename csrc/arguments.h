// Checks of operator arguments, for callers that bypass the public functions: an error message in
// place of a memory fault. The public functions check more.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <utility>
#include <vector>

#include "check.h"
#include "digits.h"
#include "tensors.h"

namespace pdp {

constexpr int64_t kMaxGroupMembers = 32;  // of an N:M group

inline void check_device(const torch::stable::Tensor& tensor, const torch::stable::Tensor& weight,
                         const char* name) {
  PDP_CHECK(tensor.device() == weight.device(), name, " must be on the weights' device");
}

// The type of thresholds, temperatures and norms.
inline torch::headeronly::ScalarType real_type(const torch::stable::Tensor& weight) {
  using torch::headeronly::ScalarType;
  return weight_type(weight) == WeightType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

inline void check_values(const torch::stable::Tensor& values, torch::headeronly::ScalarType type,
                         int64_t count, const torch::stable::Tensor& weight, const char* name) {
  PDP_CHECK(values.scalar_type() == type, name, " must have dtype ",
            torch::headeronly::toString(type), ", got ",
            torch::headeronly::toString(values.scalar_type()));
  PDP_CHECK(values.numel() == count, name, " must have ", count, " elements, got ", values.numel());
  check_device(values, weight, name);
}

inline void check_weight(const torch::stable::Tensor& weight,
                         torch::headeronly::DeviceType device) {
  PDP_CHECK(weight.device().type() == device,
            "weights must be on the device of the other arguments");
  weight_type(weight);
}

// A list of at least one weight.
inline void check_weights(const std::vector<torch::stable::Tensor>& weights,
                          torch::headeronly::DeviceType device) {
  PDP_CHECK(!weights.empty(), "weights must not be empty");
  for (const torch::stable::Tensor& weight : weights) {
    check_weight(weight, device);
    check_device(weight, weights[0], "weights");
  }
}

inline void check_sparsities(const std::vector<torch::stable::Tensor>& weights,
                             const std::vector<double>& sparsities) {
  PDP_CHECK(sparsities.size() == weights.size(), "sparsities must have ", weights.size(),
            " elements, got ", sparsities.size());
}

// One int64 for each weight of a list.
inline void check_integers(const torch::stable::Tensor& integers, size_t count,
                           const torch::stable::Tensor& weight, const char* name) {
  check_values(integers, torch::headeronly::ScalarType::Long, static_cast<int64_t>(count), weight,
               name);
}

inline void check_digit(const std::vector<torch::stable::Tensor>& weights, int64_t digit) {
  const auto bytes = static_cast<int64_t>(weights[0].element_size());
  for (const torch::stable::Tensor& weight : weights) {
    PDP_CHECK(static_cast<int64_t>(weight.element_size()) == bytes,
              "weights must have elements of one size");
  }
  PDP_CHECK(0 <= digit && digit < key_digits(bytes).count, "digit must be in [0, ",
            key_digits(bytes).count, "), got ", digit);
}

// One value for each element of the weight, in any floating point dtype.
inline void check_like(const std::optional<torch::stable::Tensor>& values,
                       const torch::stable::Tensor& weight, const char* name) {
  if (!values) return;
  weight_type(*values);
  const auto sizes = weight.sizes();
  PDP_CHECK(values->sizes().equals(sizes), name, " must have the weight's shape");
  check_device(*values, weight, name);
}

// Each mask is None or has its weight's shape. With per_row, weights must have rows.
inline void check_masks(const std::vector<std::optional<torch::stable::Tensor>>& masks,
                        const std::vector<torch::stable::Tensor>& weights, bool per_row) {
  PDP_CHECK(masks.size() == weights.size(), "masks must have ", weights.size(), " elements, got ",
            masks.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const torch::stable::Tensor& weight = weights[i];
    PDP_CHECK(!per_row || weight.dim() > 0, "weights must have a dimension 0");
    if (!masks[i]) continue;
    check_values(*masks[i], torch::headeronly::ScalarType::Bool, weight.numel(), weight, "masks");
    PDP_CHECK(masks[i]->sizes().equals(weight.sizes()),
              "masks must have the shapes of their weights");
  }
}

inline void check_scalar(const torch::stable::Tensor& value, const torch::stable::Tensor& weight,
                         const char* name) {
  check_values(value, real_type(weight), 1, weight, name);
}

// A list of at least one weight whose thresholds and temperatures have one dtype.
inline void check_mask_list(const std::vector<torch::stable::Tensor>& weights,
                            const torch::stable::Tensor& thresholds,
                            const torch::stable::Tensor& taus,
                            torch::headeronly::DeviceType device) {
  check_weights(weights, device);
  const auto type = real_type(weights[0]);
  for (const torch::stable::Tensor& weight : weights) {
    PDP_CHECK(real_type(weight) == type,
              "weights must be all of float64 or none, because their thresholds have one "
              "dtype; got ",
              torch::headeronly::toString(weights[0].scalar_type()), " and ",
              torch::headeronly::toString(weight.scalar_type()));
  }
  const auto count = static_cast<int64_t>(weights.size());
  for (const auto& [values, name] : {std::pair(&thresholds, "thresholds"), {&taus, "taus"}}) {
    PDP_CHECK(values->dim() == 1, name, " must have one dimension, got ", values->dim());
    check_values(*values, type, count, weights[0], name);
  }
}

// Each gradient is None or has its weight's shape.
inline void check_gradients(const std::vector<std::optional<torch::stable::Tensor>>& grads,
                            const std::vector<torch::stable::Tensor>& weights) {
  PDP_CHECK(grads.size() == weights.size(), "grads must have ", weights.size(), " elements, got ",
            grads.size());
  for (size_t i = 0; i < weights.size(); ++i) check_like(grads[i], weights[i], "grads");
}

inline void check_dim(const torch::stable::Tensor& weight, int64_t dim) {
  PDP_CHECK(0 <= dim && dim < weight.dim(), "dim must be in [0, ", weight.dim(), "), got ", dim);
}

inline void check_groups(const torch::stable::Tensor& weight, int64_t m,
                         const torch::stable::Tensor& pruned, int64_t dim) {
  check_dim(weight, dim);
  PDP_CHECK(1 <= m && m <= kMaxGroupMembers && weight.size(dim) % m == 0, "m must be in [1, ",
            kMaxGroupMembers, "] and divide the size along dim, got ", m);
  check_integers(pruned, 1, weight, "pruned");
}

// One norm for each channel along dim.
inline void check_channels(const torch::stable::Tensor& weight, const torch::stable::Tensor& norms,
                           int64_t dim) {
  check_dim(weight, dim);
  check_values(norms, real_type(weight), weight.size(dim), weight, "norms");
}

inline void check_channel_gradient(const std::optional<torch::stable::Tensor>& grad_mask,
                                   const torch::stable::Tensor& weight, int64_t dim) {
  if (!grad_mask) return;
  weight_type(*grad_mask);
  check_values(*grad_mask, grad_mask->scalar_type(), weight.size(dim), weight, "grad_mask");
}

// 32 rows and 64 columns: the smallest matrix that CUTLASS takes.
inline void check_compressible(const torch::stable::Tensor& weight) {
  PDP_CHECK(weight.dim() == 2 && weight.size(0) % 32 == 0 && weight.size(1) % 64 == 0,
            "weight must have shape (rows, cols), rows divisible by 32 and cols by 64");
  const WeightType type = weight_type(weight);
  PDP_CHECK(type == WeightType::kBFloat16 || type == WeightType::kFloat16,
            "weight must have dtype bfloat16 or float16");
}

}  // namespace pdp
