"""Returns memory to the system that the C library keeps after it was freed."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def give_back() -> None:
    """Give what is free back to the system, where the C library can (glibc).

    Arrays of many sizes leave holes between them, and the process grows by a few percent for some hundred pictures
    although it holds no more than before.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return None
