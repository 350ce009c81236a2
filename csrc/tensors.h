// Properties of tensors that the bindings of both devices need.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "check.h"
#include "magnitude.h"

namespace pdp {

inline WeightType weight_type(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return WeightType::kFloat64;
    case ScalarType::Float:
      return WeightType::kFloat32;
    case ScalarType::BFloat16:
      return WeightType::kBFloat16;
    case ScalarType::Half:
      return WeightType::kFloat16;
    default:
      fail("expected a float64, float32, bfloat16 or float16 tensor");
  }
}

// Whether the elements fill one contiguous range of memory, each place once, in any order.
inline bool is_dense(const torch::stable::Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // (stride, size)
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (sizes[i] == 0) return true;
    if (sizes[i] > 1) dimensions.emplace_back(strides[i], sizes[i]);
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dimensions) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Whether the elements of two tensors of the same shape are in the same order in memory. The stride
// of a dimension of size 1 does not matter.
inline bool same_order(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) > 1 && a.stride(i) != b.stride(i)) return false;
  }
  return true;
}

// Returns an empty tensor as torch.empty_like(tensor, dtype=dtype) does.
inline torch::stable::Tensor empty_like(const torch::stable::Tensor& tensor,
                                        torch::headeronly::ScalarType dtype) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(tensor),       from(std::optional(dtype)),
                                    from(std::nullopt), from(std::nullopt),
                                    from(std::nullopt), from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

// Returns the values in the memory order of `layout`, which empty_like() made: the tensor itself if
// it has that order (every dense layout does), else a copy.
inline torch::stable::Tensor in_order_of(const torch::stable::Tensor& layout,
                                         const torch::stable::Tensor& values) {
  if (same_order(layout, values)) return values;
  torch::stable::Tensor copy = empty_like(layout, values.scalar_type());
  torch::stable::copy_(copy, values);
  return copy;
}

// Makes a weight and its mask dense and of the same order, so that both can be read in the order of
// memory. With rows_apart, the rows of dimension 0 follow one another in memory.
inline void bring_in_order(torch::stable::Tensor& weight,
                           std::optional<torch::stable::Tensor>& mask, bool rows_apart) {
  bool in_order = is_dense(weight) && (!mask || same_order(weight, *mask));
  if (rows_apart && weight.size(0) > 1) {
    in_order &= weight.stride(0) == weight.numel() / weight.size(0);
  }
  if (in_order) return;
  weight = torch::stable::contiguous(weight);
  if (mask) mask = torch::stable::contiguous(*mask);
}

}  // namespace pdp
