"""Figures of the reports: matplotlib is imported when one is plotted."""

from typing import Any


def new_figure(caller: str, width: float, height: float) -> Any:
    """Return an empty matplotlib figure of this size in inches, or raise an ImportError."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{caller} needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")
