"""Reports of a pruner: sparsity, masks and multiply-accumulates, by layer and in total."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pdp_kernels.distributed.shards import ShardedList, local_shard
from pdp_kernels.pruning.budgets import NEARLY_ALL
from pdp_kernels.pruning.layers import is_quantized
from pdp_kernels.pruning.masks import SelectedMask, WeightMask
from pdp_kernels.pruning.plots import new_figure
from pdp_kernels.pruning.targets import Target

SOFT_ZONE = (0.1, 0.9)
_BINS = 20
_NAMED = 6  # in a line of the table
_COLUMNS = ("weight", "shape", "pattern", "pruned", "sparsity", "threshold", "soft", "flipped")


class LayerReport(NamedTuple):
    """The report of one weight tensor.

    Attributes:
        name: the tensor's name in the model.
        shape: the tensor's shape.
        pattern: the pattern that the configuration gives it.
        weights: the number of its weights.
        pruned: how many of them the hard mask prunes now, counted in the mask.
        threshold: t; None for N:M, where each group has its own, and after finalize.
        soft: the fraction of weights in the soft zone, 0.1 < m < 0.9; None after finalize.
        flipped: how many decisions of the hard mask changed since the previous report; None in the
            first.
        macs: multiply-accumulates of one inference with all weights; None without an input. 0 for
            a weight beside layers with weights of their own, as a class token, and for one that is
            read without a call of its layer, as in Mamba's mixer: what uses them cannot be told.
        kept_macs: multiply-accumulates of one inference with the kept weights; None without an
            input.

    Examples:
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> layer = prune_one_shot(model, 0.5).layers[0]
        >>> layer.name, layer.shape, layer.pruned, layer.sparsity
        ('weight', (1, 4), 2, 0.5)
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    weights: int
    pruned: int
    threshold: float | None
    soft: float | None
    flipped: int | None
    macs: int | None
    kept_macs: int | None

    @property
    def sparsity(self) -> float:
        """The fraction of the weights that is pruned."""
        return self.pruned / self.weights


