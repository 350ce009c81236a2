"""Draw docs/assets/overview.png: what PDP costs, and what accuracy it leaves.

    python -m docs.plots.overview

Speed comes from benchmarks/results/h100, accuracy from studies/results.
"""

import json
from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.tables import Row, read_rows

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "assets" / "overview.png"
SPEED = ROOT / "benchmarks" / "results" / "h100" / "eager-lists" / "benchmark.json"
MNIST = ROOT / "studies" / "results" / "pruning_mnist" / "methods.csv"
GPT = ROOT / "studies" / "results" / "finetune_shakespeare_tiny" / "finetune.csv"

PROVIDERS = {
    "ours": "pdp_kernels",
    "compiled-sort": "sort and torch.compile",
    "eager-topk": "topk and eager masks",
    "eager-kthvalue": "kthvalue and eager masks",
}
NETWORKS = {"resnet50": "ResNet-50", "gpt2": "GPT-2 124M"}
METHODS = {
    "pdp": "PDP, recommended",
    "gmp-global": "GMP, one threshold",
    "gmp": "GMP, uniform",
    "pdp-paper": "PDP as printed",
}
COLORS = ("#3949ab", "#00897b", "#8d8d8d", "#d98c3f")
BAR_COLORS = ("#3949ab", *["#b9bdd6"] * 3)


def draw_speed(axes: Axes) -> None:
    """Draw a bar for each way to the masked weights and gradients of all layers."""
    rows = {
        (row["input"], row["provider"]): 1e3 * row["median_s"]
        for row in json.loads(SPEED.read_text())["rows"]
        if row["step"] == "step"
    }
    for number, (provider, color) in enumerate(zip(PROVIDERS, BAR_COLORS, strict=True)):
        for group, network in enumerate(NETWORKS):
            place = 5 * group + number
            time = rows[network, provider]
            axes.barh(place, time, color=color)
            times = time / rows[network, "ours"]
            text = f" {time:.2g} ms" if provider == "ours" else f" {times:.0f} times as long"
            axes.text(time, place, text, va="center", fontsize="small")
    names = [*PROVIDERS.values(), "", *PROVIDERS.values()]
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.tick_params(axis="y", length=0)
    for group, name in enumerate(NETWORKS.values()):
        axes.text(0.3, 5 * group - 0.75, name, fontsize="small", fontweight="bold")
    axes.invert_yaxis()
    axes.set(
        xscale="log",
        xlim=(0.3, 3e4),
        ylim=(8.6, -1.3),
        xlabel="milliseconds on an H100, float32",
        title="Thresholds, masks and gradients of all layers",
    )


def draw_scores(axes: Axes, rows: list[Row], factor: float) -> None:
    """Draw a line with error bars for each method, over the fraction of zeros."""
    sparsities = sorted({row.sparsity for row in rows if row.setting == "pdp"}, key=float)
    places = range(len(sparsities))
    for (setting, label), color in zip(METHODS.items(), COLORS, strict=True):
        groups = [
            [factor * row.score for row in rows if (row.setting, row.sparsity) == (setting, each)]
            for each in sparsities
        ]
        if all(groups):
            errors = [stdev(group) for group in groups]
            means = [mean(group) for group in groups]
            style = {"fmt": "o-", "markersize": 4, "capsize": 3, "color": color, "label": label}
            axes.errorbar(places, means, errors, **style)
    dense = mean(factor * row.score for row in rows if row.setting == "dense")
    axes.axhline(dense, color="black", linestyle=":", linewidth=1, label="dense")
    axes.set_xticks(places, [f"{100 * float(each):g}%" for each in sparsities])
    axes.set_xlim(-0.25, len(sparsities) - 0.75)
    axes.set_xlabel("zeros")


def main() -> None:
    figure = Figure(figsize=(13, 3.9), layout="constrained")
    speed, mnist, gpt = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    draw_speed(speed)
    draw_scores(mnist, read_rows(MNIST), 100)
    mnist.set(ylim=(97.0, 98.75), title="MLP on MNIST: test accuracy, %")
    mnist.legend(loc="lower left", fontsize="small", frameon=False)
    draw_scores(gpt, read_rows(GPT), 1)
    gpt.set(title="Small GPT, fine-tuned: test loss")
    gpt.set_xlim(-0.4, 1.4)
    gpt.legend(loc="upper left", fontsize="small", frameon=False)
    for axes in (speed, mnist, gpt):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize("medium")
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    main()
