"""How many variants of its kernels Triton would compile for some calls. It compiles none of them.

A process of its own asks for them: in the tests' process, kernels are interpreted.
"""

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]


def count_variants(steps: str) -> dict[str, dict[str, int]]:
    """Return how many variants of each kernel each step needs, by the names of both.

    Args:
        steps: "module:NAME" of a dict of functions without arguments. They call Triton operators on
            tensors of device "meta", which have addresses but no memory.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", __name__, steps],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def main(steps: str) -> None:
    """Write the result of `count_variants` as JSON."""
    from triton import knobs
    from triton.runtime import driver

    from instruments.triton_launches import CompilingDriver

    variants = set()

    def note_and_skip(key, fn, **rest):
        variants.add((fn.name.rpartition(".")[2], key))
        return True

    driver.set_active(CompilingDriver("sm_90"))
    knobs.runtime.jit_cache_hook = note_and_skip
    module, _, name = steps.partition(":")
    counts = {}
    for step, function in getattr(importlib.import_module(module), name).items():
        variants.clear()
        function()
        counts[step] = Counter(kernel for kernel, _ in variants)
    print(json.dumps(counts))


if __name__ == "__main__":
    main(sys.argv[1])
