// Error reports and buffer names, for the C functions of a host build.
#pragma once

#include <exception>
#include <string>

#include "engine.h"

namespace host_cuda {

// Runs run(). Returns null, or its error message.
template <typename Run>
const char* report(Run run) {
  static std::string error;
  device.launches = 0;
  device.overlapped_launches = 0;
  try {
    run();
    return nullptr;
  } catch (const std::exception& exception) {
    error = exception.what();
    return error.c_str();
  }
}

// How counters.cpp counts a buffer: for every lane, or once for lanes that read a place together.
enum Kind { kByLane, kTable };

inline void name(const void* begin, size_t bytes, const char* of, Kind kind = kByLane) {
  if (host_cuda_name_buffer != nullptr) host_cuda_name_buffer(begin, bytes, of, kind == kTable);
}

}  // namespace host_cuda
