"""The README's code runs and does what the text around it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_first_example_ends_with_the_sparsity_it_names():
    names = {}
    exec(EXAMPLES[0], names)
    weight = names["layer"].weight
    assert (weight == 0).sum() == round(0.9 * weight.numel())
    assert torch.isfinite(names["loss"])


def test_every_example_runs():
    for example in EXAMPLES:
        if "torchrun" not in example:
            exec(example, {})


def test_the_example_on_several_ranks_runs(tmp_path):
    (example,) = (example for example in EXAMPLES if "torchrun" in example)
    (tmp_path / "fsdp.py").write_text(example)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    output = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "fsdp.py"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert output.returncode == 0, output.stderr
    assert re.search(r"^total +33,178 of 36,864 .* 90\.0011%", output.stdout, re.MULTILINE)


def test_every_public_name_is_explained():
    import pdp_kernels

    text = README.read_text()
    for name in pdp_kernels.__all__:
        assert not name[0].islower() or f"`{name}(" in text
