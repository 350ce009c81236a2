"""The reference: every operator in PyTorch ops, each function beside its equation.

The reference runs on any device and never reads a value back to the host. It is the oracle of the
tests: it computes in float64 when its arguments are float64. "The paper" is Cho, Adya, Naik, "PDP:
Parameter-free Differentiable Pruning is All You Need", arXiv 2305.11203.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Bits in each digit of a magnitude's key, most significant digit first, by bytes per weight.
DIGIT_BITS: dict[int, tuple[int, ...]] = {8: (11, 11, 11, 10, 10, 10), 4: (11, 10, 10), 2: (8, 7)}

INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_NO_KEY = torch.iinfo(torch.int64).max


def threshold_dtype(weights: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype of thresholds and mask arithmetic: float64 for float64, else float32."""
    for weight in weights:  # any() with a generator takes twice as long, in every call of a mask
        if weight.dtype == torch.float64:
            return torch.float64
    return torch.float32


def prune_counts(weights: Sequence[Tensor], sparsities: Sequence[float]) -> Tensor:
    """Return k_i = floor(r_i n_i + 1/2), int64 (L,), on the weights' device.

    A ratio outside [0, 1] acts as the nearer end, NaN as 0.
    """
    ratios = [min(max(0.0, ratio), 1.0) for ratio in sparsities]
    counts = [math.floor(r * w.numel() + 0.5) for w, r in zip(weights, ratios, strict=True)]
    device = weights[0].device
    if device.type == "cpu":
        return torch.tensor(counts, dtype=torch.int64, device=device)
    # A copy from host memory would wait for the device, and a CUDA graph could not capture it.
    return torch.stack([torch.full((), k, dtype=torch.int64, device=device) for k in counts])


def midpoint(low: Tensor, high: Tensor) -> Tensor:
    """Return (low + high) / 2 for 0 <= low <= high, rounded once, without over- or underflow."""
    return torch.where(high > 1, 0.5 * low + 0.5 * high, 0.5 * (low + high))


def threshold_between(low: Tensor, high: Tensor, prune_count: Tensor, size: int | Tensor) -> Tensor:
    """Return t between v_k = low and v_{k+1} = high: -inf for k = 0, +inf for k = size."""
    between = torch.where(prune_count >= size, math.inf, midpoint(low, high))
    return torch.where(prune_count <= 0, -math.inf, between)


def threshold(weight: Tensor, prune_count: Tensor) -> Tensor:
    """Return t = (v_k + v_{k+1}) / 2 of the sorted |w| (Algorithm 1, lines 14-16).

    t is -inf for k = 0 and +inf for k = n.
    """
    dtype = threshold_dtype([weight])
    count = weight.numel()
    if count == 0:
        return torch.full((), -math.inf, dtype=dtype, device=weight.device)
    magnitudes = weight.abs().flatten().sort().values
    ranks = torch.stack([prune_count - 1, prune_count]).clamp(0, count - 1)
    low, high = magnitudes.gather(0, ranks).to(dtype).unbind()
    return threshold_between(low, high, prune_count, count).to(dtype)


def thresholds(weights: Sequence[Tensor], prune_counts: Tensor) -> Tensor:
    """Return the threshold of each weight, (L,)."""
    dtype = threshold_dtype(weights)
    each = map(threshold, weights, prune_counts.unbind())
    return torch.stack([t.to(dtype) for t in each])


def magnitude_keys(weight: Tensor) -> Tensor:
    """Return integers that sort as |w| does, (n,): the bits of |w|; all NaN map to inf's + 1."""
    integers = INTEGERS[weight.element_size()]
    infinity = torch.tensor(math.inf, dtype=weight.dtype, device="cpu").view(integers).item()
    bits = weight.detach().flatten().view(integers)
    return (bits & ((1 << (8 * weight.element_size() - 1)) - 1)).clamp(max=infinity + 1)


