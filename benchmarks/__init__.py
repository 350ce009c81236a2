"""Microbenchmarks: pdp_kernels against eager PyTorch and torch.compile. `python -m benchmarks`.

Steps: `threshold` (selection over one weight or a network's list), `forward`, `backward` and `mask`
(both) at a given threshold, `step` (threshold + mask: what pruning adds to a training step),
`copy`, the roof, and by name alone `mask-2:4` (the N:M mask, forward and backward), `pack-2:4`
(pruning and packing for sparse tensor cores), `mask-channel` (norms, their threshold and the
channel mask, forward and backward) and `pq-index` (the PQ Index of each weight; `sum` is PyTorch's
plain sum of it).

Masks: `paper` (a temperature of 1e-4, w_hat in the weight's dtype; the base of the headlines) and
`pruner` (a relative temperature on the device, w_hat in bfloat16: a PDPPruner under autocast).

Providers: `eager-kthvalue` (two torch.kthvalue calls, then Eq. 1 with autograd's own backward: the
base of the ratios), `eager-topk` (Algorithm 1 as printed, with two torch.topk calls), `one-topk`
and `sort` (other ways to select, by default on a GPU only), `compiled` (Eq. 1 through
torch.compile; in a step after `compiled-kthvalue` or `compiled-sort`), and `ours`. `eager` is the
mask that the eager providers share.

Columns: `vs eager` is the median of the base over the median of the row; `IQR` the distance of the
quartiles over the median; `B/weight` the fewest bytes the step can move (threshold 1 weight per
weight; forward 1 and an element of w_hat; backward 2 and one); `GB/s` those bytes over the median,
so that a provider that moves more shows a lower figure; `of copy` that figure over the copy's.
Providers take turns, over batches that together exceed the last cache. On a GPU times are between
CUDA events around one call.

On a GPU: NOTES.md says what gpu.sh runs, and what each of its calls decides.
"""
