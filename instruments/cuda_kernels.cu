// Every CUDA kernel of the package, without Torch, for the reports of instruments/compiled.py.
#include "../csrc/cuda/digit_counts.cuh"
#include "../csrc/cuda/hard_mask.cuh"
#include "../csrc/cuda/power_sums.cuh"
#include "../csrc/cuda/prune_counts.cuh"
#include "../csrc/cuda/soft_mask_list.cuh"
#include "../csrc/cuda/thresholds.cuh"

// The compiler generates the kernels that a function launches.
cudaError_t launch_all(const pdp::ThresholdRequest& thresholds,
                       const pdp::DigitCountsRequest& digit_counts,
                       const pdp::HardMaskRequest& hard_mask,
                       const pdp::PowerSumsRequest& power_sums,
                       const pdp::SoftMaskListRequest& soft_masks,
                       const std::vector<int64_t>& counts, int64_t* prune_counts, void* workspace,
                       cudaStream_t stream) {
  for (const cudaError_t error :
       {pdp::launch_thresholds(thresholds, workspace, stream),
        pdp::launch_digit_counts(digit_counts, workspace, stream),
        pdp::launch_hard_mask(hard_mask, workspace, stream),
        pdp::launch_power_sums(power_sums, workspace, stream),
        pdp::launch_soft_mask_list<pdp::MaskPass::kForward>(soft_masks, stream),
        pdp::launch_soft_mask_list<pdp::MaskPass::kBackward>(soft_masks, stream),
        pdp::launch_prune_counts(counts, prune_counts, stream)}) {
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
