"""Soft mask on GPUs: w_hat = sigmoid(z) w and its backward, each in one pass over the weight.

The equations are those of pdp_kernels/ops/reference.py. The forward moves 8 bytes per float32
weight, the backward 12.

A kernel for 16-bit weights has few instructions to spend before they, and not memory, bound its
time. So in float32 all divisions but one are of scalars. In float64 the operations are those of the
reference, for rounding log2(e) z costs more of its error budget than there is.
"""

import math

import torch
import triton
import triton.language as tl
from pdp_kernels.triton_kernels.launch import Launcher
from torch import Tensor

# Elements per program, half as many in float64: for float32, loads of 16 bytes and 4 loads per
# thread. On an H100 10^8 weights run at 3.0 TB/s, forward and backward, as a copy does. Other
# sizes are not yet measured.
BLOCK = 2048
NUM_WARPS = 4

TINY = {dtype: torch.finfo(dtype).tiny for dtype in (torch.float64, torch.float32)}

# Options of kernels that are compiled once for all sizes and addresses. What they need to know of
# addresses is an argument: whether they are multiples of 16.
POINTERS = ("weight", "threshold", "tau", "w_hat", "mask", "grad_w_hat", "grad_mask", "grad")
ONE_VARIANT = {
    "do_not_specialize": ["numel"],
    "do_not_specialize_on_alignment": [f"{name}_ptr" for name in POINTERS],
}

HALF_LOG2_E = tl.constexpr(0.5 / math.log(2))
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)

# Whether kernels may use NVIDIA's instructions: Triton's interpreter and AMD GPUs cannot.
PTX = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)


@triton.jit
def scale_and_temperature(t, tau, RELATIVE: tl.constexpr, TINY: tl.constexpr):
    """Return (q, tau') of reference.scale_and_temperature."""
    scale = 1.0
    if RELATIVE:
        magnitude = tl.abs(t)
        scale = tl.where(magnitude == float("inf"), 1.0, tl.where(t == 0, TINY, magnitude))
        tau = tl.where(t == 0, TINY, tau)
    return scale, tau


@triton.jit
def mask_exponent(w, t, scale, tau, RELATIVE: tl.constexpr):
    """Return z = ((|w| - t) / q) ((|w| + |t|) / q) / tau'."""
    magnitude = tl.abs(w)
    difference = magnitude - t
    total = magnitude + tl.abs(t)
    if RELATIVE:
        difference = difference / scale
        total = total / scale
    return difference * total / tau


@triton.jit
def mask_and_slope(z):
    """Return m = sigmoid(z), and m (1 - m) without the cancellation of m - m^2."""
    decay = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0, decay) / (1 + decay), decay / ((1 + decay) * (1 + decay))


@triton.jit
def power_of_two(scale):
    """Return a power of two whose product with the scale is in [1, 4), or below 1 if subnormal.

    The bits of 2^-n are those of 1, twice, less those of 2^n. Limits keep the result normal.
    """
    exponent = scale.to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.minimum(tl.maximum(exponent, 0x00800000), 0x7E800000)
    return (0x7F000000 - exponent).to(tl.float32, bitcast=True)


@triton.jit
def lift_and_curvature(t, tau, RELATIVE: tl.constexpr, TINY: tl.constexpr):
    """Return lift, a power of two, and 2 / ((q lift)^2 tau').

    The lift takes q to about 1, for q^2 may be too large or too small for float32.
    """
    lift = 1.0
    curvature = 2.0 / tau
    if RELATIVE:
        scale, tau = scale_and_temperature(t, tau, RELATIVE, TINY)
        lift = power_of_two(scale)
        scale = scale * lift
        curvature = 2.0 / tau / (scale * scale)
    # Infinity would make z NaN at |w| = t. 2^127 in its place is wrong only for subnormal numbers:
    # where tau and w^2 - t^2 are, and in the gradient at |w| = t where tau or t is.
    return lift, tl.where(curvature == float("inf"), 2.0 / TINY, curvature)


