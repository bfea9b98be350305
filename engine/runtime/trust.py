"""Trust in TensorRT plans. A plan is executable code, so its hash must be in this user's list of plans built here, or
the user trusts it explicitly (`--trust-plan`). The C++ library reads the same list.
"""

from __future__ import annotations

import os
from pathlib import Path

from engine.io.files import atomic_write, naming


def _list() -> Path:
    home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(home) / "gdpo-sr" / "plans.txt"


def remember_plan(sha256: str) -> None:
    """Add a plan that this user just built to the list of plans that load without being asked for."""
    path = _list()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with naming(path):
        known = path.read_text() if path.is_file() else ""
    atomic_write(path, known + f"{sha256}\n")
    path.chmod(0o600)


def built_here(sha256: str) -> bool:
    """Whether this user built the plan of that hash."""
    path = _list()
    with naming(path):
        return path.is_file() and sha256 in path.read_text().split()
