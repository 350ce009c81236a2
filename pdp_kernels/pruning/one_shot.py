"""Pruning at once, without training: by magnitude, or by magnitude and activations (Wanda)."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from pdp_kernels.distributed.shards import reshard
from pdp_kernels.functional.soft_mask_nm import hard_mask_nm
from pdp_kernels.functional.validation import NUMBERS, check_one_of, check_plain_weight
from pdp_kernels.pruning.activations import check_inputs_known, sum_input_squares
from pdp_kernels.pruning.budgets import check_budgets, final_counts
from pdp_kernels.pruning.config import PDPConfig
from pdp_kernels.pruning.evaluation import run_model
from pdp_kernels.pruning.masked_layer import check_unmasked
from pdp_kernels.pruning.masks import GroupMask, SelectedMask, WeightMask
from pdp_kernels.pruning.patterns import ChannelPattern, GroupPattern
from pdp_kernels.pruning.report import PruningReport, ReportHistory
from pdp_kernels.pruning.targets import Holder, Target, find_targets

Method = Literal["magnitude", "wanda"]


@torch.no_grad()
def prune_one_shot(
    model: nn.Module,
    config: float | PDPConfig,
    *,
    method: Method = "magnitude",
    calibration: Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> PruningReport:
    """Set the least important weights of a model to zero, at once and in place.

    The weights, patterns, sparsities and budgets are those that `PDPPruner` ends with for the same
    configuration. "magnitude" prunes the weights that its finalize would prune now. "wanda" (Sun et
    al., ICLR 2024, arXiv 2306.11695) compares, in place of |W_ij|, the scores:

        S_ij = |W_ij| ||X_j||_2                                                        (Eq. 1)

    where X_j is input j over all vectors of the calibration batches: tokens of a Linear layer,
    patches of a convolution. It prunes the same number in each row, that is for each output. If a
    layer's number is not divisible by its rows, the rows whose next score is least prune one more.
    In N:M groups it keeps the N largest scores. Equal scores are pruned in the order of the
    columns. The inputs are those of the unpruned model, found in one run over the batches. (The
    authors' program runs a language model block by block, and measures each block behind pruned
    ones.)

    To train the pruned model, keep its zeros with `freeze_zeros`. Or let `PDPPruner` go on from it:
    at the same sparsity its hard mask is this one, as no magnitude is less than zero:

        report = prune_one_shot(model, config, method="wanda", calibration=batches)
        weights = [model.get_parameter(layer.name) for layer in report.layers]
        freeze_zeros(weights, optimizer)

    Args:
        model: a model without masks of a pruner. For "magnitude" it may be sharded as for
            `PDPPruner`; every rank then calls the function.
        config: what to prune and how far; its times and temperatures do not matter. A sparsity
            stands for PDPConfig(sparsity), and with "wanda" for PDPConfig(sparsity, scope="layer"),
            the paper's. With a global budget "wanda" prunes as many weights of each layer as
            "magnitude", but others.
        method: "magnitude" or "wanda".
        calibration: batches for "wanda", such as a list or a DataLoader. The model runs on each
            once, in evaluation mode.
        forward: called as forward(model, batch), such as ``lambda model, batch: model(batch[0])``.
            Default: the batch is one argument, a tuple of arguments, or a mapping of keyword
            arguments.

    Returns:
        A `PruningReport` of what is zero now.

    Raises:
        TypeError: an argument of another type; a sharded weight for "wanda"; or as `PDPPruner`.
        ValueError: another method; calibration or forward missing, or given for "magnitude"; no
            batch; weights that no batch reaches; inputs with NaN or inf; for "wanda" channels, or
            weights of layers whose inputs are not known; a model with masks, or on the meta device;
            or as `PDPPruner`. The model stays as it was.

    Examples:
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[0.1, -0.4, 0.3, 0.2]]))
        >>> inputs = torch.tensor([[9.0, 1.0, 1.0, 1.0]])
        >>> prune_one_shot(model, 0.5, method="wanda", calibration=[inputs]).pruned
        2
        >>> model.weight.detach()
        tensor([[ 0.1000, -0.4000,  0.0000,  0.0000]])
    """
    check_one_of("method", method, get_args(Method))
    targets, config = _targets(model, config, method)
    masks = [target.new_mask() for target in targets]
    if method == "magnitude":
        _check_no_calibration(calibration, forward)
        reshard(model)
        counts = final_counts(targets, masks, config)
        for target, mask in zip(targets, masks, strict=True):
            _prune_by_magnitude(target, mask, counts[target.name])
    else:
        _check_calibration(targets, calibration, forward)
        counts = final_counts(targets, masks, config)
        squares = sum_input_squares(model, targets, calibration or (), forward or run_model)
        for target, each in zip(targets, squares, strict=True):
            _prune_by_score(target, each, counts[target.name])
    return ReportHistory().report(model, targets, None, 0.0, None)


def _targets(
    model: nn.Module, config: float | PDPConfig, method: Method
) -> tuple[list[Target], PDPConfig]:
    """Return the weights to prune, and the configuration."""
    if not isinstance(config, PDPConfig):
        if isinstance(config, bool) or not isinstance(config, NUMBERS):
            raise TypeError(
                f"config must be a sparsity or a PDPConfig, got {type(config).__name__}"
            )
        config = PDPConfig(config, scope="layer" if method == "wanda" else "global")
    targets = find_targets(model, config)
    check_unmasked(model, "finalize its pruner first, or prune pruner.pruned_copy()")
    check_budgets(targets, config)
    meta = [target.name for target in targets if target.weight.is_meta]
    if meta:
        raise ValueError(f"model must have values for its weights, got {meta} on the meta device")
    return targets, config


def _check_no_calibration(calibration: object, forward: object) -> None:
    for name, value in (("calibration", calibration), ("forward", forward)):
        if value is not None:
            raise ValueError(
                f'{name} must be left out with method "magnitude", which needs no inputs, got a '
                f"{type(value).__name__}"
            )


def _check_calibration(targets: list[Target], calibration: object, forward: object) -> None:
    if calibration is None:
        raise ValueError('calibration must be given with method "wanda", got None')
    if isinstance(calibration, Tensor) or not isinstance(calibration, Iterable):
        raise TypeError(
            "calibration must be an iterable of batches, such as a list of one, got a "
            f"{type(calibration).__name__}"
        )
    if forward is not None and not callable(forward):
        raise TypeError(f"forward must be callable, got {type(forward).__name__}")
    for target in targets:
        check_plain_weight(f"model's {target.name}", target.weight)
        if isinstance(target.plan.pattern, ChannelPattern):
            raise ValueError(
                f'method "wanda" has scores of single weights, got pattern "channel" for '
                f'{target.name}: use method "magnitude"'
            )
    check_inputs_known(targets)


def _prune_by_magnitude(target: Target, mask: WeightMask, count: int) -> None:
    if isinstance(mask, SelectedMask):
        mask.prune_count = torch.tensor([count], device=target.weight.device)
    else:
        assert isinstance(mask, GroupMask)
        mask.pruned = torch.full((), mask.prunable, device=target.weight.device)
    mask.prune(target.weight)


def _prune_by_score(target: Target, squares: Tensor, count: int) -> None:
    """Prune one weight, given the squares of its inputs."""
    weight, holder, pattern = target.weight.detach(), target.holders[0], target.plan.pattern
    scores = weight.double().abs() * squares.sqrt()
    if isinstance(pattern, GroupPattern):
        kept = hard_mask_nm(scores, pattern.n, pattern.m, holder.slot.inputs)
    else:
        kept = _from_rows(_kept_in_rows(_as_rows(scores, holder), count), weight.shape, holder)
    weight.masked_fill_(~kept, 0)


def _kept_in_rows(scores: Tensor, count: int) -> Tensor:
    """Return the mask that prunes `count` scores in all, the least of each row, bool."""
    rows, columns = scores.shape
    in_order, order = scores.sort(dim=1, stable=True)  # stable: ties by column
    each, rest = divmod(count, rows)
    counts = torch.full((rows, 1), each, device=scores.device)
    if rest:
        following = in_order[:, each].contiguous()
        rest_count = torch.tensor([rest], device=scores.device)
        counts += ~torch.ops.pdp.hard_mask(following, rest_count).unsqueeze(1)
    kept = torch.arange(columns, device=scores.device) >= counts
    return torch.empty_like(kept).scatter_(1, order, kept)


def _as_rows(values: Tensor, holder: Holder) -> Tensor:
    """Return values of a weight as (outputs, all that one output sums)."""
    if holder.slot.outputs == 0:
        return values.flatten(1)
    by_group = values.unflatten(0, (_groups(holder), -1))
    return by_group.movedim(2, 1).flatten(0, 1).flatten(1)


def _from_rows(rows: Tensor, shape: torch.Size, holder: Holder) -> Tensor:
    """Return the rows of `_as_rows` in the shape of the weight."""
    if holder.slot.outputs == 0:
        return rows.view(shape)
    inputs, outputs, *taps = shape
    groups = _groups(holder)
    by_group = rows.view(groups, outputs, inputs // groups, *taps)
    return by_group.movedim(2, 1).reshape(shape)


def _groups(holder: Holder) -> int:
    """Return the groups of a transposed convolution; 1 for Hugging Face's Conv1D."""
    return cast(int, getattr(holder.layer, "groups", 1))