class PruningReport(NamedTuple):
    """The report of a model.

    Attributes:
        layers: a `LayerReport` for each tensor that the pruner prunes.
        progress: the progress in epochs.
        mask_histogram: the number of weights with a soft mask in each twentieth of [0, 1]; empty
            after finalize.
        flips: for each report after the first, its progress and the fraction of decisions that
            changed since the previous report.
        macs: multiply-accumulates of one inference of the whole model with all weights, including
            layers that are not pruned; None without an input.
        kept_macs: the same with the kept weights; None without an input.
        unpruned: the name and the number of weights of each layer that the pruner leaves alone, as
            an embedding, an LSTM, an adapter or what is excluded. Biases, norms and other vectors
            are left out.
        frozen: the names of the pruned weights that do not train (requires_grad=False): they are
            pruned by the magnitudes they have.

    Examples:
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> pruner = PDPPruner(model, PDPConfig(0.5, warmup=0, ramp=1))
        >>> pruner.step(1.0)
        >>> report = pruner.report(torch.randn(1, 4))
        >>> report.pruned, report.weights, report.sparsity, report.kept_macs
        (2, 4, 0.5, 2)
    """

    layers: list[LayerReport]
    progress: float
    mask_histogram: list[int]
    flips: list[tuple[float, float]]
    macs: int | None
    kept_macs: int | None
    unpruned: list[tuple[str, int]]
    frozen: list[str]

    @property
    def weights(self) -> int:
        """The number of weights in all layers that the pruner prunes."""
        return sum(layer.weights for layer in self.layers)

    @property
    def pruned(self) -> int:
        """How many of them the hard masks prune now."""
        return sum(layer.pruned for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """The fraction of them that is pruned."""
        return self.pruned / self.weights

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data that json can write.

        Returns:
            A dict of the attributes, layers included.
        """
        return self._asdict() | {"layers": [layer._asdict() for layer in self.layers]}

    def scalars(self, prefix: str = "pdp/") -> dict[str, float]:
        """Return the report as one flat mapping, for TensorBoard, Weights & Biases and the like.

        Names have the form prefix + quantity for the model, and prefix + quantity + "/" + weight
        for a layer. What a report leaves out as None is left out here.

        Args:
            prefix: what each name begins with.

        Returns:
            A dict of numbers by name. They are finite, except for thresholds: -inf in the warm-up,
            inf where all weights are pruned, NaN where they lie among NaN weights.

        Examples:
            >>> model = torch.nn.Linear(4, 1, bias=False)
            >>> pruner = PDPPruner(model, PDPConfig(0.5, warmup=0, ramp=1))
            >>> pruner.step(1.0)
            >>> pruner.report().scalars()["pdp/sparsity/weight"]
            0.5
        """
        values: dict[str, float | None] = {
            "progress": self.progress,
            "sparsity": self.sparsity,
            "flipped": self.flips[-1][1] if self.flips else None,
            "macs": self.macs,
            "kept_macs": self.kept_macs,
        }
        for layer in self.layers:
            values[f"sparsity/{layer.name}"] = layer.sparsity
            values[f"threshold/{layer.name}"] = layer.threshold
            values[f"soft/{layer.name}"] = layer.soft
        return {f"{prefix}{name}": value for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        rows = [_COLUMNS]
        for layer in self.layers:
            row = (
                layer.name,
                "x".join(map(str, layer.shape)),
                layer.pattern,
                f"{layer.pruned:,}",
                f"{layer.sparsity:.4%}",
                "" if layer.threshold is None else f"{layer.threshold:.4g}",
                "" if layer.soft is None else f"{layer.soft:.2%}",
                "" if layer.flipped is None else f"{layer.flipped:,}",
            )
            rows.append(row)
        total = f"{self.pruned:,} of {self.weights:,}"
        rows.append(("total", total, "", f"{self.pruned:,}", f"{self.sparsity:.4%}", "", "", ""))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 3 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        if self.macs is not None and self.kept_macs is not None:
            kept = self.kept_macs / self.macs if self.macs else 1.0
            lines.append(f"multiply-accumulates: {self.kept_macs:,} of {self.macs:,} ({kept:.2%})")
        emptied = [layer.name for layer in self.layers if layer.sparsity > NEARLY_ALL]
        if emptied:
            lines.append(f"more than {NEARLY_ALL:.0%} pruned: {', '.join(emptied)}")
        if self.unpruned:
            largest = sorted(self.unpruned, key=lambda each: -each[1])
            texts = [f"{name} ({weights:,} weights)" for name, weights in largest[:_NAMED]]
            if others := largest[_NAMED:]:
                texts.append(f"{len(others)} more ({sum(each[1] for each in others):,} weights)")
            lines.append(f"not pruned: {', '.join(texts)}")
        if self.frozen:
            names = [*self.frozen[:_NAMED], f"{len(self.frozen) - _NAMED} more"]
            names = self.frozen if len(self.frozen) <= _NAMED else names
            lines.append(f"pruned without training (requires_grad=False): {', '.join(names)}")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Plot the sparsity of each layer, the histogram of masks and the flips over time.

        Args:
            path: the file to write; its suffix selects the format.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure = new_figure("PruningReport.plot", 13, 3.8)
        by_layer, histogram, over_time = figure.subplots(1, 3)
        by_layer.barh(
            [layer.name for layer in self.layers], [layer.sparsity for layer in self.layers]
        )
        by_layer.invert_yaxis()
        by_layer.axvline(self.sparsity, color="black", linestyle="--", label="total")
        by_layer.set(xlabel="sparsity", xlim=(0, 1))
        by_layer.legend()
        edges = [index / _BINS for index in range(len(self.mask_histogram))]
        histogram.bar(edges, self.mask_histogram, width=1 / _BINS, align="edge")
        histogram.set(xlabel="soft mask m", ylabel="weights", yscale="log", xlim=(0, 1))
        over_time.plot(*zip(*self.flips, strict=True), "o-") if self.flips else None
        over_time.set(xlabel="epoch", ylabel="decisions flipped since the report before")
        for axes in (by_layer, histogram, over_time):
            axes.grid(alpha=0.3)
        figure.savefig(path, dpi=150)


class ReportHistory:
    """The decisions of the last report and the flips so far, from which the next report counts."""

    def __init__(self) -> None:
        self._decisions: list[Tensor] = []  # of the local shards
        self._flips: list[tuple[float, float]] = []

    @torch.no_grad()
    def report(
        self,
        model: nn.Module,
        targets: list[Target],
        masks: list[WeightMask] | None,
        progress: float,
        macs: tuple[int, list[int]] | None,
    ) -> PruningReport:
        """Return a report. masks is None after finalize; macs is the result of `count_macs`."""
        for target in targets:
            if is_quantized(target.weight):
                raise RuntimeError(
                    f"{target.name} was quantized ({type(target.weight).__name__}), which keeps "
                    "its zeros but not in a form that can be counted: report before"
                )
        weights = [target.weight for target in targets]
        if masks is None:
            decisions = [local_shard(weight) != 0 for weight in weights]
            values = [torch.ones(1, device=weight.device) for weight in weights]
        else:
            decisions = [mask.kept(weight) for mask, weight in zip(masks, weights, strict=True)]
            values = [mask.values(weight) for mask, weight in zip(masks, weights, strict=True)]
        # Channels may have been removed since the last report.
        shapes = [then.shape for then in self._decisions]
        is_first = shapes != [now.shape for now in decisions]
        pairs = zip(decisions if is_first else self._decisions, decisions, strict=True)
        before = [then.to(now.device) for then, now in pairs]  # the model may have moved
        counts = _count(weights, decisions, before, values)
        self._decisions = decisions
        total = sum(weight.numel() for weight in weights)
        if not is_first:
            self._flips.append((progress, sum(count.flipped for count in counts) / total))
        none = [None] * len(targets)
        of_layers = zip(
            targets,
            counts,
            none if masks is None else masks,
            none if macs is None else macs[1],
            strict=True,
        )
        layers = [_layer_report(*of_layer, is_first) for of_layer in of_layers]
        kept_macs = None
        if macs is not None:
            kept_macs = macs[0] - sum(macs[1]) + sum(layer.kept_macs or 0 for layer in layers)
        histograms = [] if masks is None else [count.histogram for count in counts]
        return PruningReport(
            layers=layers,
            progress=progress,
            mask_histogram=[sum(column) for column in zip(*histograms, strict=True)],
            flips=list(self._flips),
            macs=None if macs is None else macs[0],
            kept_macs=kept_macs,
            unpruned=_unpruned(model, {id(target.weight) for target in targets}),
            frozen=[target.name for target in targets if not target.weight.requires_grad],
        )


def _unpruned(model: nn.Module, pruned: set[int]) -> list[tuple[str, int]]:
    """Return the layers with matrices that are not pruned, and the number of weights in these.

    A matrix is named by its layer, or by its own name if the layer contains other layers.
    """
    seen = set(pruned)
    sizes: dict[str, int] = {}
    for layer_name, layer in model.named_modules():
        for name, weight in layer.named_parameters(recurse=False):
            if id(weight) in seen or is_lazy(weight) or weight.dim() < 2:
                continue
            seen.add(id(weight))
            is_leaf = not layer._modules and layer_name
            key = layer_name if is_leaf else ".".join(filter(None, (layer_name, name)))
            sizes[key] = sizes.get(key, 0) + weight.numel()
    return list(sizes.items())


class _Counts(NamedTuple):
    """The numbers of elements of one global weight that are kept, flipped and soft."""

    kept: int
    flipped: int
    soft: int
    histogram: list[int]


def _count(
    weights: list[Tensor], decisions: list[Tensor], before: list[Tensor], values: list[Tensor]
) -> list[_Counts]:
    """Count in the local shards, and all-reduce. A channel has one decision for all its weights."""
    sharded = ShardedList(weights)
    counts = {}
    for index, shard in enumerate(sharded.shards):
        kept, flipped = decisions[index], decisions[index] != before[index]
        low, high = SOFT_ZONE
        soft = (values[index] > low) & (values[index] < high)
        bins = (values[index].double() * _BINS).nan_to_num(0).long().clamp(0, _BINS - 1)
        histogram = torch.bincount(bins.flatten(), minlength=_BINS)
        totals = (
            each.sum().unsqueeze(0) * _weights_per_value(shard, each)
            for each in (kept, flipped, soft)
        )
        counts[index] = torch.cat([*totals, histogram * _weights_per_value(shard, values[index])])
    rows = (total.tolist() for total in sharded.all_reduce(counts).values())
    return [_Counts(kept, flipped, soft, histogram) for kept, flipped, soft, *histogram in rows]


def _layer_report(
    target: Target, count: _Counts, mask: WeightMask | None, macs: int | None, is_first: bool
) -> LayerReport:
    size = target.weight.numel()
    return LayerReport(
        name=target.name,
        shape=tuple(target.weight.shape),
        pattern=str(target.plan.pattern),
        weights=size,
        pruned=size - count.kept,
        threshold=float(mask.threshold) if isinstance(mask, SelectedMask) else None,
        soft=None if mask is None else count.soft / size,
        flipped=None if is_first else count.flipped,
        macs=macs,
        kept_macs=None if macs is None else macs * count.kept // size,
    )


def _weights_per_value(shard: Tensor, values: Tensor) -> int:
    """Return the number of weights that each mask value represents."""
    return shard.numel() // max(1, values.numel())
