"""The package has layers, from ops to integrations. Each imports only those below."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The layers that each may import besides itself. The top modules, such as __init__, may import all.
# ops imports its Triton kernels by name, when an operator is first called.
BELOW = {
    "triton_kernels": {"ops"},
    "ops": set(),
    "distributed": {"ops"},
    "functional": {"ops", "distributed"},
    "pruning": {"ops", "distributed", "functional"},
    "integrations": {"ops", "distributed", "functional", "pruning"},
}
OUTSIDE = {"benchmarks", "examples", "instruments", "studies", "tests", "triton_kernels"}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "pdp_kernels" else ("pdp_kernels", *parts)
    return ".".join(parts).removesuffix(".__init__")


FILES = [*ROOT.glob("pdp_kernels/**/*.py"), *ROOT.glob("triton_kernels/*.py")]
TREES = {module_name(path): ast.parse(path.read_text(), str(path)) for path in FILES}


def imported_names(tree):
    """Yield what the module imports anywhere in its file, as (module, name or None)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), each.name) for each in node.names)


IMPORTS = {
    module: {
        f"{found}.{name}" if f"{found}.{name}" in TREES else found
        for found, name in imported_names(tree)
    }
    for module, tree in TREES.items()
}


def layer(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in BELOW else "top"


def test_modules_import_only_their_own_layer_and_those_below():
    assert {layer(module) for module in TREES} == {"top", *BELOW}
    upward = {
        (module, found)
        for module in TREES
        for found in IMPORTS[module] & TREES.keys()
        if layer(module) != "top" and layer(found) not in {layer(module)} | BELOW[layer(module)]
    }
    assert not upward


def test_the_package_imports_nothing_that_is_not_installed_with_it():
    roots = {found.split(".")[0] for module in TREES for found in IMPORTS[module]}
    assert not roots & (OUTSIDE | {""})


def test_imports_run_in_no_circle():
    graph = {module: IMPORTS[module] & TREES.keys() for module in TREES}
    assert set(TopologicalSorter(graph).static_order()) == TREES.keys()


def test_private_names_are_not_imported():
    private = {
        (module, found, name)
        for module, tree in TREES.items()
        for found, name in imported_names(tree)
        if found in TREES and name and name.startswith("_") and not name.startswith("__")
    }
    assert not private


def test_the_package_does_not_import_its_integrations():
    others = {module for module in TREES if layer(module) != "integrations"}
    assert not [
        m for m in others if any(layer(f) == "integrations" for f in IMPORTS[m] & TREES.keys())
    ]
