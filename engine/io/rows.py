"""Benchmark rows: one JSON object a line in benchmarks/results/NAME.jsonl, each saying where its figures come from.

    from engine.io.rows import append_row, require_clean      # run as `python -m benchmarks.SCRIPT` from the root
    require_clean()                                            # a figure of uncommitted code cannot be looked up
    append_row("kernels", op="gdpo_loss", size="B1 G6", p50_ms=0.12)

A row is the figures plus `time`, `commit`, `dirty`, `machine` (CPU, cores, threads, memory, GPU, driver), `versions`.
Outside a git checkout (a tree copied to a GPU machine) the environment variable GDPO_COMMIT names the commit.
GDPO_RESULTS names another folder for the rows.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(os.environ.get("GDPO_RESULTS") or ROOT / "benchmarks" / "results")
PACKAGES = ("torch", "triton", "numpy", "diffusers", "onnxruntime", "openvino", "opencv-python-headless")


def _output(*command: str, folder: Path | None = None) -> str | None:
    """What a command prints, or None where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder or ROOT, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit(tree: Path | None = None) -> tuple[str, bool | None]:
    """(commit, dirty): the commit of a checkout, by default this one, and whether files beside the results differ.

    dirty is None where no git checkout can tell (GDPO_COMMIT for this tree, or "unknown").
    """
    head = _output("git", "rev-parse", "HEAD", folder=tree)
    if head is None:
        return os.environ.get("GDPO_COMMIT", "unknown") if tree in (None, ROOT) else "unknown", None
    changed = _output("git", "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results", folder=tree)
    return head, changed is None or changed != ""


def require_clean() -> None:
    """Refuse to measure what nobody can look up later.

    Raises:
        RuntimeError: the tree has uncommitted changes, or no commit is known.
    """
    head, dirty = commit()
    if dirty:
        raise RuntimeError(f"the tree differs from commit {head[:12]}: commit first (or measure in a clean clone)")
    if head == "unknown":
        raise RuntimeError("this is not a git checkout: set GDPO_COMMIT to the commit that the tree was copied from")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")  # Linux: platform.processor() is empty there
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache
def _machine() -> dict[str, Any]:
    machine: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": None,
    }
    gpu = _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    if gpu:
        fields = [part.strip() for part in gpu.splitlines()[0].split(",")]
        machine |= dict(zip(("gpu", "driver", "gpu_memory"), fields))
    return machine


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch := sys.modules.get("torch"):  # the local part ("+cpu", "+cu130") and CUDA's version are only known to it
        versions |= {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    return versions


def environment() -> dict[str, Any]:
    """Where figures come from: time, commit, dirty, machine, versions (torch is looked at only if it is loaded)."""
    head, dirty = commit()
    machine = dict(_machine())
    if torch := sys.modules.get("torch"):
        machine["threads"] = torch.get_num_threads()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"time": now, "commit": head, "dirty": dirty, "machine": machine, "versions": _versions()}


def append_row(name: str, /, **figures: Any) -> Path:
    """Append one row to benchmarks/results/NAME.jsonl and return that path.

    Args:
        name: the file's stem, e.g. "kernels".
        figures: what was measured, JSON values; units go into the names (p50_ms, bytes_per_s, peak_mib).

    Raises:
        ValueError: a figure has the name of a field that the environment fills, or is not finite.
    """
    row = environment()
    if clash := row.keys() & figures.keys():
        raise ValueError(f"figures must not be named {', '.join(sorted(clash))}: the environment fills these")
    path = RESULTS / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(figures | row, allow_nan=False) + "\n"
    with open(path, "a", encoding="utf-8") as f:  # one write of one line: two writers do not tear each other's rows
        f.write(line)
    return path


def read_rows(name: str) -> list[dict[str, Any]]:
    """All rows of benchmarks/results/NAME.jsonl, oldest first; none where there is no such file."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
