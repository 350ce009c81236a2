"""What a pruner has done so far, counted."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdp_kernels._masked_layer import WeightMask
from pdp_kernels._selection import Selected

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
        self._decisions: list[Tensor] = []
        self._flips: list[tuple[float, float]] = []

    @torch.no_grad()
    def report(
        self,
        entries: list[Selected],
        masks: list[WeightMask] | None,
        progress: float,
        macs: tuple[int, list[int]] | None,
    ) -> PruningReport:
        """A report; masks are None once the weights are plain, macs are of `count_macs`."""
        weights = [entry.weight.detach() for entry in entries]
        if masks is None:
            decisions = [weight != 0 for weight in weights]
            values = []
        else:
            decisions = [mask.kept(weight) for mask, weight in zip(masks, weights, strict=True)]
            values = [mask.values(weight) for mask, weight in zip(masks, weights, strict=True)]
        flipped = self._flipped(weights, decisions, progress)
        layers = []
        for index, (entry, weight, kept) in enumerate(
            zip(entries, weights, decisions, strict=True)
        ):
            count = weight.numel()
            pruned = count - int(kept.sum()) * (count // kept.numel())
            threshold = None if masks is None else masks[index].threshold
            dense = None if macs is None else macs[1][index]
            layers.append(
                LayerReport(
                    name=entry.name,
                    shape=tuple(weight.shape),
                    pattern=str(entry.plan.pattern),
                    weights=count,
                    pruned=pruned,
                    threshold=None if threshold is None else float(threshold),
                    soft=_soft_share(values[index]) if values else None,
                    flipped=flipped[index] if flipped else None,
                    macs=dense,
                    kept_macs=None if dense is None else dense * (count - pruned) // count,
                )
            )
        spared = 0 if macs is None else sum(layer.macs - layer.kept_macs for layer in layers)
        return PruningReport(
            layers=layers,
            progress=progress,
            mask_histogram=_histogram(weights, values),
            flips=list(self._flips),
            macs=None if macs is None else macs[0],
            kept_macs=None if macs is None else macs[0] - spared,
        )

    def _flipped(self, weights, decisions: list[Tensor], progress: float) -> list[int]:
        """How many weights' decisions differ from the last report's; empty in the first one."""
        before, self._decisions = self._decisions, decisions
        if not before:
            return []
        flipped = []
        for weight, now, then in zip(weights, decisions, before, strict=True):
            # Of a channel there is one decision, until its weights are plain zeros.
            changed = now != then
            flipped.append(int(changed.sum()) * (weight.numel() // changed.numel()))
        total = sum(weight.numel() for weight in weights)
        self._flips.append((progress, sum(flipped) / total))
        return flipped


def _soft_share(values: Tensor) -> float:
    low, high = SOFT_ZONE
    return float(((values > low) & (values < high)).double().mean())


def _histogram(weights: list[Tensor], values: list[Tensor]) -> list[int]:
    """How many weights have their mask in each bin; a channel's mask counts for all its weights."""
    if not values:
        return []
    total = torch.zeros(_BINS, dtype=torch.int64)
    for weight, mask in zip(weights, values, strict=True):
        bins = (mask.double() * _BINS).nan_to_num(0).long().clamp(0, _BINS - 1).flatten()
        total += torch.bincount(bins, minlength=_BINS).cpu() * (weight.numel() // mask.numel())
    return total.tolist()
