"""Writes the tables of docs/performance.md from the committed results: python docs/plots/tables.py.

A table stands in the page between <!-- NAME --> and <!-- end -->.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"

FLOAT32, AUTOCAST, BFLOAT16 = "float32", "float32/bfloat16", "bfloat16"
LISTS = {"resnet50": "ResNet-50, 54 weights", "gpt2": "GPT-2, 49 weights"}


class Benchmark:
    """The rows of one run of `python -m benchmarks`."""

    def __init__(self, folder: str) -> None:
        rows = json.loads((RESULTS / folder / "benchmark.json").read_text())["rows"]
        self.rows = [row for row in rows if row["mask"] != "paper"]

    def row(self, step: str, name: str, dtype: str, provider: str = "ours") -> dict[str, Any]:
        chosen = (step, name, dtype, provider)
        (found,) = (
            row
            for row in self.rows
            if (row["step"], row["input"], row["dtype"], row["provider"]) == chosen
        )
        return found

    def seconds(self, *chosen: str) -> float:
        return self.row(*chosen)["median_s"]

    def times(self, step: str, name: str, dtype: str, provider: str) -> str:
        """How many times as long as ours another provider takes."""
        ours = self.seconds(step, name, dtype)
        return rounded(self.seconds(step, name, dtype, provider) / ours)

    def of_copy(self, step: str, name: str, dtype: str) -> str:
        """The rate of a step in percent of a copy's, of tensors of the weight's dtype."""
        copy = self.row("copy", name, dtype.split("/")[0], "copy")
        return f"{self.row(step, name, dtype)['gb_per_s'] / copy['gb_per_s']:.0%}"


def rounded(value: float) -> str:
    """Two digits, and a third for values about 1 and from 100 on."""
    if value >= 10:
        return f"{value:,.0f}"
    return f"{value:.2f}" if 0.945 <= value < 1.25 else f"{value:.1f}"


def milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def load(file: str) -> dict[str, Any]:
    return json.loads((RESULTS / file).read_text())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["|" + "|".join(f" {cell} ".replace("  ", " ") for cell in line) + "|" for line in lines]


def cpu_masks() -> list[str]:
    run = Benchmark("cpu")
    inputs = {
        "4096": "one weight of 4,096",
        "65536": "one weight of 65,536",
        "2359296": "one weight of 2,359,296",
        "digits": "an MLP trained on digits: 3 weights, 50 thousand",
        "resnet50": "ResNet-50: 54 weights, 25.5 million",
        "gpt2": "GPT-2: 49 weights, 124 million",
    }
    both = (FLOAT32, AUTOCAST)
    rows = [
        [
            title,
            " / ".join(
                run.times("threshold", name, FLOAT32, each)
                for each in ("eager-kthvalue", "eager-topk")
            ),
            ", ".join(run.times("mask", name, dtype, "eager") for dtype in both),
            ", ".join(run.times("mask", name, dtype, "compiled") for dtype in both),
            ", ".join(run.times("step", name, dtype, "eager-kthvalue") for dtype in both),
            ", ".join(run.times("step", name, dtype, "compiled-kthvalue") for dtype in both),
        ]
        for name, title in inputs.items()
    ]
    header = ["r = 0.9", "threshold: kthvalue / topk", "mask: eager", "mask: compiled"]
    return table(
        [*header, "threshold + mask: kthvalue, eager", "kthvalue, compiled"],
        rows,
    )


def cpu_structures() -> list[str]:
    groups, channels, index = (Benchmark(f"cpu/{each}") for each in ("2to4", "channel", "pq-index"))
    name, both = "2359296", (FLOAT32, AUTOCAST)
    rows = [
        [
            "2:4 mask, 768 x 3072, forward and backward",
            "; ".join(groups.times("mask-2:4", name, dtype, "eager") for dtype in both),
            "; ".join(groups.times("mask-2:4", name, dtype, "compiled") for dtype in both),
            "",
        ],
        [
            "prune to 2:4 and pack, bfloat16",
            groups.times("pack-2:4", name, BFLOAT16, "eager"),
            "",
            "against pruning by topk and torch's conversion",
        ],
    ]
    for name, shape in (("conv-1x1", "2048 x 1024 x 1 x 1"), ("conv-3x3", "512 x 512 x 3 x 3")):
        rows.append(
            [
                f"channel mask with its threshold, {shape}",
                "; ".join(channels.times("mask-channel", name, each, "eager") for each in both),
                "; ".join(channels.times("mask-channel", name, each, "compiled") for each in both),
                "; ".join(channels.of_copy("mask-channel", name, each) for each in both)
                + " of a copy's rate",
            ]
        )
    longer = index.seconds("pq-index", "resnet50", FLOAT32) / index.seconds(
        "pq-index", "resnet50", FLOAT32, "sum"
    )
    eager = index.times("pq-index", "resnet50", FLOAT32, "eager")
    more = f"{rounded(longer)} times as long as `sum` of the weights"
    rows.append(["PQ Index of the ResNet-50 list", eager, "", more])
    header = ["float32; ŵ in bfloat16", "against eager", "against `torch.compile`", "more"]
    return table(header, rows)


def training_steps(file: str) -> list[str]:
    rows = []
    for row in load(file)["rows"]:
        if "dense" not in row["seconds"]:
            continue
        dense = row["seconds"]["dense"]
        low, high = (each / dense for each in row["quartiles"]["pdp"])
        ratios = row["ratios"]
        rows.append(
            [
                row["task"],
                milliseconds(dense),
                f"{ratios['pdp']:.3f} ({low:.3f} to {high:.3f})",
                f"{ratios['eager']:.2f}",
                f"{ratios['compiled']:.2f}",
                milliseconds(row["seconds"]["pdp's step"]),
            ]
        )
    header = ["", "dense, ms", "PDP (quartiles)", "eager PyTorch", "Eq. 1 through `torch.compile`"]
    return table([*header, "`pruner.step`, ms"], rows)


def host(file: str) -> list[str]:
    rows = []
    for row in load(file)["rows"]:
        seconds, layers = row["seconds"], row["layers"]

        def per_layer(provider: str, seconds: dict = seconds, layers: int = layers) -> str:
            both = "forward and backward"
            masks = seconds[f"{provider}: {both}"] - seconds[f"dense: {both}"]
            step = seconds[f"{provider}: step"]
            return "; ".join(rounded(1e6 * each / layers) for each in (masks, step))

        providers = ("pdp", "eager", "compiled")
        rows.append([f"{row['task']}, {layers}", *map(per_layer, providers)])
    header = ["forward and backward; step, us", "PDPPruner", "eager PyTorch"]
    return table([*header, "Eq. 1 through `torch.compile`"], rows)


def h100_one_weight() -> list[str]:
    masks, thresholds = Benchmark("h100/masks"), Benchmark("h100/thresholds")
    groups, channels = Benchmark("h100/2to4"), Benchmark("h100/channel")
    large, name, dtypes = "100000000", "100663296", (FLOAT32, AUTOCAST, BFLOAT16)
    rows = [
        [
            f"soft mask {step}: rate of a copy; times eager, `torch.compile`",
            *(
                f"{masks.of_copy(step, large, dtype)}; {masks.times(step, large, dtype, 'eager')}, "
                f"{masks.times(step, large, dtype, 'compiled')}"
                for dtype in dtypes
            ),
        ]
        for step in ("forward", "backward")
    ]

    def threshold(dtype: str) -> str:
        if dtype == AUTOCAST:
            return ""
        seconds = thresholds.seconds("threshold", large, dtype)
        reads = seconds / thresholds.seconds("sum", large, dtype, "sum")
        sort = masks.times("threshold", large, dtype, "sort")
        return f"{milliseconds(seconds)} ms; {reads:.2f}; {sort}"

    title = "threshold: time; in reads at the rate of `torch.sum`; times a sort"
    rows.append([title, *map(threshold, dtypes)])
    rows.append(
        [
            "2:4 mask, forward and backward: rate of a copy; times eager",
            *(
                ""
                if dtype == AUTOCAST
                else f"{groups.of_copy('mask-2:4', name, dtype)}; "
                f"{groups.times('mask-2:4', name, dtype, 'eager')}"
                for dtype in dtypes
            ),
        ]
    )
    packing = [
        "" if dtype == AUTOCAST else groups.of_copy("pack-2:4", name, dtype) for dtype in dtypes
    ]
    rows.append(["2:4 packing: rate of a copy", *packing])
    rows.append(
        [
            "channel mask, forward and backward: rate of a copy; times eager",
            *(
                f"{channels.of_copy('mask-channel', name, dtype)}; "
                f"{channels.times('mask-channel', name, dtype, 'eager')}"
                for dtype in dtypes
            ),
        ]
    )
    return table(["", "float32", "float32 to bfloat16", "bfloat16"], rows)


def h100_sizes() -> list[str]:
    run = Benchmark("h100/masks")
    inputs = {
        "65536": "65,536",
        "1048576": "1,048,576",
        "16777216": "16,777,216",
        "100000000": "100,000,000",
        "resnet50": "ResNet-50",
        "bert-base": "BERT-base",
        "gpt2": "GPT-2",
    }
    rows = [
        [
            title,
            *(
                f"{1e6 * run.seconds(step, name, dtype):,.0f}; "
                f"{run.times(step, name, dtype, provider)}"
                for step, provider in (("threshold", "sort"), ("step", "compiled-sort"))
                for dtype in (FLOAT32, BFLOAT16)
            ),
        ]
        for name, title in inputs.items()
    ]
    thresholds = [f"threshold, {dtype}: us; times a sort" for dtype in (FLOAT32, BFLOAT16)]
    steps = [
        f"with forward and backward, {dtype}: us; times a sort and `torch.compile`"
        for dtype in (FLOAT32, BFLOAT16)
    ]
    return table(["", *thresholds, *steps], rows)


def h100_eager() -> list[str]:
    run, name = Benchmark("h100/eager-2359296"), "2359296"
    titles = {
        "threshold": {
            "sort": "a sort",
            "one-topk": "one `torch.topk`",
            "eager-topk": "two `torch.topk`",
            "eager-kthvalue": "`torch.kthvalue`",
        },
        "mask": {"eager": "eager", "compiled": "`torch.compile`"},
        "step": {
            "compiled-sort": "a sort and `torch.compile`",
            "eager-topk": "two `torch.topk`, eager",
            "eager-kthvalue": "`torch.kthvalue`, eager",
        },
    }
    names = {
        "threshold": "threshold",
        "mask": "forward and backward",
        "step": "threshold, forward and backward",
    }
    rows = [
        [
            names[step],
            f"{1e6 * run.seconds(step, name, FLOAT32):.0f}",
            "; ".join(
                f"{title} {run.times(step, name, FLOAT32, provider)}"
                for provider, title in providers.items()
            ),
        ]
        for step, providers in titles.items()
    ]
    return table(["", "us", "times as long"], rows)


def h100_networks() -> list[str]:
    run, thresholds = Benchmark("h100/eager-lists"), Benchmark("h100/thresholds")

    def cells(name: str) -> Iterator[str]:
        yield milliseconds(thresholds.seconds("threshold", name, FLOAT32))
        yield milliseconds(run.seconds("step", name, FLOAT32))
        for provider in ("eager-topk", "compiled-sort", "eager-kthvalue"):
            seconds = run.seconds("step", name, FLOAT32, provider)
            times = run.times("step", name, FLOAT32, provider)
            yield f"{milliseconds(seconds)} ({times} times)"

    header = ["", "thresholds alone", "all three", "`torch.topk` twice, eager masks"]
    return table(
        [*header, "a sort, `torch.compile`", "`torch.kthvalue`, eager masks"],
        [[title, *cells(name)] for name, title in LISTS.items()],
    )


TABLES = {
    "cpu_masks": cpu_masks,
    "cpu_structures": cpu_structures,
    "cpu_training_steps": lambda: training_steps("cpu/training_step.json"),
    "cpu_host": lambda: host("cpu/host.json"),
    "h100_one_weight": h100_one_weight,
    "h100_sizes": h100_sizes,
    "h100_eager": h100_eager,
    "h100_networks": h100_networks,
    "h100_training_steps": lambda: training_steps("h100/training_step.json"),
    "h100_host": lambda: host("h100/host.json"),
}


def filled(page: str) -> str:
    """Return the text of the page with its tables made from the results."""
    marked = re.compile(r"<!-- (\w+) -->\n.*?<!-- end -->", re.DOTALL)
    return marked.sub(
        lambda found: "\n".join(
            [f"<!-- {found[1]} -->", "", *TABLES[found[1]](), "", "<!-- end -->"]
        ),
        page,
    )


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
