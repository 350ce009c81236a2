"""Leaves these tests out where the packages of the studies are not installed."""

from importlib.util import find_spec


def installed(*names):
    return all(map(find_spec, names))


collect_ignore_glob = []
if not installed("matplotlib", "tqdm"):
    collect_ignore_glob = ["test_*.py"]
elif not installed("sklearn"):  # whose digits all but these learn
    collect_ignore_glob = ["test_data.py", "test_methods.py", "test_programs.py"]
