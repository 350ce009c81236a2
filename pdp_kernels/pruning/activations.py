"""Squared inputs of layers, summed over calibration batches: Wanda scales magnitudes by them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from pdp_kernels.pruning.evaluation import evaluated
from pdp_kernels.pruning.layers import ATTENTION_INPUTS, first_argument, weight_slots
from pdp_kernels.pruning.targets import Holder, Target

Squares = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Tensor]


def check_inputs_known(targets: Sequence[Target]) -> None:
    """Raise a ValueError if a weight is not one that multiplies the inputs of a known layer."""
    unknown = {
        holder.weight_name: type(holder.layer).__name__
        for target in targets
        for holder in target.holders
        if not weight_slots(holder.layer)
    }
    if unknown:
        texts = ", ".join(f"{name} of a {kind}" for name, kind in unknown.items())
        raise ValueError(
            'method "wanda" must have weights of Linear, convolution, MultiheadAttention or '
            f"Hugging Face Conv1D layers, got {texts}: exclude them, or prune by magnitude"
        )


@torch.no_grad()
def sum_input_squares(
    model: nn.Module,
    targets: Sequence[Target],
    calibration: Iterable[Any],
    forward: Callable[[nn.Module, Any], object],
) -> list[Tensor]:
    """Return, for each weight, the sum of the squares of the inputs that it multiplies.

    The model runs in evaluation mode. A weight that several layers hold has the inputs of all.

    Args:
        model: the model.
        targets: its weights.
        calibration: batches.
        forward: called as forward(model, batch).

    Returns:
        For each target a float64 tensor that broadcasts with the weight: its element for weight
        W_ij is the sum of X_j^2 over all vectors (of a convolution, all patches) of all batches.

    Raises:
        ValueError: no batch; a weight that no vector reaches; inputs with NaN or inf, or whose
            norms overflow.
    """
    sums: list[Tensor | None] = [None] * len(targets)
    handles: list[RemovableHandle] = []
    is_adding = False

    def add_calls(index: int, holder: Holder) -> None:
        squares = _squares_of(holder)

        def add(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            nonlocal is_adding
            if is_adding:  # a call that _squares_before_projection makes
                return
            if not first_argument(args, kwargs).numel():  # no vectors
                return
            is_adding = True
            try:
                found = squares(layer, args, kwargs, out)
            finally:
                is_adding = False
            before = sums[index]
            sums[index] = found if before is None else before + found

        called = holder.attention or holder.layer
        handles.append(called.register_forward_hook(add, with_kwargs=True))

    batches = 0
    try:
        for index, target in enumerate(targets):
            for holder in target.holders:
                add_calls(index, holder)
        with evaluated(model):
            for batch in calibration:
                forward(model, batch)
                batches += 1
    finally:
        for handle in handles:
            handle.remove()
    if not batches:
        raise ValueError("calibration must have at least one batch, got none")
    return _checked(targets, sums)


def _checked(targets: Sequence[Target], sums: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the sums, if there is one for each target and all are finite."""
    named = [(target.name, each) for target, each in zip(targets, sums, strict=True)]
    unreached = [name for name, each in named if each is None]
    if unreached:
        raise ValueError(
            f"calibration must reach every weight to prune, got no inputs for {unreached}: give "
            "more batches, exclude them, or let forward call their layers"
        )
    found = {name: each for name, each in named if each is not None}
    broken = [name for name, each in found.items() if not each.isfinite().all()]
    if broken:
        raise ValueError(
            "calibration must give inputs whose norms are finite in their own dtype, got NaN or "
            f"inf for {broken}"
        )
    return list(found.values())


