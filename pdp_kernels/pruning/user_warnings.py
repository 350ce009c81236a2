"""Warnings that point at the user's code, however deep in this package they arise."""

import sys
import warnings
from types import FrameType

_NOT_THE_USERS = ("pdp_kernels", "torch")  # packages; torch calls decorated methods and hooks


def warn_user(message: str) -> None:
    """Issue a UserWarning at the line outside this package and torch that led here."""
    level, frame = 2, sys._getframe(1)
    while (caller := _caller_if_not_the_users(frame)) is not None:
        level, frame = level + 1, caller
    warnings.warn(message, stacklevel=level)


def _caller_if_not_the_users(frame: FrameType) -> FrameType | None:
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return frame.f_back if package in _NOT_THE_USERS else None
