"""The public functions are typed: overloads by argument, and examples that pyright accepts."""

import doctest
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pdp_kernels
from tests.docs.blocks import programs

pytest.importorskip("pyright", reason="a tool of `make lint`, absent beside the CPU-only torch")

ROOT = Path(__file__).resolve().parents[1]

PUBLIC = f"import torch\nfrom pdp_kernels import {', '.join(pdp_kernels.__all__)}\n"

OVERLOADS = """
from typing_extensions import assert_type

from torch import Tensor, nn

from pdp_kernels import GroupCheck

weight, weights, flag = torch.ones(8, 8), [torch.ones(8, 8)], bool(torch.rand(()) < 0.5)
either = Tensor | tuple[Tensor, Tensor]

assert_type(pdp_mask(weight, 0.5), Tensor)
assert_type(pdp_mask(weight, 0.5, return_mask=True), tuple[Tensor, Tensor])
assert_type(pdp_mask(weight, 0.5, return_mask=flag), either)
assert_type(pdp_mask_nm(weight, 2, 4), Tensor)
assert_type(pdp_mask_nm(weight, 2, 4, return_mask=True), tuple[Tensor, Tensor])
assert_type(pdp_mask_channel(weight, 0.5), Tensor)
assert_type(pdp_mask_channel(weight, 0.5, return_mask=True), tuple[Tensor, Tensor])
assert_type(pq_index(weight), Tensor)
assert_type(pq_index(weight, scope="neuron"), Tensor)
assert_type(pq_index(weights), Tensor)
assert_type(pq_index(weights, scope="global"), Tensor)
assert_type(pq_index(weights, scope="neuron"), list[Tensor])
assert_type(check_nm(weight), GroupCheck)
assert_type(check_nm(nn.Linear(8, 8)), list[GroupCheck])
"""


def doctests():
    """The examples of the docstrings, by file name."""
    for name in pdp_kernels.__all__:
        docstring = getattr(pdp_kernels, name).__doc__ or ""
        examples = doctest.DocTestParser().get_examples(docstring)
        if callable(getattr(pdp_kernels, name)) and examples:
            yield f"docstring_{name}.py", PUBLIC + "".join(each.source for each in examples)


def sources():
    """All that is checked, by file name."""
    pages = {re.sub(r"\W", "_", each.name) + ".py": each.code for each in programs()}
    examples = {path.name: path.read_text() for path in (ROOT / "examples").glob("*.py")}
    assert len(pages) >= 15 and len(examples) == 6
    return pages | examples | dict(doctests()) | {"overloads.py": PUBLIC + OVERLOADS}


# torch exports names without saying so, and an example may read a gradient that it has made.
SETTINGS = {"reportPrivateImportUsage": False, "reportOptionalMemberAccess": False}


def test_pyright_accepts_the_examples_and_the_overloads(tmp_path):
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(SETTINGS))
    for name, source in sources().items():
        (tmp_path / name).write_text(source)
    check = [sys.executable, "-m", "pyright", "--level", "error", "--pythonpath", sys.executable]
    result = subprocess.run(
        [*check, str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
