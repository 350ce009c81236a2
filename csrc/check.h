// Checks of arguments, whose failure Python sees as a RuntimeError.
//
// Not STD_TORCH_CHECK, whose messages pass through a std::ostringstream: where the compiler links
// its C++ library into the module, that stream crashes beside torch's own library.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

namespace pdp {

template <typename Part>
std::string text_of(const Part& part) {
  if constexpr (std::is_integral_v<Part>) {
    return std::to_string(part);
  } else {
    return part;
  }
}

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::runtime_error((text_of(parts) + ...));
}

}  // namespace pdp

// The parts of the message, texts and integers, are evaluated after a failure only.
#define PDP_CHECK(condition, ...)             \
  do {                                        \
    if (!(condition)) pdp::fail(__VA_ARGS__); \
  } while (false)