def magnitudes_of_keys(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the magnitudes whose keys are given."""
    return keys.to(INTEGERS[dtype.itemsize]).view(dtype)


def digit_counts(weights: Sequence[Tensor], prefixes: Tensor, digit: int) -> tuple[Tensor, Tensor]:
    """Count the values of one digit of the keys: one pass of a radix select.

    Counts of shards add up to the counts of the global weight.

    Args:
        weights: L weights, all with one element size.
        prefixes: int64 (L,), the more significant digits of the searched key; 0 at digit 0.
        digit: the index of the digit, 0 for the most significant one.

    Returns:
        The histogram of the digit over the keys that start with the prefix, int64 (L, 2^bits); and
        at the last digit the smallest key whose more significant digits are above the prefix, int64
        (L,). The latter is the largest int64 if no such key exists, and at other digits.
    """
    bits = DIGIT_BITS[weights[0].element_size()]
    shift = sum(bits[digit + 1 :])
    counts, above = [], []
    for weight, prefix in zip(weights, prefixes.unbind(), strict=True):
        keys = magnitude_keys(weight)
        before = keys >> (shift + bits[digit])
        values = (keys >> shift) & ((1 << bits[digit]) - 1)
        matching = torch.where(before == prefix, values, 1 << bits[digit])
        counts.append(torch.bincount(matching, minlength=(1 << bits[digit]) + 1)[:-1])
        larger = torch.where(before > prefix, keys.long(), _NO_KEY)
        found = shift == 0 and digit > 0 and larger.numel() > 0
        above.append(larger.min() if found else prefixes.new_full((), _NO_KEY))
    return torch.stack(counts), torch.stack(above)


def hard_mask(weight: Tensor, prune_count: Tensor) -> Tensor:
    """Return True for the n - k kept weights. Ties are pruned in order of flat index."""
    order = weight.abs().flatten().sort(stable=True).indices
    kept = torch.arange(weight.numel(), device=weight.device) >= prune_count  # () or (1,)
    return torch.empty_like(kept).scatter_(0, order, kept).view(weight.shape)


def scale_and_temperature(threshold: Tensor, tau: Tensor, relative: bool) -> tuple[Tensor, Tensor]:
    """Return (q, tau') such that z = ((|w| - t) / q) ((|w| + |t|) / q) / tau'.

    An absolute temperature has q = 1 and tau' = tau. A relative one (tau = c t^2) has q = |t| and
    tau' = c: z depends on w / t alone, and t^2 cannot overflow. At t = +-inf any finite q keeps the
    limit. At t = 0 both are the smallest normal number: z is 0 for w = 0 and saturates elsewhere.
    """
    if not relative:
        return torch.ones_like(threshold), tau
    tiny = torch.finfo(threshold.dtype).tiny
    scale = torch.where(threshold.isinf(), 1, threshold.abs())
    return torch.where(threshold == 0, tiny, scale), torch.where(threshold == 0, tiny, tau)


def mask_exponent(weight: Tensor, threshold: Tensor, tau: Tensor, relative: bool) -> Tensor:
    """Return z = (|w| - t)(|w| + |t|) / tau, which is (w^2 - t^2) / tau without cancellation."""
    scale, tau = scale_and_temperature(threshold, tau, relative)
    magnitude = weight.to(threshold.dtype).abs()
    return ((magnitude - threshold) / scale) * ((magnitude + threshold.abs()) / scale) / tau


def sigmoid_slope(z: Tensor) -> Tensor:
    """Return m (1 - m) for m = sigmoid(z), without the cancellation of m - m^2."""
    decay = torch.exp(-z.abs())
    return decay / (1 + decay) ** 2


def soft_mask(
    weight: Tensor,
    threshold: Tensor,
    tau: Tensor,
    relative: bool,
    out_dtype: torch.dtype | None,
    return_mask: bool,
) -> tuple[Tensor, Tensor]:
    """Return w_hat = m w and m = sigmoid(z) (Eq. 1); m is empty unless return_mask."""
    out_dtype = out_dtype or weight.dtype
    mask = torch.sigmoid(mask_exponent(weight, threshold, tau, relative))
    w_hat = _like(weight, mask * weight.to(threshold.dtype), out_dtype)
    return w_hat, _like(weight, mask, out_dtype) if return_mask else w_hat.new_empty(0)


def soft_mask_backward(
    grad_w_hat: Tensor | None,
    grad_mask: Tensor | None,
    weight: Tensor,
    threshold: Tensor,
    tau: Tensor,
    relative: bool,
) -> Tensor:
    """Return dw = g (m + 2 w^2/tau m(1-m)) + g_m 2 w/tau m(1-m) (Eq. 2; g_m: mask's gradient)."""
    z = mask_exponent(weight, threshold, tau, relative)
    slope = sigmoid_slope(z)
    scale, tau = scale_and_temperature(threshold, tau, relative)
    scaled = weight.to(threshold.dtype) / scale
    grad = torch.zeros_like(z)
    # Where the slope underflows to 0 its factor may overflow, and 0 * inf is NaN.
    if grad_w_hat is not None:
        boost = torch.where(slope == 0, 0, 2 * scaled * scaled / tau * slope)
        grad = grad + grad_w_hat.to(z.dtype) * (torch.sigmoid(z) + boost)
    if grad_mask is not None:
        mask_slope = torch.where(slope == 0, 0, 2 * (scaled / scale) / tau * slope)
        grad = grad + grad_mask.to(z.dtype) * mask_slope
    return _like(weight, grad, weight.dtype)


def soft_mask_list(
    weights: Sequence[Tensor],
    thresholds: Tensor,
    taus: Tensor,
    relative: bool,
    out_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Return w_hat of each weight as `soft_mask` does, for thresholds and taus (T,)."""
    layers = zip(weights, thresholds.unbind(), taus.unbind(), strict=True)
    return [soft_mask(*layer, relative, out_dtype, False)[0] for layer in layers]


def soft_mask_list_backward(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    thresholds: Tensor,
    taus: Tensor,
    relative: bool,
) -> list[Tensor]:
    """Return dw of each weight as `soft_mask_backward` does; (0,) where the gradient is None."""
    layers = zip(grads, weights, thresholds.unbind(), taus.unbind(), strict=True)
    return [
        w.new_empty(0) if grad is None else soft_mask_backward(grad, None, w, t, tau, relative)
        for grad, w, t, tau in layers
    ]


def groups(values: Tensor, m: int, dim: int) -> Tensor:
    """Return the groups of M consecutive elements along dim, (..., groups, M)."""
    return values.movedim(dim, -1).unflatten(-1, (-1, m))


def ungroup(grouped: Tensor, dim: int) -> Tensor:
    """Return the tensor whose `groups` are given."""
    return grouped.flatten(-2).movedim(-1, dim)


def group_thresholds(weight: Tensor, m: int, pruned: Tensor, dim: int) -> Tensor:
    """Return t of each group, (..., groups, 1): a group is a layer with k = pruned (3.4)."""
    dtype = threshold_dtype([weight])
    magnitudes = groups(weight, m, dim).abs().to(dtype).sort().values
    ranks = torch.stack([pruned.view(()) - 1, pruned.view(())]).clamp(0, m - 1)
    low, high = magnitudes.index_select(-1, ranks).split(1, -1)
    return threshold_between(low, high, pruned, m)


def soft_mask_nm(
    weight: Tensor,
    tau: Tensor,
    m: int,
    pruned: Tensor,
    dim: int,
    relative: bool,
    out_dtype: torch.dtype | None,
    return_mask: bool,
) -> tuple[Tensor, Tensor]:
    """Return w_hat and m as `soft_mask` does, with one threshold per group."""
    threshold = group_thresholds(weight, m, pruned, dim)
    results = soft_mask(groups(weight, m, dim), threshold, tau, relative, out_dtype, return_mask)
    w_hat, mask = results
    w_hat = _like(weight, ungroup(w_hat, dim), w_hat.dtype)
    return w_hat, _like(weight, ungroup(mask, dim), mask.dtype) if return_mask else mask


def soft_mask_nm_backward(
    grad_w_hat: Tensor | None,
    grad_mask: Tensor | None,
    weight: Tensor,
    tau: Tensor,
    m: int,
    pruned: Tensor,
    dim: int,
    relative: bool,
) -> Tensor:
    """Return dw as `soft_mask_backward` does; each group's threshold is a constant."""
    threshold = group_thresholds(weight, m, pruned, dim)
    grad = soft_mask_backward(
        None if grad_w_hat is None else groups(grad_w_hat, m, dim),
        None if grad_mask is None else groups(grad_mask, m, dim),
        groups(weight, m, dim),
        threshold,
        tau,
        relative,
    )
    return _like(weight, ungroup(grad, dim), weight.dtype)


def hard_mask_nm(weight: Tensor, m: int, pruned: Tensor, dim: int) -> Tensor:
    """Return True for the M - pruned kept weights of each group. Ties are pruned by index."""
    order = groups(weight, m, dim).abs().sort(stable=True).indices
    kept = torch.arange(m, device=weight.device) >= pruned  # () or (1,)
    kept = torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, kept.expand_as(order))
    return _like(weight, ungroup(kept, dim), torch.bool)


def channels(values: Tensor, dim: int) -> Tensor:
    """Return the channels along dim as rows, (C, fan-in)."""
    return values.movedim(dim, 0).flatten(1) if values.dim() > 1 else values.unsqueeze(1)


def along(values: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Return one value per channel, (C,), in a shape that broadcasts over the weight."""
    return values.view([-1 if d == dim else 1 for d in range(weight.dim())])


def fan_in(weight: Tensor, dim: int) -> int:
    """Return the number of weights per channel, at least 1 so that it can divide."""
    return max(1, weight.numel() // max(1, weight.shape[dim]))


def channel_norms(weight: Tensor, dim: int, rms: bool) -> Tensor:
    """Return s_c = ||W_c||_2, over sqrt(fan-in) if rms, (C,), summed in float64 (3.4)."""
    squares = channels(weight, dim).double().square().sum(1)
    norms = (squares / fan_in(weight, dim) if rms else squares).sqrt()
    return norms.to(threshold_dtype([weight]))


def soft_mask_channel(
    weight: Tensor,
    norms: Tensor,
    threshold: Tensor,
    tau: Tensor,
    dim: int,
    relative: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Return w_hat_c = m(s_c) W_c, and m: Eq. 1 with the channel's norm in place of |w|."""
    out_dtype = out_dtype or weight.dtype
    mask = torch.sigmoid(mask_exponent(norms, threshold, tau, relative))
    w_hat = along(mask, weight, dim) * weight.to(threshold.dtype)
    return _like(weight, w_hat, out_dtype), mask.to(out_dtype)


def soft_mask_channel_backward(
    grad_w_hat: Tensor | None,
    grad_mask: Tensor | None,
    weight: Tensor,
    norms: Tensor,
    threshold: Tensor,
    tau: Tensor,
    dim: int,
    relative: bool,
    rms: bool,
) -> Tensor:
    """Return dW_c = m_c g_c + 2/tau m_c (1-m_c) (<g_c, W_c> + g_m,c) W_c / (fan-in if rms).

    The gradient through the norm is computed in float64: in a layer of small weights, 2/tau of a
    relative temperature overflows float32.
    """
    z = mask_exponent(norms, threshold, tau, relative)
    slope = sigmoid_slope(z)
    scale, tau = scale_and_temperature(threshold, tau, relative)
    factor = torch.where(slope == 0, 0, 2 * (norms / scale) / tau * slope)
    through_mask = torch.zeros_like(norms, dtype=torch.float64)
    grad = torch.zeros_like(weight, dtype=z.dtype)
    if grad_w_hat is not None:
        products = channels(grad_w_hat, dim).double() * channels(weight, dim).double()
        through_mask = through_mask + products.sum(1)
        grad = along(torch.sigmoid(z), weight, dim) * grad_w_hat.to(z.dtype)
    if grad_mask is not None:
        through_mask = through_mask + grad_mask.double()
    if rms:
        through_mask = through_mask / fan_in(weight, dim)
    # The norm of a channel of zeros has no derivative: no gradient flows through it.
    pull = torch.where(norms == 0, 0, factor.double() * through_mask / scale / norms)
    return _like(weight, grad + along(pull, weight, dim) * weight.double(), weight.dtype)


def compress_2to4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 2 largest of every 4 weights in a row, and their positions in CUTLASS's layout.

    A group names two positions i < j: those of its nonzero kept weights, filled up with the zeros
    that torch chooses if there are fewer than two. A metadata word holds i | j << 2 of four groups.
    The words of 32 rows x 2 columns are contiguous, with rows r, r + 8, ... next to each other.
    """
    fours = groups(weight, 4, -1)
    kept = groups(hard_mask_nm(weight, 4, torch.full((), 2, device=weight.device), 1), 4, -1)
    at_0, at_1, _, at_3 = (kept & (fours != 0)).unbind(-1)
    first = torch.where(at_0, 0, torch.where(at_1, 1, 2))
    second = torch.where(at_0 & at_1, 1, torch.where((at_0 | at_1) & ~at_3, 2, 3))
    values = fours.gather(-1, torch.stack([first, second], dim=-1)).flatten(-2)

    shifts = torch.arange(0, 16, 4, device=weight.device)
    words = ((first | second << 2).unflatten(-1, (-1, 4)) << shifts).sum(-1).to(torch.int16)
    blocks = words.view(words.shape[0] // 32, 2, 2, 8, -1, 2)  # block, half, quarter, lane, pair
    return values, blocks.permute(4, 0, 3, 1, 5, 2).reshape(words.shape)


def power_sums(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    p: float,
    q: float,
    per_row: bool,
) -> Tensor:
    """Return (d, sum |w|^p, sum |w|^q) over the d kept weights of each group, float64 (groups, 3).

    A group is a tensor, or a row of its dimension 0 if per_row.
    """
    sums = []
    for weight, mask in zip(weights, masks, strict=True):
        kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
        magnitude = torch.where(kept, weight, 0).double().abs()
        terms = torch.stack([kept.double(), magnitude**p, magnitude**q], dim=-1)
        terms = terms if per_row else terms.unsqueeze(0)
        sums.append(terms.flatten(1, -2).sum(1) if terms.dim() > 2 else terms)
    return torch.cat(sums)


def _like(weight: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values in the given dtype and in the layout that all backends return."""
    return torch.empty_like(weight, dtype=dtype, requires_grad=False).copy_(values)
