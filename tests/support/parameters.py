"""Sets of parameters."""

import itertools


def by_turns(*axes):
    """Return the product of all axes but the last, whose values take turns.

    With three axes or more, the last of them no longer than the others, every value of one axis
    meets every value of every other axis.
    """
    *others, last = map(list, axes)
    return [
        (
            *(axis[place] for axis, place in zip(others, places, strict=True)),
            last[sum(places) % len(last)],
        )
        for places in itertools.product(*map(range, map(len, others)))
    ]
