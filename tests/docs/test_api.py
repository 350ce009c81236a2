"""Every public name is documented: its arguments, its errors, an example that runs, one page."""

import builtins
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import pdp_kernels
from pdp_kernels.ops.schemas import SCHEMAS

PAGES = Path(__file__).parents[2] / "docs" / "api"

# Of the libraries that the integrations belong to, some environments have none.
INTEGRATIONS = {
    "lightning": ["PDPCallback"],
    "transformers": ["PDPCallback"],
    "torch_pruning": ["ChannelRemoval", "KeptChannels", "remove_dead_channels"],
}
METHODS_OF = ("PDPConfig", "PDPPruner", "SAPPruner")

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Warns|Examples):$", re.MULTILINE)
ENTRY = re.compile(r"^ {4}(\S+?): ", re.MULTILINE)  # continuation lines stand further right
IN_ORDER = ("Args", "Attributes", "Returns", "Raises", "Examples")

PUBLIC = [name for name in pdp_kernels.__all__ if not name.startswith("_")]
PATHS = [f"pdp_kernels.{name}" for name in PUBLIC] + [
    f"pdp_kernels.integrations.{module}.{name}"
    for module, names in INTEGRATIONS.items()
    for name in names
]


def public(path):
    """The class or function of a path, or a skip where its library is absent."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as missing:
        if module == "pdp_kernels":
            raise
        pytest.skip(str(missing))


def sections(docstring):
    """The text of each section of a docstring in Google's style, by its title."""
    _, *parts = SECTION.split(docstring)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def arguments(function):
    """The names of the arguments as a docstring writes them."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(function).parameters.values()
    return [stars.get(each.kind, "") + each.name for each in parameters if each.name != "self"]


def assert_documented(function, docstring):
    """The sections of a docstring are those that the signature asks for."""
    found = sections(docstring)
    order = [title for title in found if title in IN_ORDER]
    assert order == sorted(order, key=IN_ORDER.index)
    first, blank, *_ = [*docstring.splitlines(), ""]
    assert first.endswith(".") and not blank
    assert ENTRY.findall(found.get("Args", "")) == arguments(function)
    for title in ("Raises", "Warns"):
        for name in ENTRY.findall(found.get(title, "")):
            kind = Exception if title == "Raises" else Warning
            assert issubclass(getattr(builtins, name), kind)


def assert_function_documented(function):
    docstring = inspect.getdoc(function)
    assert_documented(function, docstring)
    returns = inspect.signature(function).return_annotation not in (None, "None")
    assert ("Returns" in sections(docstring)) == returns
    # The site would take what stands before a colon for the type.
    assert not returns or ":" not in sections(docstring)["Returns"].strip().splitlines()[0]


@pytest.mark.parametrize("path", PATHS)
def test_the_docstring_names_every_argument_and_has_an_example(path):
    named = public(path)
    docstring = inspect.getdoc(named)
    assert ">>> " in sections(docstring)["Examples"]
    if not inspect.isclass(named):
        assert_function_documented(named)
        assert "Raises" in sections(docstring) or not arguments(named)
    elif issubclass(named, tuple):  # which functions return, and users do not make
        assert ENTRY.findall(sections(docstring)["Attributes"]) == list(named._fields)
    else:
        assert_documented(named, docstring)


def methods():
    for name in METHODS_OF:
        for method, _ in inspect.getmembers(getattr(pdp_kernels, name)):
            if not method.startswith("_"):
                yield name, method


@pytest.mark.parametrize("name, method", list(methods()))
def test_the_docstring_of_a_method_names_every_argument(name, method):
    owner = getattr(pdp_kernels, name)
    found = inspect.getattr_static(owner, method)
    if isinstance(found, property):
        assert found.__doc__.endswith(".")
    elif callable(getattr(owner, method)):
        assert_function_documented(getattr(owner, method))
    else:  # the default of a field
        assert method in arguments(owner)


@pytest.mark.parametrize("path", PATHS)
def test_the_examples_of_the_docstrings_run(path):
    named = public(path)
    module = inspect.getmodule(named)
    names = {"torch": torch} | vars(pdp_kernels) | vars(module)
    tests = doctest.DocTestFinder().find(named, named.__name__, module, globs=names)
    results = [doctest.DocTestRunner().run(test) for test in tests]
    assert sum(result.attempted for result in results) > 0
    assert sum(result.failed for result in results) == 0


@pytest.mark.parametrize("module", INTEGRATIONS)
def test_the_integrations_have_these_public_names(module):
    path = f"pdp_kernels.integrations.{module}"
    try:
        names = vars(importlib.import_module(path))
    except ImportError as missing:
        pytest.skip(str(missing))
    own = [name for name, value in names.items() if getattr(value, "__module__", None) == path]
    assert sorted(name for name in own if not name.startswith("_")) == INTEGRATIONS[module]


def test_the_page_of_the_operators_has_their_schemas():
    listed = re.search(r"```text\n(.*?)\n```", (PAGES / "operators.md").read_text(), re.DOTALL)
    schemas = [name + schema for name, schema in SCHEMAS.items()]
    assert listed[1].splitlines() == schemas


def test_every_public_name_stands_on_one_page():
    lines = "\n".join(page.read_text() for page in PAGES.glob("*.md"))
    assert sorted(re.findall(r"^::: (\S+)$", lines, re.MULTILINE)) == sorted(PATHS)