@triton.jit
def binary_exponent(w, lift, t, curvature):
    """Return log2(e) z; t is lifted."""
    # Products with `lift` are exact, so each sum is one fused multiply-add.
    difference = tl.abs(w) * lift - t
    total = tl.abs(w) * lift + tl.abs(t)
    return difference * (curvature * HALF_LOG2_E) * total


@triton.jit
def reciprocal(x):
    """Return 1 / x for x >= 1, off by at most 1 ulp; PTX has 0 where that is subnormal.

    A division would take 4 instructions more, for dividends and divisors of any size.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def lifted_mask_value(w, lift, t, curvature):
    """Return m in float32; t is lifted."""
    return reciprocal(1 + tl.exp2(-binary_exponent(w, lift, t, curvature)))


@triton.jit
def lifted_mask_slopes(w, lift, t, curvature):
    """Return the derivatives of w_hat and of m in float32; t is lifted."""
    exponent = binary_exponent(w, lift, t, curvature)
    decay = tl.exp2(-tl.abs(exponent))
    larger = reciprocal(1 + decay)
    smaller = decay * larger
    slope = larger * smaller
    # Where the slope m (1 - m) underflows to 0 its factor may overflow, and 0 * inf is NaN.
    factor = w * lift * curvature
    boost = tl.minimum(factor * (w * lift), LARGEST) * slope
    m = tl.where(exponent >= 0, larger, smaller)
    return m + boost, tl.where(slope == 0, 0.0, factor * slope * lift)


@triton.jit
def soft_mask_value(w, t, tau, RELATIVE: tl.constexpr, TINY: tl.constexpr):
    """Return m = sigmoid(z)."""
    if w.dtype == tl.float64:
        scale, tau = scale_and_temperature(t, tau, RELATIVE, TINY)
        m, _ = mask_and_slope(mask_exponent(w, t, scale, tau, RELATIVE))
        return m
    else:
        lift, curvature = lift_and_curvature(t, tau, RELATIVE, TINY)
        return lifted_mask_value(w, lift, t * lift, curvature)


@triton.jit
def soft_mask_slopes(w, t, tau, RELATIVE: tl.constexpr, TINY: tl.constexpr):
    """Return m + 2 w^2/tau m(1-m) and 2 w/tau m(1-m): the derivatives of w_hat and of m."""
    if w.dtype == tl.float64:
        scale, tau = scale_and_temperature(t, tau, RELATIVE, TINY)
        m, slope = mask_and_slope(mask_exponent(w, t, scale, tau, RELATIVE))
        scaled = w / scale if RELATIVE else w
        factor = scaled / scale if RELATIVE else w
        # The factor of a slope of 0 may be infinite, as in lifted_mask_slopes.
        boost = tl.where(slope == 0, 0.0, 2 * scaled * scaled / tau * slope)
        return m + boost, tl.where(slope == 0, 0.0, 2 * factor / tau * slope)
    else:
        lift, curvature = lift_and_curvature(t, tau, RELATIVE, TINY)
        return lifted_mask_slopes(w, lift, t * lift, curvature)


@triton.jit
def store(ptr, value, inside):
    """Store a value; float64 goes to 16 bits through float32, as no instruction does both."""
    dtype = ptr.dtype.element_ty
    if dtype.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    tl.store(ptr, value.to(dtype), mask=inside)


@triton.jit
def _first(ptr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Return the address of this program's first element. ALIGNED: `ptr` is a multiple of 16."""
    first = ptr + tl.program_id(0).to(tl.int64) * BLOCK
    return tl.multiple_of(first, 16) if ALIGNED else first


@triton.jit
def _count(numel, BLOCK: tl.constexpr):
    """Return how many elements this program has: BLOCK, or fewer if it is the last."""
    return tl.minimum(numel - tl.program_id(0).to(tl.int64) * BLOCK, BLOCK).to(tl.int32)


