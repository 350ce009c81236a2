// The sources of the CUDA kernels, compiled for the CPU, behind C functions over raw pointers. Each
// function returns null, or an error message.
#include <cuda_runtime.h>

#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/digit_counts.cuh"
#include "../../csrc/cuda/hard_mask.cuh"
#include "../../csrc/cuda/power_sums.cuh"
#include "../../csrc/cuda/prune_counts.cuh"
#include "../../csrc/cuda/soft_mask_list.cuh"
#include "../../csrc/cuda/thresholds.cuh"
#include "../../csrc/cuda/workspace.cuh"
#include "../../csrc/prune_count.h"
#include "report.h"

namespace {

using host_cuda::kByLane;
using host_cuda::Kind;
using host_cuda::kTable;
using host_cuda::name;
using host_cuda::report;
using pdp::bytes_of;

size_t latest_workspace_bytes = 0;
int64_t sampled_from = pdp::kSampledFrom;

class Workspace {
 public:
  explicit Workspace(size_t bytes) {
    latest_workspace_bytes = bytes;
    if (cudaMalloc(&memory_, bytes) != cudaSuccess) throw std::bad_alloc();
  }

  void* data() const { return memory_; }
  size_t bytes() const { return latest_workspace_bytes; }
  // Throws an exception if a kernel has written beyond it.
  void free() { cudaFree(memory_); }

 private:
  unsigned char* memory_ = nullptr;
};

pdp::DeviceLimits limits() {
  pdp::DeviceLimits limits;
  pdp::read_device_limits(host_cuda::device.number, &limits);
  return limits;
}

void name_weights(const std::vector<pdp::WeightView>& weights) {
  for (const pdp::WeightView& w : weights) name(w.data, w.size * bytes_of(w.type), "weights");
}

template <typename Key>
std::vector<pdp::TableEntry> lay_out(const pdp::ThresholdRequest& request, const Workspace& memory,
                                     pdp::Selection<Key>* selection) {
  pdp::Workspace workspace(memory.data());
  std::vector<pdp::TableEntry> table;
  *selection = pdp::lay_out_selection<Key>(request, workspace, table);
  return table;
}

template <typename Key>
void name_buffers_of(const pdp::ThresholdRequest& request, const Workspace& memory) {
  pdp::Selection<Key> selection;
  const std::vector<pdp::TableEntry> table = lay_out(request, memory, &selection);
  int64_t candidates = 0;
  for (const pdp::TableEntry& entry : table) {
    if (entry.tiles == 0 || !pdp::kCollects<Key>) continue;
    candidates += pdp::candidate_capacity(entry.size) + pdp::survivor_capacity(entry.size);
  }
  const auto* end = static_cast<const char*>(memory.data()) + memory.bytes();
  const auto name_until = [](const void* begin, const void* after, const char* of, Kind kind) {
    name(begin, static_cast<const char*>(after) - static_cast<const char*>(begin), of, kind);
  };
  name_until(selection.entries, selection.histograms, "table", kTable);
  name_until(selection.histograms, selection.candidates, "histograms", kByLane);
  name_until(selection.candidates, selection.candidates + candidates, "candidates", kByLane);
  name_until(selection.candidates + candidates, end, "ties", kByLane);
}

// Names the buffers of the workspace, for a list of one key width. (Several widths use one
// workspace in turn.)
void name_buffers(const pdp::ThresholdRequest& request, const Workspace& memory) {
  switch (bytes_of(request.weights[0].type)) {
    case 8:
      return name_buffers_of<uint64_t>(request, memory);
    case 4:
      return name_buffers_of<uint32_t>(request, memory);
    default:
      return name_buffers_of<uint16_t>(request, memory);
  }
}

// candidates: of each tensor. fallbacks: the number of tensors that a bracket did not find.
template <typename Key>
void read_selection(const pdp::ThresholdRequest& request, const Workspace& memory,
                    int64_t* candidates, int64_t* fallbacks) {
  pdp::Selection<Key> selection;
  const std::vector<pdp::TableEntry> table = lay_out(request, memory, &selection);
  for (size_t i = 0; i < table.size(); ++i) {
    candidates[table[i].position] = selection.states[i].buffered;
  }
  *fallbacks = selection.sampled ? static_cast<int64_t>(*selection.unfinished) : 0;
}

}  // namespace

