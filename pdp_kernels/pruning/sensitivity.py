"""How much of each layer can be pruned: every layer pruned alone, at several sparsities."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from pdp_kernels.distributed.shards import local_shard, reshard
from pdp_kernels.functional.validation import check_fraction
from pdp_kernels.pruning.config import PDPConfig
from pdp_kernels.pruning.masked_layer import check_unmasked
from pdp_kernels.pruning.masks import SelectedMask
from pdp_kernels.pruning.plots import new_figure
from pdp_kernels.pruning.targets import Target, find_targets


class SensitivityReport(NamedTuple):
    """The values of a model with one layer pruned.

    Attributes:
        baseline: the value of the model as it is.
        sparsities: those of the scan.
        values: for each weight's name, the value at each sparsity.

    Examples:
        >>> model = torch.nn.Linear(4, 2, bias=False)
        >>> model.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
        >>> print(sensitivity(model, lambda _: model.weight.sum().item(), [0.5, 0.75]))
        weight  0.5  0.75
        weight   26    15
        unpruned: 36
    """

    baseline: float
    sparsities: list[float]
    values: dict[str, list[float]]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data that json can write.

        Returns:
            A dict of the attributes.
        """
        return self._asdict()

    def __str__(self) -> str:
        rows = [["weight", *(f"{sparsity:.4g}" for sparsity in self.sparsities)]]
        rows += [[name, *(f"{v:.5g}" for v in values)] for name, values in self.values.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
            for name, *cells in rows
        ]
        return "\n".join([*lines, f"unpruned: {self.baseline:.5g}"])

    def plot(self, path: str | Path) -> None:
        """Plot a curve for each layer over the sparsity.

        Args:
            path: the file to write; its suffix selects the format.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure = new_figure("SensitivityReport.plot", 7, 4.5)
        axes = figure.subplots()
        for name, values in self.values.items():
            axes.plot(self.sparsities, values, "o-", label=name)
        axes.axhline(self.baseline, color="black", linestyle="--", label="unpruned")
        axes.set(xlabel="sparsity of one layer", ylabel="value")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=150)


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    sparsities: Sequence[float] = (0.5, 0.8, 0.9, 0.95, 0.99),
    *,
    config: PDPConfig | None = None,
) -> SensitivityReport:
    """Return what a model is worth with each of its layers pruned alone, without training.

    Prunes one layer at a time with its exact hard mask (`hard_mask`, `hard_mask_channel`), calls
    evaluate, and restores the weights bit for bit. Layers whose value falls early need a lower
    sparsity: `overrides` or `max_layer_sparsity` in `PDPConfig`.

    Args:
        model: a model without masks of a pruner.
        evaluate: called as evaluate(model), once for the model and once for each layer and
            sparsity, without gradients; returns an accuracy or a loss, a number or a tensor of
            one. It chooses the mode (model.eval()).
        sparsities: the fractions to prune, in [0, 1].
        config: which layers to prune, and in which pattern. Its sparsity and schedule do not
            matter. Default: all layers that `PDPPruner` prunes, unstructured.

    Returns:
        A `SensitivityReport`, with as_dict, plot and a table as str.

    Raises:
        TypeError: an argument of another type; evaluate returns no number.
        ValueError: a sparsity outside [0, 1], or none; an N:M pattern, which has one sparsity; a
            model with masks; or as `PDPPruner`.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> inputs = torch.randn(16, 4)
        >>> report = sensitivity(model, lambda m: m(inputs).square().mean().item(), [0.5, 0.9])
        >>> list(report.values)
        ['0.weight', '1.weight']
    """
    if config is None:
        config = PDPConfig(0.5, scope="layer")
    if not isinstance(config, PDPConfig):
        raise TypeError(f"config must be a PDPConfig or None, got {type(config).__name__}")
    if not callable(evaluate):
        raise TypeError(f"evaluate must be callable, got {type(evaluate).__name__}")
    if not isinstance(sparsities, Iterable):
        raise TypeError(
            f"sparsities must be a list or tuple of fractions, got {type(sparsities).__name__}"
        )
    sparsities = list(sparsities)
    if not sparsities:
        raise ValueError("sparsities must hold at least one fraction, got none")
    for index, sparsity in enumerate(sparsities):
        check_fraction(f"sparsities[{index}]", sparsity)
    fractions = list(map(float, sparsities))
    targets = find_targets(model, config)
    for target in targets:
        if target.plan.pattern.fixed_sparsity is not None:
            raise ValueError(
                f"config must have a pattern of any sparsity for {target.name}, "
                f"got {target.plan.pattern}"
            )
    check_unmasked(model, "scan it before the pruner is made, or pruner.pruned_copy()")
    baseline = _number(evaluate(model))
    values = {
        target.name: [_value(model, target, fraction, evaluate) for fraction in fractions]
        for target in targets
    }
    return SensitivityReport(baseline, fractions, values)


def _value(
    model: nn.Module, target: Target, sparsity: float, evaluate: Callable[[nn.Module], float]
) -> float:
    """Return the value of the model with this fraction of one weight pruned."""
    reshard(model)
    weight = target.weight
    mask = target.new_mask()
    assert isinstance(mask, SelectedMask)  # a pattern of any sparsity has a threshold
    count = math.floor(sparsity * target.units + 0.5)
    mask.prune_count = torch.tensor([count], device=weight.device)
    before = local_shard(weight).clone()
    try:
        mask.prune(weight)
        return _number(evaluate(model))
    finally:
        reshard(model)
        local_shard(weight).copy_(before)


def _number(value: Any) -> float:
    """Return what evaluate has returned as a float."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"evaluate must return a number, got {value!r}") from error