@triton.jit
def _forward(
    weight_ptr,
    t,
    tau,
    w_hat_ptr,
    mask_ptr,
    i,
    inside,
    RELATIVE: tl.constexpr,
    TINY: tl.constexpr,
):
    """Mask elements i: those `inside`, or all if that is None."""
    w = tl.load(weight_ptr + i, mask=inside).to(t.dtype)
    m = soft_mask_value(w, t, tau, RELATIVE, TINY)
    store(w_hat_ptr + i, m * w, inside)
    if mask_ptr is not None:
        store(mask_ptr + i, m, inside)


@triton.jit
def _backward(
    grad_w_hat_ptr,
    grad_mask_ptr,
    weight_ptr,
    t,
    tau,
    grad_ptr,
    i,
    inside,
    RELATIVE: tl.constexpr,
    TINY: tl.constexpr,
):
    """Write the gradients of elements i: those `inside`, or all if that is None."""
    w = tl.load(weight_ptr + i, mask=inside).to(t.dtype)
    w_hat_slope, mask_slope = soft_mask_slopes(w, t, tau, RELATIVE, TINY)
    grad = tl.zeros_like(w)
    if grad_w_hat_ptr is not None:
        grad += tl.load(grad_w_hat_ptr + i, mask=inside).to(t.dtype) * w_hat_slope
    if grad_mask_ptr is not None:
        grad += tl.load(grad_mask_ptr + i, mask=inside).to(t.dtype) * mask_slope
    store(grad_ptr + i, grad, inside)


