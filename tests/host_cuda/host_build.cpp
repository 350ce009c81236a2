// The CUDA kernels' own sources, compiled for the CPU, behind C functions over raw pointers. Each
// returns null, or what went wrong.
#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "../../csrc/cuda/digit_counts.cuh"
#include "../../csrc/cuda/hard_mask.cuh"
#include "../../csrc/cuda/power_sums.cuh"
#include "../../csrc/cuda/prune_counts.cuh"
#include "../../csrc/cuda/thresholds.cuh"

namespace pdp {
alignas(16) unsigned char pdp_shared_memory[host_cuda::kSharedBytes];
}

namespace {

template <typename Run>
const char* report(Run run) {
  static std::string error;
  host_cuda::device.shared_memory = pdp::pdp_shared_memory;
  host_cuda::device.launches = 0;
  try {
    run();
    return nullptr;
  } catch (const std::exception& exception) {
    error = exception.what();
    return error.c_str();
  }
}

// Workspace filled with noise, as fresh device memory is, and a canary behind it.
class NoisyWorkspace {
 public:
  explicit NoisyWorkspace(size_t bytes) : bytes_(bytes), memory_(bytes + kCanary, 0xA5) {}

  void* data() { return memory_.data(); }
  void check() const {
    for (size_t i = bytes_; i < memory_.size(); ++i) {
      if (memory_[i] != 0xA5) throw std::runtime_error("a store beyond the workspace");
    }
  }

 private:
  static constexpr size_t kCanary = 4096;
  size_t bytes_;
  std::vector<unsigned char> memory_;
};

pdp::DeviceLimits limits() {
  pdp::DeviceLimits limits;
  pdp::read_device_limits(0, &limits);
  return limits;
}

template <typename Key>
void read_buffered(const pdp::ThresholdRequest& request, void* memory, int64_t* buffered) {
  pdp::Workspace workspace(memory);
  std::vector<pdp::TableEntry> table;
  const auto selection = pdp::lay_out_selection<Key>(request, workspace, table);
  for (size_t i = 0; i < table.size(); ++i) {
    buffered[table[i].position] = selection.states[i].buffered;
  }
}

__global__ void early_exit_kernel() {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void overrun_kernel() { pdp::shared_memory<unsigned char[65]>()[64] = 0; }

__global__ void misaligned_kernel() {
  __ldg(reinterpret_cast<const uint4*>(&pdp::shared_memory<unsigned char[64]>()[4]));
}

__global__ void unset_shared_memory_kernel(unsigned char* value) {
  *value = pdp::shared_memory<unsigned char[64]>()[0];
}

}  // namespace

extern "C" {

void host_device(int multiprocessors, int shared_bytes_per_block, uint64_t seed) {
  host_cuda::device.multiprocessors = multiprocessors;
  host_cuda::device.shared_bytes_per_block = shared_bytes_per_block;
  host_cuda::device.seed = seed;
}

int64_t host_launches() { return host_cuda::device.launches; }

// buffered: how many candidates each tensor collected; only for lists of one key width.
const char* host_thresholds(int64_t tensors, const void* const* data, const int64_t* sizes,
                            const int32_t* types, const int64_t* prune_counts, void* thresholds,
                            int is_double, int64_t* buffered) {
  return report([&] {
    pdp::ThresholdRequest request = {{}, prune_counts, {thresholds, is_double != 0}, limits()};
    for (int64_t i = 0; i < tensors; ++i) {
      request.weights.push_back({data[i], sizes[i], i, static_cast<pdp::WeightType>(types[i])});
    }
    NoisyWorkspace workspace(pdp::thresholds_workspace_bytes(request));
    pdp::launch_thresholds(request, workspace.data(), nullptr);
    workspace.check();
    if (buffered == nullptr) return;
    if (types[0] == static_cast<int32_t>(pdp::WeightType::kFloat64)) {
      read_buffered<uint64_t>(request, workspace.data(), buffered);
    } else {
      read_buffered<uint32_t>(request, workspace.data(), buffered);
    }
  });
}

const char* host_digit_counts(int64_t tensors, const void* const* data, const int64_t* sizes,
                              const int32_t* types, const int64_t* prefixes, int64_t weight_bytes,
                              int64_t digit, int64_t* counts, int64_t* above) {
  return report([&] {
    pdp::DigitCountsRequest request = {{},     prefixes, pdp::counted_digit(weight_bytes, digit),
                                       counts, above,    limits()};
    for (int64_t i = 0; i < tensors; ++i) {
      request.weights.push_back({data[i], sizes[i], i, static_cast<pdp::WeightType>(types[i])});
    }
    NoisyWorkspace workspace(pdp::digit_counts_workspace_bytes(request));
    pdp::launch_digit_counts(request, workspace.data(), nullptr);
    workspace.check();
  });
}

const char* host_hard_mask(const void* data, int64_t size, int32_t type, const int64_t* prune_count,
                           bool* kept) {
  return report([&] {
    double threshold = 0;
    pdp::HardMaskRequest request = {{{{data, size, 0, static_cast<pdp::WeightType>(type)}},
                                     prune_count,
                                     {&threshold, true},
                                     limits()},
                                    kept};
    NoisyWorkspace workspace(pdp::hard_mask_workspace_bytes(request));
    pdp::launch_hard_mask(request, workspace.data(), nullptr);
    workspace.check();
  });
}

const char* host_prune_counts(int64_t tensors, const int64_t* sizes, const double* sparsities,
                              int64_t* counts) {
  return report([&] {
    std::vector<int64_t> values;
    for (int64_t i = 0; i < tensors; ++i) {
      values.push_back(pdp::prune_count(sparsities[i], sizes[i]));
    }
    pdp::launch_prune_counts(values, counts, nullptr);
  });
}

const char* host_power_sums(int64_t tensors, const void* const* data, const bool* const* kept,
                            const int64_t* rows, const int64_t* sizes, const int32_t* types,
                            double p, double q, double* results) {
  return report([&] {
    pdp::PowerSumsRequest request = {
        {}, p, q, reinterpret_cast<pdp::PowerSums*>(results), limits()};
    for (int64_t i = 0; i < tensors; ++i) {
      request.tensors.push_back(
          {data[i], kept[i], rows[i], sizes[i], static_cast<pdp::WeightType>(types[i])});
    }
    NoisyWorkspace workspace(pdp::power_sums_workspace_bytes(request));
    pdp::launch_power_sums(request, workspace.data(), nullptr);
    workspace.check();
  });
}

// Kernels with one mistake each, to show that the host build sees it.
const char* host_mistake(const char* name, unsigned char* value) {
  return report([&] {
    pdp::Launcher launcher(nullptr);
    const std::string mistake = name;
    if (mistake == "early_exit") launcher.launch(early_exit_kernel, 1, 32, 0);
    if (mistake == "overrun") launcher.launch(overrun_kernel, 1, 32, 64);
    if (mistake == "misaligned") launcher.launch(misaligned_kernel, 1, 32, 64);
    if (mistake == "unset_shared_memory") {
      launcher.launch(unset_shared_memory_kernel, 1, 32, 64, value);
    }
  });
}

}  // extern "C"
