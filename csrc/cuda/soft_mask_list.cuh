// soft_mask_list: the soft masks of a list of weights, or their gradients, in one launch for each
// kLargeSoftMaskChunk weights.
//
// The table of the list is a kernel argument, which a captured graph keeps by value, so there is no
// workspace. Each weight is cut into tiles. A block handles one tile, whose weight it looks up.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../convert.h"
#include "../magnitude.h"
#include "../mask_math.h"
#include "launch.cuh"
#include "packet.cuh"

namespace pdp {

constexpr int kSoftMaskThreads = 256;

// Weights of a tile, 32 for each thread. Not yet measured on a GPU.
constexpr int64_t kSoftMaskTile = 8192;

enum class MaskPass { kForward, kBackward };

// A weight as the host describes it.
struct MaskedWeight {
  const void* weight;
  const void* grad;        // of w_hat; null in the forward
  void* result;            // w_hat, or the weight's gradient
  int64_t size;            // 0 leaves nothing to do
  WeightType weight_type;  // its gradient has it too
  WeightType w_hat_type;   // grad has it too
};

// The operator's arguments. Thresholds and temperatures are on the device, `stride` elements apart:
// doubles for a list of float64 weights, else floats.
struct SoftMaskListRequest {
  std::vector<MaskedWeight> list;
  const void* thresholds;
  int64_t threshold_stride;
  const void* taus;
  int64_t tau_stride;
  bool relative;
};

// Kernel arguments may take 32,764 bytes (CUDA 12.1 and later). Short lists use a small chunk, of
// less than 4 KiB, which costs less to launch.
constexpr int kSmallSoftMaskChunk = 96;
constexpr int kLargeSoftMaskChunk = 832;

// One array for each property, so that a search reads few cache lines.
template <int kCapacity>
struct SoftMaskTable {
  const void* weights[kCapacity];
  const void* grads[kCapacity];
  void* results[kCapacity];
  int64_t sizes[kCapacity];
  const void* thresholds;
  const void* taus;
  int64_t threshold_stride, tau_stride;
  int32_t first_tiles[kCapacity];  // of each weight, among those of the chunk
  int32_t tensors;
  uint8_t weight_types[kCapacity];
  uint8_t w_hat_types[kCapacity];