extern "C" {

void host_device(int multiprocessors, int shared_bytes_per_block, uint64_t seed) {
  host_cuda::device.multiprocessors = multiprocessors;
  host_cuda::device.shared_bytes_per_block = shared_bytes_per_block;
  host_cuda::device.seed = seed;
}

// Which device it is, and what the code that it loads was compiled for.
void host_code(int number, int architecture) {
  host_cuda::device.number = number;
  host_cuda::device.architecture_of_code = architecture;
}

int64_t host_overlapped_launches() { return host_cuda::device.overlapped_launches; }

int64_t host_launches() { return host_cuda::device.launches; }

int64_t host_workspace_bytes() { return static_cast<int64_t>(latest_workspace_bytes); }

// From how many weights on float32 and float64 are sampled; the next calls follow it.
void host_sampled_from(int64_t weights) { sampled_from = weights; }

// candidates and fallbacks as in read_selection, or null; only for lists of one key width.
const char* host_thresholds(int64_t tensors, const void* const* data, const int64_t* sizes,
                            const int32_t* types, const int64_t* prune_counts, void* thresholds,
                            int is_double, int64_t* candidates, int64_t* fallbacks) {
  return report([&] {
    pdp::ThresholdRequest request = {
        {}, prune_counts, {thresholds, is_double != 0}, limits(), sampled_from};
    for (int64_t i = 0; i < tensors; ++i) {
      request.weights.push_back({data[i], sizes[i], i, static_cast<pdp::WeightType>(types[i])});
    }
    Workspace workspace(pdp::thresholds_workspace_bytes(request));
    name_weights(request.weights);
    name_buffers(request, workspace);
    pdp::launch_thresholds(request, workspace.data(), nullptr);
    if (candidates != nullptr) {
      switch (bytes_of(request.weights[0].type)) {
        case 8:
          read_selection<uint64_t>(request, workspace, candidates, fallbacks);
          break;
        case 4:
          read_selection<uint32_t>(request, workspace, candidates, fallbacks);
          break;
        default:
          read_selection<uint16_t>(request, workspace, candidates, fallbacks);
      }
    }
    workspace.free();
  });
}

const char* host_digit_counts(int64_t tensors, const void* const* data, const int64_t* sizes,
                              const int32_t* types, const int64_t* prefixes, int64_t weight_bytes,
                              int64_t digit, int64_t* counts, int64_t* above) {
  return report([&] {
    pdp::DigitCountsRequest request = {{},     prefixes, pdp::key_digits(weight_bytes).digit(digit),
                                       counts, above,    limits()};
    for (int64_t i = 0; i < tensors; ++i) {
      request.weights.push_back({data[i], sizes[i], i, static_cast<pdp::WeightType>(types[i])});
    }
    Workspace workspace(pdp::digit_counts_workspace_bytes(request));
    name_weights(request.weights);
    name(workspace.data(), workspace.bytes(), "table", kTable);
    name(counts, tensors * request.digit.bins() * sizeof(int64_t), "counts");
    pdp::launch_digit_counts(request, workspace.data(), nullptr);
    workspace.free();
  });
}

const char* host_hard_mask(const void* data, int64_t size, int32_t type, const int64_t* prune_count,
                           bool* kept) {
  return report([&] {
    double threshold = 0;
    pdp::HardMaskRequest request = {{{{data, size, 0, static_cast<pdp::WeightType>(type)}},
                                     prune_count,
                                     {&threshold, true},
                                     limits(),
                                     sampled_from},
                                    kept};
    Workspace workspace(pdp::hard_mask_workspace_bytes(request));
    name_weights(request.selection.weights);
    name(kept, size, "mask");
    name_buffers(request.selection, workspace);
    pdp::launch_hard_mask(request, workspace.data(), nullptr);
    workspace.free();
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
    Workspace workspace(pdp::power_sums_workspace_bytes(request));
    for (const pdp::RowsView& tensor : request.tensors) {
      name(tensor.data, tensor.size * bytes_of(tensor.type), "weights");
      if (tensor.kept != nullptr) name(tensor.kept, tensor.size, "mask");
    }
    pdp::Workspace layout(workspace.data());
    std::vector<pdp::SumEntry> table;
    const pdp::SumPlan plan = pdp::lay_out_sums(request, layout, table);
    name(plan.entries, table.size() * sizeof(pdp::SumEntry), "table", kTable);
    name(plan.tile_sums, plan.tiles * sizeof(pdp::PowerSums), "partial sums");
    pdp::launch_power_sums(request, workspace.data(), nullptr);
    workspace.free();
  });
}

// grads: null for the forward. Strides are in elements.
const char* host_soft_mask_list(int64_t tensors, const void* const* weights, const int64_t* sizes,
                                const int32_t* types, const void* const* grads,
                                void* const* results, const int32_t* w_hat_types,
                                const void* thresholds, int64_t threshold_stride, const void* taus,
                                int64_t tau_stride, int relative) {
  return report([&] {
    pdp::SoftMaskListRequest request = {{},   thresholds, threshold_stride,
                                        taus, tau_stride, relative != 0};
    latest_workspace_bytes = 0;
    for (int64_t i = 0; i < tensors; ++i) {
      const auto type = static_cast<pdp::WeightType>(types[i]);
      const auto w_hat_type = static_cast<pdp::WeightType>(w_hat_types[i]);
      const void* grad = grads == nullptr ? nullptr : grads[i];
      request.list.push_back({weights[i], grad, results[i], sizes[i], type, w_hat_type});
      name(weights[i], sizes[i] * bytes_of(type), "weights");
      if (grads == nullptr) {
        name(results[i], sizes[i] * bytes_of(w_hat_type), "w_hat");
      } else {
        name(grads[i], sizes[i] * bytes_of(w_hat_type), "gradients of w_hat");
        name(results[i], sizes[i] * bytes_of(type), "gradients");
      }
    }
    if (grads == nullptr) {
      pdp::launch_soft_mask_list<pdp::MaskPass::kForward>(request, nullptr);
    } else {
      pdp::launch_soft_mask_list<pdp::MaskPass::kBackward>(request, nullptr);
    }
  });
}

}  // extern "C"
