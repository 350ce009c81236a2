"""The README's code runs and does what the text around it says."""

import re
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
        exec(example, {})


def test_every_public_name_is_explained():
    import pdp_kernels

    text = README.read_text()
    for name in pdp_kernels.__all__:
        assert not name[0].islower() or f"`{name}(" in text
