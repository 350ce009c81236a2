"""What tests share: weights, the oracle, checks of backends, and groups of ranks."""

import pytest

# Their assertions show the values that they compare, as those of tests do.
for _module in ("compression", "masks", "oracle", "selection", "sharded", "sums"):
    pytest.register_assert_rewrite(f"{__name__}.{_module}")
