"""Runs programs; leaves these tests out where the packages of the studies are not installed."""

import sys
from importlib.util import find_spec

import pytest


def installed(*names):
    return all(map(find_spec, names))


collect_ignore_glob = []
if not installed("matplotlib", "tqdm"):
    collect_ignore_glob = ["test_*.py"]
elif not installed("sklearn"):  # whose digits all but these learn
    collect_ignore_glob = ["test_data.py", "test_flips.py", "test_methods.py", "test_programs.py"]


@pytest.fixture
def call_main(monkeypatch, capsys):
    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    return call
