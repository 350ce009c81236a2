// Arrays of weights, gradients or results in any storage type, read and written as Reals.
#pragma once

#include <type_traits>

#include "../convert.h"
#include "../magnitude.h"
#include "parallel.h"
#include "visit.h"

namespace pdp::cpu {

// data may be null where a gradient is not given or a result is not wanted.
struct Array {
  void* data;
  WeightType type;
};

template <typename Real>
PDP_INLINE void read(Array array, int64_t offset, int count, Real* values) {
  visit(array.data, array.type, [&](const auto* data) PDP_LAMBDA {
    for (int i = 0; i < count; ++i) values[i] = static_cast<Real>(widen(data[offset + i]));
  });
}

template <typename Real>
PDP_INLINE void write(const Real* values, Array array, int64_t offset, int count) {
  visit(array.data, array.type, [&](const auto* data) PDP_LAMBDA {
    using Stored = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    Stored* results = static_cast<Stored*>(array.data) + offset;
    for (int i = 0; i < count; ++i) narrow(values[i], results[i]);
  });
}

// Returns the array's own Reals from `offset` on, or null if it holds another type or nothing.
template <typename Real>
PDP_INLINE Real* own(Array array, int64_t offset) {
  constexpr auto kOwn = std::is_same_v<Real, double> ? WeightType::kFloat64 : WeightType::kFloat32;
  if (array.data == nullptr || array.type != kOwn) return nullptr;
  return static_cast<Real*>(array.data) + offset;
}

// Returns a block of an array as Reals: the array itself if it is of that type, else a converted
// copy.
template <typename Real>
PDP_INLINE const Real* load(Array array, int64_t offset, int count, Real* buffer) {
  if (const Real* values = own<Real>(array, offset)) return values;
  read(array, offset, count, buffer);
  return buffer;
}

// Returns where to compute the results of a block: the array itself if it is of that type, else the
// buffer, which store() then converts.
template <typename Real>
PDP_INLINE Real* destination(Array array, int64_t offset, Real* buffer) {
  Real* values = own<Real>(array, offset);
  return values != nullptr ? values : buffer;
}

template <typename Real>
PDP_INLINE void store(const Real* values, const Real* buffer, Array array, int64_t offset,
                      int count) {
  if (array.data != nullptr && values == buffer) write(values, array, offset, count);
}

}  // namespace pdp::cpu