@triton.jit(**ONE_VARIANT)
def _soft_mask_fwd_kernel(
    weight_ptr,
    threshold_ptr,
    tau_ptr,
    w_hat_ptr,
    mask_ptr,
    numel: tl.int64,
    RELATIVE: tl.constexpr,
    TINY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t, tau = tl.load(threshold_ptr), tl.load(tau_ptr)
    weight_ptr = _first(weight_ptr, ALIGNED, BLOCK)
    w_hat_ptr = _first(w_hat_ptr, ALIGNED, BLOCK)
    if mask_ptr is not None:
        mask_ptr = _first(mask_ptr, ALIGNED, BLOCK)
    count = _count(numel, BLOCK)
    if count == BLOCK:
        i = tl.arange(0, BLOCK)
        _forward(weight_ptr, t, tau, w_hat_ptr, mask_ptr, i, None, RELATIVE, TINY)
    else:
        part: tl.constexpr = BLOCK // 4  # masks of more would take more registers than a tile does
        done = 0
        while done < count:
            i = done + tl.arange(0, part)
            _forward(weight_ptr, t, tau, w_hat_ptr, mask_ptr, i, i < count, RELATIVE, TINY)
            done += part


@triton.jit(**ONE_VARIANT)
def _soft_mask_bwd_kernel(
    grad_w_hat_ptr,
    grad_mask_ptr,
    weight_ptr,
    threshold_ptr,
    tau_ptr,
    grad_ptr,
    numel: tl.int64,
    RELATIVE: tl.constexpr,
    TINY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t, tau = tl.load(threshold_ptr), tl.load(tau_ptr)
    if grad_w_hat_ptr is not None:
        grad_w_hat_ptr = _first(grad_w_hat_ptr, ALIGNED, BLOCK)
    if grad_mask_ptr is not None:
        grad_mask_ptr = _first(grad_mask_ptr, ALIGNED, BLOCK)
    weight_ptr = _first(weight_ptr, ALIGNED, BLOCK)
    grad_ptr = _first(grad_ptr, ALIGNED, BLOCK)
    count = _count(numel, BLOCK)
    if count == BLOCK:
        i = tl.arange(0, BLOCK)
        _backward(
            grad_w_hat_ptr, grad_mask_ptr, weight_ptr, t, tau, grad_ptr, i, None, RELATIVE, TINY
        )
    else:
        part: tl.constexpr = BLOCK // 4  # masks of more would take more registers than a tile does
        done = 0
        while done < count:
            i = done + tl.arange(0, part)
            inside = i < count
            _backward(
                grad_w_hat_ptr,
                grad_mask_ptr,
                weight_ptr,
                t,
                tau,
                grad_ptr,
                i,
                inside,
                RELATIVE,
                TINY,
            )
            done += part


launch_forward: Launcher = Launcher(_soft_mask_fwd_kernel)
launch_backward: Launcher = Launcher(_soft_mask_bwd_kernel)


def soft_mask(
    weight: Tensor,
    threshold: Tensor,
    tau: Tensor,
    relative: bool,
    out_dtype: torch.dtype | None,
    return_mask: bool,
) -> tuple[Tensor, Tensor]:
    """Implement pdp::soft_mask; arguments as reference.soft_mask."""
    w_hat = torch.empty_like(weight, dtype=out_dtype, requires_grad=False)
    mask = torch.empty_like(w_hat) if return_mask else w_hat.new_empty(0)
    numel = weight.numel()
    if numel > 0:
        ordered = in_order_of(w_hat, weight)
        block = BLOCK if threshold.dtype == torch.float32 else BLOCK // 2
        aligned = ordered.data_ptr() % 16 == 0
        constants = (relative, TINY[threshold.dtype], aligned, block)
        with torch.cuda.device_of(weight):
            launch_forward(
                -(-numel // block),
                (w_hat.device, weight.dtype, w_hat.dtype, return_mask, *constants),
                ordered,
                threshold,
                tau,
                w_hat,
                mask if return_mask else None,
                numel,
                *constants,
                num_warps=NUM_WARPS,
            )
    return w_hat, mask


def soft_mask_backward(
    grad_w_hat: Tensor | None,
    grad_mask: Tensor | None,
    weight: Tensor,
    threshold: Tensor,
    tau: Tensor,
    relative: bool,
) -> Tensor:
    """Implement pdp::soft_mask_backward; arguments as reference.soft_mask_backward."""
    grad = torch.empty_like(weight, requires_grad=False)
    numel = weight.numel()
    if numel > 0:
        weight = in_order_of(grad, weight)
        aligned = weight.data_ptr() % 16 == 0
        block = BLOCK if threshold.dtype == torch.float32 else BLOCK // 2
        if grad_w_hat is not None:
            grad_w_hat = in_order_of(grad, grad_w_hat)
            aligned &= grad_w_hat.data_ptr() % 16 == 0
        if grad_mask is not None:
            grad_mask = in_order_of(grad, grad_mask)
            aligned &= grad_mask.data_ptr() % 16 == 0
        constants = (relative, TINY[threshold.dtype], aligned, block)
        dtypes = (
            grad_w_hat if grad_w_hat is None else grad_w_hat.dtype,
            grad_mask if grad_mask is None else grad_mask.dtype,
            weight.dtype,
        )
        with torch.cuda.device_of(weight):
            launch_backward(
                -(-numel // block),
                (weight.device, *dtypes, *constants),
                grad_w_hat,
                grad_mask,
                weight,
                threshold,
                tau,
                grad,
                numel,
                *constants,
                num_warps=NUM_WARPS,
            )
    return grad


def in_order_of(layout: Tensor, values: Tensor) -> Tensor:
    """Return the values in the memory order of `layout`, a result of empty_like.

    They are copied only if that order is another. The stride of a dimension of size 1 is arbitrary.
    """
    if values.stride() == layout.stride():
        return values
    dimensions = zip(values.shape, values.stride(), layout.stride(), strict=True)
    if all(size == 1 or own == other for size, own, other in dimensions):
        return values
    return torch.empty_like(layout, dtype=values.dtype).copy_(values)