  // Returns the index of the weight that holds a tile: the last one that begins at or before it,
  // since an empty one begins where the next one does.
  __device__ int32_t find(int32_t tile) const {
    int32_t low = 0, high = tensors - 1;
    while (low < high) {
      const int32_t middle = (low + high + 1) / 2;
      if (first_tiles[middle] <= tile) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

static_assert(sizeof(SoftMaskTable<kSmallSoftMaskChunk>) < 4096);
static_assert(sizeof(SoftMaskTable<kLargeSoftMaskChunk>) <= 32764);

struct SoftMaskShared {
  int32_t tensor;
};

// Weights of one tensor that a block masks.
struct SoftMaskTile {
  const void* weights;
  const void* grads;
  void* results;
  int size;
  WeightType weight_type;
  WeightType w_hat_type;
};

template <int kCapacity>
__device__ SoftMaskTile tile_of(const SoftMaskTable<kCapacity>& table, int32_t tensor,
                                int32_t tile) {
  const int64_t begin = (tile - table.first_tiles[tensor]) * kSoftMaskTile;
  const auto weight_type = static_cast<WeightType>(table.weight_types[tensor]);
  const auto w_hat_type = static_cast<WeightType>(table.w_hat_types[tensor]);
  const auto* grads = static_cast<const char*>(table.grads[tensor]);
  const WeightType result_type = grads == nullptr ? w_hat_type : weight_type;
  return {static_cast<const char*>(table.weights[tensor]) + begin * bytes_of(weight_type),
          grads + begin * bytes_of(w_hat_type),
          static_cast<char*>(table.results[tensor]) + begin * bytes_of(result_type),
          static_cast<int>(min(kSoftMaskTile, table.sizes[tensor] - begin)),
          weight_type,
          w_hat_type};
}

// Returns w_hat, or dw for the gradient of w_hat.
template <MaskPass kPass, typename Mask, typename Real>
__device__ Real masked(const Mask& mask, Real weight, Real grad) {
  return kPass == MaskPass::kForward ? mask.value(weight) * weight
                                     : mask.w_hat_slope(weight) * grad;
}

template <typename Stored, int kElements>
__device__ bool is_aligned(const Stored* address) {
  return reinterpret_cast<uintptr_t>(address) % (kElements * sizeof(Stored)) == 0;
}

// Masks whole packets, of 16 bytes of the wider type, and returns how many elements they have. They
// are 0 if an array does not begin at a whole packet: one that torch allocates does.
template <MaskPass kPass, typename Weight, typename WHat, typename Mask>
__device__ int mask_packets(const SoftMaskTile& tile, const Mask& mask) {
  using Real = std::conditional_t<std::is_same_v<Weight, double>, double, float>;
  constexpr bool kForward = kPass == MaskPass::kForward;
  using Result = std::conditional_t<kForward, WHat, Weight>;
  constexpr int kElements = 16 / (sizeof(Weight) > sizeof(WHat) ? sizeof(Weight) : sizeof(WHat));
  constexpr int kInFlight = kForward ? 4 : 2;  // packets that a thread loads before it stores one
  const auto* weights = static_cast<const Weight*>(tile.weights);
  const auto* grads = static_cast<const WHat*>(tile.grads);
  auto* results = static_cast<Result*>(tile.results);
  if (!is_aligned<Weight, kElements>(weights) || !is_aligned<Result, kElements>(results) ||
      (!kForward && !is_aligned<WHat, kElements>(grads))) {
    return 0;
  }
  const int packets = tile.size / kElements;
  for (int first = threadIdx.x; first < packets; first += kInFlight * kSoftMaskThreads) {
    StoredPacket<Weight, kElements> weight[kInFlight] = {};
    StoredPacket<WHat, kElements> grad[kInFlight] = {};
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int packet = first + i * kSoftMaskThreads;
      if (packet < packets) weight[i].load(&weights[packet * kElements]);
      if (!kForward && packet < packets) grad[i].load(&grads[packet * kElements]);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      // Packets beyond the last are computed too: branches around them would cost all others more.
      Real values[kElements];
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        values[j] = masked<kPass>(mask, weight[i].get(j), kForward ? Real(0) : grad[i].get(j));
      }
      StoredPacket<Result, kElements> result;
      result.set(values);
      const int packet = first + i * kSoftMaskThreads;
      if (packet < packets) result.store(&results[packet * kElements]);
    }
  }
  return packets * kElements;
}

template <typename Real>
__device__ Real load_element(const void* data, WeightType type, int i) {
  switch (type) {
    case WeightType::kFloat64:
      return static_cast<Real>(static_cast<const double*>(data)[i]);
    case WeightType::kFloat32:
      return static_cast<const float*>(data)[i];
    case WeightType::kBFloat16:
      return widen(static_cast<const BFloat16*>(data)[i]);
    default:
      return widen(static_cast<const Half*>(data)[i]);
  }
}

template <typename Real>
__device__ void store_element(Real value, void* data, WeightType type, int i) {
  switch (type) {
    case WeightType::kFloat64:
      return narrow(value, static_cast<double*>(data)[i]);
    case WeightType::kFloat32:
      return narrow(value, static_cast<float*>(data)[i]);
    case WeightType::kBFloat16:
      return narrow(value, static_cast<BFloat16*>(data)[i]);
    default:
      return narrow(value, static_cast<Half*>(data)[i]);
  }
}

// Masks the elements from `begin` on, of any types at any addresses.
template <MaskPass kPass, typename Real, typename Mask>
__device__ void mask_elements(const SoftMaskTile& tile, const Mask& mask, int begin) {
  constexpr bool kForward = kPass == MaskPass::kForward;
  for (int i = begin + static_cast<int>(threadIdx.x); i < tile.size; i += kSoftMaskThreads) {
    const Real weight = load_element<Real>(tile.weights, tile.weight_type, i);
    const Real grad = kForward ? Real(0) : load_element<Real>(tile.grads, tile.w_hat_type, i);
    store_element(masked<kPass>(mask, weight, grad), tile.results,
                  kForward ? tile.w_hat_type : tile.weight_type, i);
  }
}

// Masks the packets of a tile whose types often occur together; of others, none.
template <MaskPass kPass, typename Mask>
__device__ int mask_packets_of_types(const SoftMaskTile& tile, const Mask& mask) {
  constexpr auto kF32 = WeightType::kFloat32, kBF16 = WeightType::kBFloat16;
  constexpr auto kF16 = WeightType::kFloat16, kF64 = WeightType::kFloat64;
  const WeightType weight = tile.weight_type, w_hat = tile.w_hat_type;
  if constexpr (std::is_same_v<decltype(mask.value(0)), double>) {
    if (w_hat == kF64) return mask_packets<kPass, double, double>(tile, mask);
  } else if (weight == kF32) {
    if (w_hat == kF32) return mask_packets<kPass, float, float>(tile, mask);
    if (w_hat == kBF16) return mask_packets<kPass, float, BFloat16>(tile, mask);
    if (w_hat == kF16) return mask_packets<kPass, float, Half>(tile, mask);
  } else if (weight == kBF16) {
    if (w_hat == kBF16) return mask_packets<kPass, BFloat16, BFloat16>(tile, mask);
    if (w_hat == kF32) return mask_packets<kPass, BFloat16, float>(tile, mask);
  } else {
    if (w_hat == kF16) return mask_packets<kPass, Half, Half>(tile, mask);
    if (w_hat == kF32) return mask_packets<kPass, Half, float>(tile, mask);
  }
  return 0;
}

// Block b masks tile b of the chunk.
template <MaskPass kPass, typename Real, bool kRelative, int kCapacity>
__global__ void __launch_bounds__(kSoftMaskThreads)
    soft_mask_list_kernel(const __grid_constant__ SoftMaskTable<kCapacity> table) {
  auto& shared = shared_memory<SoftMaskShared>();
  const auto block = static_cast<int32_t>(blockIdx.x);
  if (threadIdx.x == 0) shared.tensor = table.find(block);
  __syncthreads();
  const int32_t tensor = shared.tensor;
  const SoftMaskTile tile = tile_of(table, tensor, block);
  const SoftMask<Real, kRelative> mask(
      static_cast<const Real*>(table.thresholds)[tensor * table.threshold_stride],
      static_cast<const Real*>(table.taus)[tensor * table.tau_stride]);
  mask_elements<kPass, Real>(tile, mask, mask_packets_of_types<kPass>(tile, mask));
}

template <MaskPass kPass, typename Real, bool kRelative, int kCapacity>
void launch_mask_chunks(Launcher& launcher, const SoftMaskListRequest& request) {
  const auto tensors = static_cast<int64_t>(request.list.size());
  for (int64_t first = 0; first < tensors; first += kCapacity) {
    SoftMaskTable<kCapacity> table = {};
    table.thresholds =
        static_cast<const Real*>(request.thresholds) + first * request.threshold_stride;
    table.taus = static_cast<const Real*>(request.taus) + first * request.tau_stride;
    table.threshold_stride = request.threshold_stride;
    table.tau_stride = request.tau_stride;
    table.tensors = static_cast<int32_t>(std::min<int64_t>(kCapacity, tensors - first));
    int64_t tiles = 0;
    for (int32_t i = 0; i < table.tensors; ++i) {
      const MaskedWeight& each = request.list[first + i];
      table.weights[i] = each.weight;
      table.grads[i] = each.grad;
      table.results[i] = each.result;
      table.sizes[i] = each.size;
      table.first_tiles[i] = static_cast<int32_t>(tiles);
      table.weight_types[i] = static_cast<uint8_t>(each.weight_type);
      table.w_hat_types[i] = static_cast<uint8_t>(each.w_hat_type);
      tiles += (each.size + kSoftMaskTile - 1) / kSoftMaskTile;
    }
    if (tiles == 0) continue;
    launcher.launch(soft_mask_list_kernel<kPass, Real, kRelative, kCapacity>, tiles,
                    kSoftMaskThreads, sizeof(SoftMaskShared), table);
  }
}

template <MaskPass kPass, typename Real, bool kRelative>
void launch_masks(Launcher& launcher, const SoftMaskListRequest& request) {
  if (request.list.size() <= kSmallSoftMaskChunk) {
    launch_mask_chunks<kPass, Real, kRelative, kSmallSoftMaskChunk>(launcher, request);
  } else {
    launch_mask_chunks<kPass, Real, kRelative, kLargeSoftMaskChunk>(launcher, request);
  }
}

template <MaskPass kPass, typename Real>
void launch_masks_of(Launcher& launcher, const SoftMaskListRequest& request) {
  if (request.relative) {
    launch_masks<kPass, Real, true>(launcher, request);
  } else {
    launch_masks<kPass, Real, false>(launcher, request);
  }
}

// One launch for each chunk that is not empty.
template <MaskPass kPass>
cudaError_t launch_soft_mask_list(const SoftMaskListRequest& request, cudaStream_t stream) {
  Launcher launcher(stream);
  if (request.list[0].weight_type == WeightType::kFloat64) {
    launch_masks_of<kPass, double>(launcher, request);
  } else {
    launch_masks_of<kPass, float>(launcher, request);
  }
  return launcher.error();
}

}  // namespace pdp