def _squares_of(holder: Holder) -> Squares:
    """Return the function that takes a call of the holder's layer and returns its squares."""
    layer, slot = holder.layer, holder.slot
    if holder.attention is not None:
        return _squares_before_projection
    if isinstance(layer, nn.MultiheadAttention):
        return {
            "k_proj_weight": _squares_of_argument("key"),
            "v_proj_weight": _squares_of_argument("value"),
            "q_proj_weight": _squares_of_argument("query"),
        }.get(slot.name, _squares_of_joint_projection)
    if isinstance(layer, nn.modules.conv._ConvNd):
        return _squares_of_patches
    dim = slot.inputs

    def squares(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> Tensor:
        return _squares_of_vectors(first_argument(args, kwargs)).unsqueeze(1 - dim)

    return squares


def _squares_of_vectors(inputs: Tensor) -> Tensor:
    """Return the sum over all vectors along the last dimension, (features,)."""
    return torch.ops.pdp.channel_norms(inputs.detach(), inputs.dim() - 1, False).double().square()


def _squares_of_argument(name: str) -> Squares:
    """Return the function for a projection of one argument of MultiheadAttention."""

    def squares(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> Tensor:
        arguments = dict(zip(ATTENTION_INPUTS, args, strict=False)) | kwargs
        return _squares_of_vectors(arguments[name]).unsqueeze(0)

    return squares


def _squares_of_joint_projection(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Tensor:
    """Return the squares for in_proj_weight: a third of its rows projects each argument."""
    rows = cast(nn.MultiheadAttention, layer).embed_dim
    squares = [
        _squares_of_argument(name)(layer, args, kwargs, output).expand(rows, -1)
        for name in ATTENTION_INPUTS
    ]
    return torch.cat(squares)


def _squares_before_projection(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any
) -> Tensor:
    """Return the squares for the output projection, which the attention does not call.

    The attention runs again, with the identity for a projection.
    """
    projection = cast(nn.MultiheadAttention, layer).out_proj
    identity = torch.eye(projection.in_features, device=projection.weight.device)
    replaced = {"out_proj.weight": identity.to(projection.weight)}
    if projection.bias is not None:
        replaced["out_proj.bias"] = torch.zeros_like(projection.bias)
    attended = torch.func.functional_call(layer, replaced, args, kwargs)[0]
    return _squares_of_vectors(attended).unsqueeze(0)


def _squares_of_patches(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    """Return the squares of a convolution: over all patches, what each of its taps multiplies.

    That is the gradient of the sum of outputs with respect to taps, at squared inputs. The images
    are summed first, and one output channel of each group stands for all.
    """
    conv = cast(nn.modules.conv._ConvNd, layer)
    dimensions = len(conv.kernel_size)
    inputs = first_argument(args, kwargs)
    size, outputs = list(inputs.shape[-dimensions:]), list(output.shape[-dimensions:])
    squares = inputs.detach().double().square().reshape(-1, conv.in_channels, *size)
    squares = squares.sum(0, keepdim=True)
    per_group = conv.in_channels // conv.groups
    extra = [0] * dimensions
    if conv.transposed:
        shape = (conv.in_channels, 1, *conv.kernel_size)
        padding = [int(each) for each in conv.padding]
        spans = zip(size, conv.stride, padding, conv.dilation, conv.kernel_size, strict=True)
        for i, (n, stride, pad, dilation, kernel) in enumerate(spans):
            extra[i] = outputs[i] - ((n - 1) * stride - 2 * pad + dilation * (kernel - 1) + 1)
    else:
        shape = (conv.groups, per_group, *conv.kernel_size)
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        squares = functional.pad(squares, conv._reversed_padding_repeated_twice, mode=mode)
        padding = [0] * dimensions
    taps = squares.new_zeros(shape)
    ones = squares.new_ones(1, conv.groups, *outputs)
    sums: Tensor = torch.ops.aten.convolution_backward(
        ones,
        squares,
        taps,
        None,
        conv.stride,
        padding,
        conv.dilation,
        conv.transposed,
        extra,
        conv.groups,
        (False, True, False),
    )[1]
    if conv.transposed or conv.groups == 1:
        return sums
    return sums.repeat_interleave(conv.out_channels // conv.groups, 0)
