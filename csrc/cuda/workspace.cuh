// The workspace of an operator: one allocation that its kernels use for their temporary arrays.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pdp {

// Assigns arrays to consecutive places of the workspace. With a null address it only measures how
// many bytes they need.
class Workspace {
 public:
  explicit Workspace(void* memory) : begin_(reinterpret_cast<uintptr_t>(memory)) {}

  template <typename Element>
  Element* take(int64_t count) {
    constexpr size_t kAlignment = 256;
    const uintptr_t address = begin_ + bytes_;
    bytes_ +=
        (static_cast<size_t>(count) * sizeof(Element) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<Element*>(address);
  }

  size_t bytes() const { return bytes_; }

 private:
  uintptr_t begin_;
  size_t bytes_ = 0;
};

}  // namespace pdp
