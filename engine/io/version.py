"""Which version of the program this is."""

from __future__ import annotations

import functools


@functools.cache
def version() -> str:
    """Of the installed package; "0" in a checkout that is not installed."""
    from importlib import metadata

    try:
        return metadata.version("gdpo-sr")
    except metadata.PackageNotFoundError:
        return "0"
