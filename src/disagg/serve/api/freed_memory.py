"""Giving memory back to the system after something large."""

import ctypes


def give_back() -> None:
    """Have the C library return what it holds free; nothing happens with one that cannot (musl)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
