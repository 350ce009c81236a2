"""What tests share: weights, the oracle, checks of backends, and groups of ranks."""

import pytest

# How long a test waits for another process, in seconds: other work on the machine must not make a
# test fail.
TIMEOUT = 300

# Their assertions show the values that they compare, as those of tests do.
for _module in ("compression", "masks", "oracle", "selection", "sharded", "sums"):
    pytest.register_assert_rewrite(f"{__name__}.{_module}")
