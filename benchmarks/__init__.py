"""Microbenchmarks of pdp_kernels against eager PyTorch and torch.compile: `python -m benchmarks`.

Steps: `threshold` (selection in one weight or in a network's list), `forward`, `backward` and
`mask` (both) at a given threshold, `step` (threshold and mask: what pruning adds to a training
step), and `copy`, the roof. Only on request: `mask-2:4` (N:M mask, forward and backward),
`pack-2:4` (pruning and packing for sparse tensor cores), `mask-channel` (norms, their threshold and
the channel mask, forward and backward), `pq-index` (PQ Index of each weight, beside PyTorch's
`sum`).

Masks: `relative` (a relative temperature as a 0-d tensor on the device: what PDPPruner computes as
recommended; the default) and, on request, `paper` (Eq. 1 with tau = 1e-4 as a number). The
headlines use the first of them.

Dtypes: `float32` and `bfloat16` are those of the weight and of w_hat; `float32/bfloat16` means
float32 weights and w_hat in bfloat16, as under autocast. Steps without a mask have the weight's.

Providers: `eager-kthvalue` (two torch.kthvalue calls, then Eq. 1 with autograd's own backward: the
base of the ratios), `eager-topk` (Algorithm 1 as printed, with two torch.topk calls), `one-topk`
and `sort` (other ways to select, by default only on a GPU), `compiled` (Eq. 1 through
torch.compile; in a step `compiled-kthvalue` or `compiled-sort`), and `ours`. `eager` is the mask
that the eager providers share.

Columns: `vs eager` is the median of the base over the median of the row; `IQR` the distance of the
quartiles over the median; `host (us/layer)` the time of the host for one call, divided by the
number of weights, on as many weights that are so small that kernels take next to no time;
`B/weight` the fewest bytes that the step can move (threshold: a weight; forward: a weight and an
element of w_hat; backward: two weights and an element of w_hat); `GB/s` these bytes over the
median, so that a provider that moves more has a lower rate; `of copy` that rate over the copy's.
Providers take turns, over batches that together exceed the last cache. On a GPU, times are between
CUDA events around one call that the host has launched while the device was still busy: they are the
device's alone. The host's column does not wait for the device. A loop takes the longer of the two.

Other benchmarks: `python -m benchmarks.training_step` (whole training steps), `benchmarks.host`
(masks and `pruner.step` for each layer, in models of tiny layers), `benchmarks.gains` (sizes of
checkpoints and latencies of pruned networks), `benchmarks.distributed` (thresholds of sharded
weights), `benchmarks.sparse_linear` (2:4 layers on a GPU).

NOTES.md says what gpu.sh runs on a GPU, and what each of its calls decides.
"""
