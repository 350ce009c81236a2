"""The reference: every operator written in PyTorch ops, each function beside its equation.

Runs on any device, never reads a value back to the host, and is the oracle of the tests: given
float64 arguments it computes in float64. The paper is Cho, Adya, Naik, "PDP: Parameter-free
Differentiable Pruning is All You Need", arXiv 2305.11203.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# The digits of a magnitude's key from the highest on, in bits, by the bytes of a weight.
DIGIT_BITS = {8: (11, 11, 11, 10, 10, 10), 4: (11, 10, 10), 2: (8, 7)}

INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_NO_KEY = torch.iinfo(torch.int64).max


def threshold_dtype(weights: Sequence[Tensor]) -> torch.dtype:
    """The dtype thresholds have, and masks are computed in: float64 for float64, else float32."""
    if any(weight.dtype == torch.float64 for weight in weights):
        return torch.float64
    return torch.float32


def prune_counts(weights: Sequence[Tensor], sparsities: Sequence[float]) -> Tensor:
    """k_i = floor(r_i n_i + 1/2), int64 (L,) on the weights' device.

    Filled value by value: a copy from host memory would wait for the device and could not be
    captured in a CUDA graph.
    """
    counts = [
        math.floor(sparsity * weight.numel() + 0.5)
        for weight, sparsity in zip(weights, sparsities, strict=True)
    ]
    device = weights[0].device
    if device.type == "cpu":
        return torch.tensor(counts, dtype=torch.int64)
    return torch.stack(
        [torch.full((), count, dtype=torch.int64, device=device) for count in counts]
    )


def midpoint(low: Tensor, high: Tensor) -> Tensor:
    """(low + high) / 2 for 0 <= low <= high, rounded once: no overflow, no lost denormal."""
    return torch.where(high > 1, 0.5 * low + 0.5 * high, 0.5 * (low + high))


def threshold_between(low: Tensor, high: Tensor, prune_count: Tensor, size: int | Tensor) -> Tensor:
    """t between v_k and v_{k+1} of n = size magnitudes: -inf for k = 0, +inf for k = n."""
    between = torch.where(prune_count >= size, math.inf, midpoint(low, high))
    return torch.where(prune_count <= 0, -math.inf, between)


def threshold(weight: Tensor, prune_count: Tensor) -> Tensor:
    """t = (v_k + v_{k+1}) / 2 of the sorted |w| (Algorithm 1, lines 14-16).

    k = 0 gives -inf, k = n gives +inf.
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
    """The threshold of every weight of a list, (L,)."""
    dtype = threshold_dtype(weights)
    each = map(threshold, weights, prune_counts.unbind())
    return torch.stack([t.to(dtype) for t in each])


def magnitude_keys(weight: Tensor) -> Tensor:
    """|w| as integers of the same order, (n,): its bits; every NaN is the one above inf."""
    integers = INTEGERS[weight.element_size()]
    infinity = torch.tensor(math.inf, dtype=weight.dtype).view(integers).item()
    bits = weight.detach().flatten().view(integers)
    return (bits & ((1 << (8 * weight.element_size() - 1)) - 1)).clamp(max=infinity + 1)


