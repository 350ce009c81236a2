"""What a pruner has done so far, counted."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdp_kernels.distributed.shards import ShardedList, local_shard
from pdp_kernels.pruning.masked_layer import WeightMask
from pdp_kernels.pruning.targets import Target

SOFT_ZONE = (0.1, 0.9)
_BINS = 20
_COLUMNS = ("weight", "shape", "pattern", "pruned", "sparsity", "threshold", "soft", "flipped")


class LayerReport(NamedTuple):
    """One weight of a model that is pruned.

    pruned: how many of its weights the exact hard mask prunes by now; counted.
    threshold: t; None for N:M, where every group has its own, and after finalize.
    soft: the share of weights whose mask lies in the soft zone, 0.1 < m < 0.9; None after finalize.
    flipped: how many decisions of the hard mask differ from the last report's; None in the first.
    macs, kept_macs: multiply-accumulates of one inference, dense and without the pruned weights'.
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
        return self.pruned / self.weights


class PruningReport(NamedTuple):
    """A model that is pruned, layer by layer and in total.

    layers: a `LayerReport` for each pruned weight.
    progress: in epochs.
    mask_histogram: how many weights have a soft mask in each twentieth of [0, 1]; empty after
        finalize.
    flips: by report so far, its progress and the share of decisions that had flipped.
    macs, kept_macs: those of the whole model, layers that are not pruned included; None if no
        input was given.
    """

    layers: list[LayerReport]
    progress: float
    mask_histogram: list[int]
    flips: list[tuple[float, float]]
    macs: int | None
    kept_macs: int | None

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def pruned(self) -> int:
        return sum(layer.pruned for layer in self.layers)

    @property
    def sparsity(self) -> float:
        return self.pruned / self.weights

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as json takes it."""
        return self._asdict() | {"layers": [layer._asdict() for layer in self.layers]}

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
        if self.macs is not None:
            share = self.kept_macs / self.macs if self.macs else 1.0
            lines.append(f"multiply-accumulates: {self.kept_macs:,} of {self.macs:,} ({share:.2%})")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draws the sparsity of each layer, the mask's histogram and the flips over time.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "PruningReport.plot needs matplotlib: pip install matplotlib"
            ) from error
        figure = Figure(figsize=(13, 3.8), layout="constrained")
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
    """What one report keeps for the next: the decisions, and the flips so far."""

    def __init__(self):
        self._decisions: list[Tensor] = []  # of this rank's parts
        self._flips: list[tuple[float, float]] = []

    @torch.no_grad()
    def report(
        self,
        entries: list[Target],
        masks: list[WeightMask] | None,
        progress: float,
        macs: tuple[int, list[int]] | None,
    ) -> PruningReport:
        """A report; masks are None once the weights are plain, macs are of `count_macs`."""
        weights = [entry.weight.detach() for entry in entries]
        if masks is None:
            decisions = [local_shard(weight) != 0 for weight in weights]
            values = [torch.ones(1, device=weight.device) for weight in weights]
        else:
            decisions = [mask.kept(weight) for mask, weight in zip(masks, weights, strict=True)]
            values = [mask.values(weight) for mask, weight in zip(masks, weights, strict=True)]
        is_first = not self._decisions
        counts = _count(weights, decisions, self._decisions or decisions, values)
        self._decisions = decisions
        total = sum(weight.numel() for weight in weights)
        if not is_first:
            self._flips.append((progress, sum(count.flipped for count in counts) / total))
        layers = []
        for index, (entry, weight, count) in enumerate(zip(entries, weights, counts, strict=True)):
            size = weight.numel()
            pruned = size - count.kept
            threshold = None if masks is None else masks[index].threshold
            dense = None if macs is None else macs[1][index]
            layers.append(
                LayerReport(
                    name=entry.name,
                    shape=tuple(weight.shape),
                    pattern=str(entry.plan.pattern),
                    weights=size,
                    pruned=pruned,
                    threshold=None if threshold is None else float(threshold),
                    soft=None if masks is None else count.soft / size,
                    flipped=None if is_first else count.flipped,
                    macs=dense,
                    kept_macs=None if dense is None else dense * (size - pruned) // size,
                )
            )
        spared = 0 if macs is None else sum(layer.macs - layer.kept_macs for layer in layers)
        histograms = [] if masks is None else [count.histogram for count in counts]
        return PruningReport(
            layers=layers,
            progress=progress,
            mask_histogram=[sum(column) for column in zip(*histograms, strict=True)],
            flips=list(self._flips),
            macs=None if macs is None else macs[0],
            kept_macs=None if macs is None else macs[0] - spared,
        )


class _Counts(NamedTuple):
    """How many of a whole weight's elements are kept, have flipped, and have which soft mask."""

    kept: int
    flipped: int
    soft: int
    histogram: list[int]


def _count(
    weights: list[Tensor], decisions: list[Tensor], before: list[Tensor], values: list[Tensor]
) -> list[_Counts]:
    """Counted on each rank's part and added up. A channel has one decision for all its weights."""
    sharded = ShardedList(weights)
    counts = {}
    for index, part in enumerate(sharded.shards):
        kept, flipped = decisions[index], decisions[index] != before[index]
        low, high = SOFT_ZONE
        soft = (values[index] > low) & (values[index] < high)
        bins = (values[index].double() * _BINS).nan_to_num(0).long().clamp(0, _BINS - 1)
        histogram = torch.bincount(bins.flatten(), minlength=_BINS)
        ones = (
            each.sum().unsqueeze(0) * _each_counts(part, each) for each in (kept, flipped, soft)
        )
        counts[index] = torch.cat([*ones, histogram * _each_counts(part, values[index])])
    rows = (total.tolist() for total in sharded.all_reduce(counts).values())
    return [_Counts(kept, flipped, soft, histogram) for kept, flipped, soft, *histogram in rows]


def _each_counts(part: Tensor, values: Tensor) -> int:
    """Of how many of the part's weights each of the values tells."""
    return part.numel() // max(1, values.numel())
