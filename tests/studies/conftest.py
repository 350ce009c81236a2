"""Leaves these tests out where the packages of the studies are not installed."""

from importlib.util import find_spec

NEEDED = ("matplotlib", "sklearn", "tqdm")
collect_ignore_glob = [] if all(map(find_spec, NEEDED)) else ["test_*.py"]
