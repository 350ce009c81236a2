"""The code in README and in the documentation runs, and does what the text around it says."""

import re
import shlex
import sys
from importlib.util import find_spec

import pytest
import torch

from tests.docs.blocks import ROOT, blocks, programs

PROGRAMS = programs()
ON_SEVERAL_RANKS = [program for program in PROGRAMS if "torchrun" in program.code]
ON_ONE = [program for program in PROGRAMS if "torchrun" not in program.code]

# What `make test` installs and a user of the package may not have.
OPTIONAL = {
    "accelerate", "lightning", "matplotlib", "onnx", "onnxruntime", "peft", "sklearn", "timm",
    "torch_pruning", "torchao", "transformers",
}  # fmt: skip


@pytest.fixture(autouse=True)
def settings_of_accelerate():
    """accelerate, and transformers with it, keep their settings for the whole process."""
    yield
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def by_name(items):
    return pytest.mark.parametrize("block", items, ids=[item.name for item in items])


def run(block):
    """Run a program as a script, in the folder that the test is in. Return its names."""
    names = {"__name__": "__main__"}
    torch.manual_seed(0)
    try:
        exec(compile(block.code, block.name, "exec"), names)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")
    return names


def test_the_pages_that_readers_meet_first_have_examples():
    pages = {program.page for program in PROGRAMS}
    assert {"README.md", "docs/index.md", "docs/get-started.md"} <= pages
    assert len([page for page in pages if page.startswith("docs/guides/")]) >= 8


@by_name(ON_ONE)
def test_example_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(block)


@by_name([program for program in ON_ONE if program.page == "README.md"])
def test_the_example_of_the_readme_ends_with_the_zeros_it_names(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(block)
    assert "exactly 90% zeros" in block.code
    weights = [weight for weight in names["model"].parameters() if weight.dim() > 1]
    total = sum(weight.numel() for weight in weights)
    assert sum(int((weight == 0).sum()) for weight in weights) == round(0.9 * total)


def test_the_program_on_several_ranks_is_the_example_that_is_tested():
    (program,) = ON_SEVERAL_RANKS
    assert program.code == (ROOT / "examples" / "several_devices.py").read_text()


@by_name(blocks("bash"))
def test_commands_name_what_exists(block):
    """Targets of make, modules and scripts. Commands that install or run for hours do not run."""
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([\w-]+(?: [\w-]+)*):(?!=)", makefile, re.MULTILINE)
    targets = {target for line in targets for target in line.split()}
    for line in block.code.splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words[:1] == ["make"]:
            assert {word for word in words[1:] if "=" not in word} <= targets, line
        if words[:2] == ["python", "-m"] and not words[2].startswith(("pip", "pytest")):
            assert find_spec(words[2]), line
        for word in words:
            if word.endswith(".py") and "/" in word:
                assert (ROOT / word).exists(), line
