"""The figures of README and of the guides are those of the committed results."""

import json
import re

import pytest

from tests.docs.blocks import ROOT

CPU = ROOT / "benchmarks" / "results" / "cpu"


def tables(page):
    """The cells of each table of a page, by the cell on the left."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", (ROOT / page).read_text(), re.MULTILINE):
        lines = [re.split(r" ?\| ?", line)[1:-1] for line in table.splitlines()]
        found.append({cells[0]: cells[1:] for cells in lines})
    return found


def results(name):
    """The cells of the scores of a study, by setting."""
    (found,) = (
        table for table in tables(f"studies/results/{name}.md") if "time" in table.get("", ())
    )
    return found


def one(rows, **wanted):
    (row,) = (row for row in rows if all(row.get(name) == wanted[name] for name in wanted))
    return row


@pytest.fixture(scope="module")
def gains():
    return json.loads((CPU / "gains.json").read_text())


@pytest.mark.parametrize(
    ("name", "pruning"),
    [
        ("90% zeros", "90% zeros"),
        ("95% zeros", "95% zeros"),
        (
            "half of the hidden units removed (`remove_dead_channels`)",
            "half of the hidden units removed",
        ),
    ],
)
def test_sizes_and_times_of_a_pruned_resnet(gains, name, pruning):
    network = {"network": "ResNet-50", "dtype": "float32", "pruning": pruning}
    cells = [
        f"{one(gains['sizes'], **network, storage=storage)['of dense']:.0%}"
        for storage in ("torch.save", "gzip")
    ]
    times = [
        one(gains["latencies"], network="ResNet-50", examples=1, runtime=runtime, pruning=pruning)
        for runtime in ("PyTorch", "torch.compile", "ONNX Runtime")
        if pruning != "95% zeros"  # stored alone
    ]
    cells.append(" / ".join(f"{row['of dense']:.2f}" for row in times))
    (table,) = (table for table in tables("docs/guides/export.md") if "dense, float32" in table)
    assert table[name] == cells


@pytest.mark.parametrize(
    ("name", "network", "examples"),
    [
        (
            "MLP 1024-4096-4096-1000, one example / 256",
            "MLP 1024-4096-4096-1000",
            (1, 256),
        ),
        ("GPT-2 block, 64 tokens / 512", "GPT-2 block", (1, 8)),
    ],
)
def test_times_of_products_in_csr(gains, name, network, examples):
    def row(pruning, number, runtime="PyTorch, CSR"):
        wanted = {"network": network, "pruning": pruning, "runtime": runtime}
        return one(gains["latencies"], **wanted, examples=number)

    prunings = [f"{percent}% zeros" for percent in (90, 95, 99)]
    cells = [
        " / ".join(f"{row(each, number)['of dense']:.2f}" for number in examples)
        for each in prunings
    ]
    dense = row("dense", examples[0], "PyTorch")["held_bytes"]
    held = [row(each, examples[0])["held_bytes"] / dense for each in prunings]
    cells.append(" / ".join(f"{100 * each:.0f}" for each in held) + "%")
    (table,) = (table for table in tables("docs/guides/export.md") if name in table)
    assert table[name] == cells


def test_bytes_and_times_of_several_devices():
    results = json.loads((CPU / "distributed.json").read_text())
    counted, measured = tables("docs/guides/several-devices.md")[-2:]
    for name, network in (
        ("ResNet-50", "resnet50"),
        ("GPT-2", "gpt2"),
        ("Llama 2 7B (counted, not run)", "llama-7b"),
    ):
        rows = [
            one(results["counted"], input=network, dtype=dtype) for dtype in ("float32", "bfloat16")
        ]
        assert counted[name][0].startswith(f"{rows[0]['weights']}, ")
        assert counted[name][1] == f"{rows[0]['bytes'] / 1e6:.2f} MB"
        for cell, row in zip(counted[name][2:], rows, strict=True):
            assert cell == f"{100 * row['of gathering']:.2g}%"
    for name, network in (("ResNet-50", "resnet50"), ("GPT-2", "gpt2")):
        rows = [one(results["measured"], input=network, ranks=ranks) for ranks in (1, 2)]
        assert measured[name] == [f"{row['faster']:.1f}" for row in rows]


def test_accuracies_of_n_of_m():
    scores = results("pruning_shakespeare_tiny/nm")
    (page,) = (table for table in tables("docs/guides/nm.md") if "SR-STE" in table)
    assert page["dense"][0] == scores["dense"][0]
    rows = {"PDP, recommended": "pdp", "pruned once, then trained": "one-shot", "SR-STE": "sr-ste"}
    for name, setting in rows.items():
        assert [cell.strip("*") for cell in page[name]] == scores[setting][:2]


def test_scores_of_finetuned_groups():
    folders = ("finetune_shakespeare_tiny", "finetune_mnist")
    scores = [results(f"{folder}/finetune-nm") for folder in folders]
    (page,) = (table for table in tables("docs/guides/finetuning.md") if "SR-STE" in table)
    assert page["dense"][::2] == [each["dense"][0] for each in scores]
    rows = {
        "PDP, `for_finetuning`": "pdp",
        "pruned once at the start": "one-shot",
        "SR-STE": "sr-ste",
    }
    for name, setting in rows.items():
        cells = [cell for each in scores for cell in each[setting][:2]]
        assert [cell.strip("*") for cell in page[name]] == cells


@pytest.mark.parametrize(
    ("name", "study", "dense", "once"),
    [
        (
            "MLP on MNIST from scratch",
            "pruning_mnist/channels-settings",
            "pruning_mnist/nm",
            "15% + 40%",
        ),
        (
            "the same, fine-tuned",
            "finetune_mnist/finetune-channels-settings",
            "finetune_mnist/finetune",
            "0% + 0%",
        ),
        (
            "small GPT, fine-tuned",
            "finetune_shakespeare_tiny/finetune-channels-settings",
            "finetune_shakespeare_tiny/finetune",
            "0% + 0%",
        ),
    ],
)
def test_scores_of_channels(name, study, dense, once):
    scores = results(study)
    (page,) = (t for t in tables("docs/guides/channels.md") if "pruned once" in str(t.get("")))
    (cells,) = (page[key] for key in page if key.startswith(name))
    assert cells[0] == results(dense)["dense"][0].split()[0]
    for cell, setting in zip(cells[1:], ("pdp", f"one-shot, {once}"), strict=True):
        assert cell.replace("*", "").split(" / ") == [s.split()[0] for s in scores[setting][:2]]


def losses(study, dense=None):
    """What PDP loses against the dense network, for the first two sparsities of a study."""
    cells = results(dense or study)["dense"][0], *results(study)["pdp"][:2]
    base, *pruned = (float(cell.split()[0]) for cell in cells)
    return [abs(each - base) for each in pruned]


def test_losses_of_get_started():
    text = (ROOT / "docs/get-started.md").read_text()
    mlp = losses("pruning_mnist/methods")[0]
    gpt = losses("pruning_shakespeare_tiny/methods")
    assert f"loses {mlp:.2f} points (MLP on MNIST, 90%), {gpt[0]:.2f} to {gpt[1]:.2f} nats" in text
    groups = losses("pruning_shakespeare_tiny/nm")[0]
    assert f"loses {groups:.3f} nats of loss (small GPT)" in text
    channels = losses("pruning_mnist/channels-settings", "pruning_mnist/nm")[0]
    assert f"loses {channels:.2f} points (MLP on MNIST); time" in text


def test_scores_of_finetuning():
    gpt, mlp = results("finetune_shakespeare_tiny/finetune"), results("finetune_mnist/finetune")
    schedules = results("finetune_shakespeare_tiny/finetune-schedules")
    pages = [
        table for table in tables("docs/guides/finetuning.md") if "zeros" in str(table.get(""))
    ]
    rows = {
        "PDP, `for_finetuning`": "pdp",
        "GMP, the same sparsity in each layer": "gmp",
        "GMP, one threshold for all": "gmp-global",
    }
    for page, scores in zip(pages, (gpt, mlp), strict=True):
        (dense,) = (cells[0] for name, cells in page.items() if name.startswith("dense"))
        assert dense == scores["dense"][0]
        for name, setting in rows.items():
            assert [cell.strip("*") for cell in page[name]] == scores[setting][:2]
    assert pages[0]["PDP, `for_epochs`"] == schedules["pdp, a tenth, 15% + 40%"][:2]


def test_accuracies_of_the_readme():
    scores = results("pruning_mnist/methods")
    text = " ".join((ROOT / "README.md").read_text().split())
    at_99 = {name: cells[3] for name, cells in scores.items() if name and "±" in cells[3]}
    others = {name for name in at_99 if name != "dense" and not name.startswith("pdp")}
    best = max((at_99[name] for name in others), key=lambda cell: float(cell.split()[0]))
    assert len(others) == 8
    assert f"dense {at_99['dense'].split()[0]}%" in text
    assert f"at 99% sparsity {at_99['pdp']}, the best of eight other methods {best}" in text


@pytest.mark.parametrize(
    ("name", "network"), [("ResNet-50, 54 weights", "resnet50"), ("GPT-2, 49 weights", "gpt2")]
)
def test_speeds_of_the_readme(name, network):
    """In how many times as long as ours eager PyTorch takes, and the fastest of all other ways."""
    cells = []
    for run in ("h100/eager-lists", "cpu"):
        rows = json.loads((CPU.parent / run / "benchmark.json").read_text())["rows"]
        chosen = {"step": "step", "input": network, "dtype": "float32"}
        seconds = {
            row["provider"]: row["median_s"]
            for row in rows
            if row["mask"] != "paper" and all(row[key] == chosen[key] for key in chosen)
        }
        ours, kthvalue = seconds.pop("ours"), seconds["eager-kthvalue"]
        cells.append(f"{kthvalue / ours:.0f} / {min(seconds.values()) / ours:.0f}")
    (table,) = (table for table in tables("README.md") if "a training step" in str(table))
    (found,) = (table[key] for key in table if key.startswith(name))
    assert found == cells


def test_training_steps_of_the_readme():
    (table,) = (table for table in tables("README.md") if "a training step" in str(table))
    found = table["a training step, relative to the dense one"]
    small, large, gpt = ratios(CPU / "training_step.json")
    resnet, gpt2 = ratios(CPU.parent / "h100" / "training_step.json")
    assert found[0] == f"{resnet:.2f} (ResNet-50), {gpt2:.2f} (GPT-2)"
    assert found[1] == f"{gpt:.2f} (a GPT), {large:.2f} to {small:.2f} (MLP)"


def ratios(path):
    rows = json.loads(path.read_text())["rows"]
    return [row["ratios"]["pdp"] for row in rows if "dense" in row["ratios"]]
