"""What all tests of other libraries share."""

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """Leave what the imports made out of the garbage collections that each training begins with."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
