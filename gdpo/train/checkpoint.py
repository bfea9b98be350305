"""Checkpoints that survive kill -9, a full disk and flipped bits. No pickle: safetensors and JSON.

A checkpoint is staged in a folder beside, every file is flushed, the manifest (sizes and SHA-256 of the others) is
written last, and one `os.replace` makes it visible. Old ones are removed only after that. So a folder named
`checkpoint-N` is whole unless the disk damaged it, and then its manifest tells.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from engine.io.files import fsync, sha256
from engine.io.folders import fsync_tree

_NAME = re.compile(r"checkpoint-(\d+)")
NEWEST = ("latest", "auto")  # words of resume_from_checkpoint


@dataclass
class Checkpoint:
    """`tensors`: file stem -> name -> tensor (CPU); `state`: small JSON-able facts, with at least "step"."""

    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]


def save(root: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `root/checkpoint-STEP`, then remove all but the newest `keep` valid-looking ones. Returns its path."""
    step = checkpoint.state["step"]
    target = root / f"checkpoint-{step:07d}"
    staged = root / f".staged-checkpoint-{step:07d}"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        staged.mkdir(parents=True)
        for stem, tensors in checkpoint.tensors.items():
            save_file({k: v.contiguous() for k, v in tensors.items()}, staged / f"{stem}.safetensors")
        (staged / "state.json").write_text(json.dumps(checkpoint.state, indent=1) + "\n")
        files = sorted(p for p in staged.iterdir())
        manifest = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
        fsync_tree(staged)
        (staged / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        fsync(staged / "manifest.json")
        fsync(staged)
        if target.exists():  # the same step saved again, by a run that went back past a damaged checkpoint
            _remove(target)
        os.replace(staged, target)
        fsync(root)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    for _, old in _listed(root)[:-keep]:
        _remove(old)
    return target


def _remove(folder: Path) -> None:
    """Rename first, so that a kill in the middle leaves no half checkpoint under its name."""
    doomed = folder.parent / f".removed-{folder.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clean(root: Path) -> None:
    """Remove what a killed run left staged or half removed."""
    for pattern in (".staged-checkpoint-*", ".removed-*"):
        for left in root.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def remove_after(root: Path, step: int) -> None:
    """Remove the checkpoints of later steps: after `newest_valid` they are the damaged ones that it skipped.

    Left in place they would count among those that `save` keeps, until nothing but damaged ones is kept.
    """
    for found, folder in _listed(root):
        if found > step:
            _remove(folder)


def set_aside_after(root: Path, step: int) -> list[Path]:
    """Rename the checkpoints of later steps, and return their new paths: the run went back and takes another course.

    Left in place, they would be resumed from as the newest ones.
    """
    moved = []
    for found, folder in _listed(root):
        if found > step:
            target = folder.parent / f"set-aside-{folder.name}"
            if target.exists():
                _remove(target)
            os.replace(folder, target)
            moved.append(target)
    return moved


def _listed(root: Path) -> list[tuple[int, Path]]:
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def exists(root: Path) -> bool:
    """Whether the run's folder holds any checkpoint, valid or not."""
    return bool(_listed(root))


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint after checking every file against its manifest.

    Raises:
        ValueError: naming the file that is missing, cut or altered.
        OSError: a file that is there could not be read, which says nothing about the checkpoint.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        entries = {str(name): (int(facts["bytes"]), str(facts["sha256"])) for name, facts in manifest.items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: manifest.json cannot be read ({error})") from None
    for name, (size, digest) in entries.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise ValueError(f"{folder}: {name} is missing")
        if path.stat().st_size != size or sha256(path) != digest:
            raise ValueError(f"{folder}: {name} is not what was saved (cut short or altered)")
    if "state.json" not in entries:
        raise ValueError(f"{folder}: state.json is missing")
    tensors = {n.removesuffix(".safetensors"): load_file(folder / n) for n in entries if n.endswith(".safetensors")}
    return Checkpoint(tensors, json.loads((folder / "state.json").read_text()))


def newest_valid(root: Path) -> tuple[Path, Checkpoint, list[str]]:
    """The newest checkpoint that is whole, and one line for each newer one that is not.

    Raises:
        FileNotFoundError: when there is none.
    """
    passed_over: list[str] = []
    for _, folder in reversed(_listed(root)):
        try:
            return folder, load(folder), passed_over
        except ValueError as error:
            passed_over.append(str(error))
    reasons = f" ({'; '.join(passed_over)})" if passed_over else ""
    raise FileNotFoundError(f"{root} holds no valid checkpoint to resume from{reasons}")


def find(root: Path, wanted: str) -> tuple[Path, Checkpoint, list[str]]:
    """The checkpoint that `resume_from_checkpoint` names: "latest", or a folder."""
    if wanted in NEWEST:
        return newest_valid(root)
    folder = Path(wanted) if Path(wanted).is_dir() else root / wanted
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{wanted}: no such checkpoint folder (resume_from_checkpoint takes latest, auto or a folder)"
        )
    return folder, load(folder), []