def magnitudes_of_keys(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """The magnitudes that have these keys."""
    return keys.to(INTEGERS[dtype.itemsize]).view(dtype)


def digit_counts(weights: Sequence[Tensor], prefixes: Tensor, digit: int) -> tuple[Tensor, Tensor]:
    """One pass of a radix select over parts of weights: what adds up to that over the whole.

    Of each weight: among the keys whose digits before this one are its prefix, how many have each
    value of this digit, int64 (L, 2^bits); and, at the last digit, its least key whose digits
    before are above the prefix, int64 (L,) (the largest int64 if none is, and at other digits).
    The weights have one size of element; prefixes: int64 (L,), 0 at digit 0.
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
    """True for the n - k weights kept; of equal ones the lowest flat index is pruned first."""
    order = weight.abs().flatten().sort(stable=True).indices
    kept = torch.arange(weight.numel(), device=weight.device) >= prune_count  # () or (1,)
    return torch.empty_like(kept).scatter_(0, order, kept).view(weight.shape)


def scale_and_temperature(threshold: Tensor, tau: Tensor, relative: bool) -> tuple[Tensor, Tensor]:
    """(q, tau') such that z = ((|w| - t) / q) ((|w| + |t|) / q) / tau'.

    Absolute: q = 1, tau' = tau. Relative (tau = c t^2): q = |t|, tau' = c, so that z depends on
    w / t alone and t^2 is never formed. At t = +-inf any finite q keeps the limit. At t = 0 the
    smallest normal number stands for both: z is 0 for w = 0 and saturates for every other w.
    """
    if not relative:
        return torch.ones_like(threshold), tau
    tiny = torch.finfo(threshold.dtype).tiny
    scale = torch.where(threshold.isinf(), 1, threshold.abs())
    return torch.where(threshold == 0, tiny, scale), torch.where(threshold == 0, tiny, tau)


def mask_exponent(weight: Tensor, threshold: Tensor, tau: Tensor, relative: bool) -> Tensor:
    """z = (|w| - t)(|w| + |t|) / tau: (w^2 - t^2) / tau for t >= 0 without the cancellation."""
    scale, tau = scale_and_temperature(threshold, tau, relative)
    magnitude = weight.to(threshold.dtype).abs()
    return ((magnitude - threshold) / scale) * ((magnitude + threshold.abs()) / scale) / tau


def sigmoid_slope(z: Tensor) -> Tensor:
    """m (1 - m), without the cancellation of m - m^2."""
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
    """m = sigmoid(z) and w_hat = m w (Eq. 1). Without return_mask the mask is an empty tensor."""
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
    """dw = g (m + 2 w^2/tau m(1-m)) + g_m 2 w/tau m(1-m) (Eq. 2, and through the mask itself)."""
    z = mask_exponent(weight, threshold, tau, relative)
    slope = sigmoid_slope(z)
    scale, tau = scale_and_temperature(threshold, tau, relative)
    scaled = weight.to(threshold.dtype) / scale
    grad = torch.zeros_like(z)
    # Where the slope has underflowed to 0 its factor may have overflowed: 0 * inf is no number.
    if grad_w_hat is not None:
        boost = torch.where(slope == 0, 0, 2 * scaled * scaled / tau * slope)
        grad = grad + grad_w_hat.to(z.dtype) * (torch.sigmoid(z) + boost)
    if grad_mask is not None:
        mask_slope = torch.where(slope == 0, 0, 2 * (scaled / scale) / tau * slope)
        grad = grad + grad_mask.to(z.dtype) * mask_slope
    return _like(weight, grad, weight.dtype)


def groups(values: Tensor, m: int, dim: int) -> Tensor:
    """The groups of M consecutive elements along dim, as (..., groups, M)."""
    return values.movedim(dim, -1).unflatten(-1, (-1, m))


def ungroup(grouped: Tensor, dim: int) -> Tensor:
    """The way back from `groups`."""
    return grouped.flatten(-2).movedim(-1, dim)


def group_thresholds(weight: Tensor, m: int, pruned: int, dim: int) -> Tensor:
    """t of every group, (..., groups, 1): each is a layer with k = pruned (section 3.4)."""
    dtype = threshold_dtype([weight])
    magnitudes = groups(weight, m, dim).abs().to(dtype).sort().values
    if pruned == 0:
        return torch.full_like(magnitudes[..., :1], -math.inf)
    return midpoint(magnitudes[..., pruned - 1 : pruned], magnitudes[..., pruned : pruned + 1])


def soft_mask_nm(
    weight: Tensor,
    tau: Tensor,
    m: int,
    pruned: int,
    dim: int,
    relative: bool,
    out_dtype: torch.dtype | None,
    return_mask: bool,
) -> tuple[Tensor, Tensor]:
    """The soft mask with a threshold for each group."""
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
    pruned: int,
    dim: int,
    relative: bool,
) -> Tensor:
    """The gradient of the soft mask, with each group's threshold a constant."""
    grads = [None if grad is None else groups(grad, m, dim) for grad in (grad_w_hat, grad_mask)]
    threshold = group_thresholds(weight, m, pruned, dim)
    grad = soft_mask_backward(*grads, groups(weight, m, dim), threshold, tau, relative)
    return _like(weight, ungroup(grad, dim), weight.dtype)


def hard_mask_nm(weight: Tensor, m: int, pruned: int, dim: int) -> Tensor:
    """True for the M - pruned kept of each group; of equal ones the lowest index goes first."""
    order = groups(weight, m, dim).abs().sort(stable=True).indices
    kept = torch.arange(m, device=weight.device) >= pruned
    kept = torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, kept.expand_as(order))
    return _like(weight, ungroup(kept, dim), torch.bool)


def channels(values: Tensor, dim: int) -> Tensor:
    """The channels along dim as rows, (C, fan-in)."""
    return values.movedim(dim, 0).flatten(1) if values.dim() > 1 else values.unsqueeze(1)


def along(values: Tensor, weight: Tensor, dim: int) -> Tensor:
    """One value per channel, (C,), in a shape that broadcasts over the weight."""
    return values.view([-1 if d == dim else 1 for d in range(weight.dim())])


def fan_in(weight: Tensor, dim: int) -> int:
    """Weights per channel; 1 where there are none, so that it can divide."""
    return max(1, weight.numel() // max(1, weight.shape[dim]))


def channel_norms(weight: Tensor, dim: int, rms: bool) -> Tensor:
    """s_c = ||W_c||_2, divided by sqrt(fan-in) if rms: (C,), summed in float64 (section 3.4)."""
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
    """w_hat_c = m(s_c) W_c, and m: Eq. 1 with a channel's norm in the place of |w|."""
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
    """dW_c = m_c g_c + 2/tau m_c (1 - m_c) (<g_c, W_c> + g_m,c) W_c / (fan-in if rms else 1).

    The pull of the norm is put together in float64: 2/tau alone overflows float32 for a relative
    temperature in a layer of small weights.
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
    # A channel of zeros, whose norm has no derivative, gets none through its norm.
    pull = torch.where(norms == 0, 0, factor.double() * through_mask / scale / norms).to(z.dtype)
    return _like(weight, grad + along(pull, weight, dim) * weight.to(z.dtype), weight.dtype)


def compress_2to4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The 2 largest of every 4 weights of a row, and where they stood, as CUTLASS reads them.

    Each group names two places i < j: those of its nonzeros among the weights kept; with fewer than
    two, torch's choice of zeros beside them. A metadata word holds i | j << 2 of four groups, and
    the words of 32 rows x 2 columns lie together, those of rows r, r + 8, ... next to each other.
    """
    fours = groups(weight, 4, -1)
    kept = groups(hard_mask_nm(weight, 4, 2, 1), 4, -1)
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
    """(d, sum |w|^p, sum |w|^q) over the d unpruned weights of each group, float64 (groups, 3).

    A group is a tensor, or with per_row a row of its dimension 0.
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
    """The values in the given dtype and in the memory layout every backend gives its results."""
    return torch.empty_like(weight, dtype=dtype, requires_grad=False).copy_(values)
