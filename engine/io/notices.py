"""Warnings to the user: one line on stderr, once a run each."""

from __future__ import annotations

import sys

_said: set[str] = set()


def warn_once(key: str, message: str) -> None:
    """Print `warning: message`, unless a warning with this key was printed before."""
    if key not in _said:
        _said.add(key)
        say(f"warning: {message}")


def say(line: str) -> None:
    """Print a line to stderr, above a progress bar where there is one."""
    tqdm = sys.modules.get("tqdm")
    if sys.stderr is not None:
        (tqdm.tqdm.write if tqdm else print)(line, file=sys.stderr)
