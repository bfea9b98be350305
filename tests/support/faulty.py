"""A disk that fails, for programs that are started with it: see faulty_disk.c."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("faulty_disk.c")


def missing() -> str:
    """Why the library cannot be built here, or nothing."""
    if not sys.platform.startswith("linux"):
        return "needs Linux: a library that is loaded first"
    return "" if shutil.which(os.environ.get("CC", "cc")) else "needs a C compiler"


def build(folder: Path) -> Path:
    """Compile the library into a folder."""
    library = folder / "faulty_disk.so"
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", library, SOURCE, "-ldl"]
    subprocess.run(list(map(str, command)), check=True, timeout=60)
    return library


def environment(library: Path, root: Path, kind: str = "none", at: int = 0) -> dict[str, str]:
    """What makes a program see a disk that fails below `root`, a path or the beginning of one."""
    return {"LD_PRELOAD": str(library), "FAULTY_ROOT": str(root), "FAULTY_KIND": kind, "FAULTY_AT": str(at)}
