"""Checkpoints that survive kill -9, a full disk and flipped bits. No pickle: safetensors and JSON.

A checkpoint is staged in a folder beside, every file is flushed, the manifest (sizes and SHA-256 of the others) is
written last, and one `os.replace` makes it visible. Old ones are removed only after that. So a folder named
`checkpoint-N` is whole unless something damaged it, and then reading it tells. The step in state.json is the one in the
folder's name, and every file of tensors carries the SHA-256 of the state.json that it was saved with: parts of two
checkpoints do not make one.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from engine.io.files import fsync, naming, sha256
from engine.io.folders import fsync_tree
from gdpo.model.parts import disk_errors, first_line

_NAME = re.compile(r"checkpoint-(\d+)")
NEWEST = ("latest", "auto")  # words of resume_from_checkpoint
_REQUIRED = ("state.json", "trainable.safetensors", "optimizer.safetensors")
_MAX_JSON = 16 << 20
_DEEPEST = 16  # objects and lists inside each other
_STATE = "state"  # in the header of a file of tensors: SHA-256 of its state.json


class Damaged(ValueError):
    """A folder that is not what a run saved as a checkpoint; the message names it and why."""


class Facts(msgspec.Struct):
    """state.json: what a run that goes on from here must know.

    Attributes:
        step: optimiser steps done.
        identity: the options that the weights depend on, as TrainConfig.identity gives them.
        data: fingerprint of the crops.
        samples_per_step: batch x accumulation x processes.
        scaler: state of the fp16 loss scaler, where there is one.
    """

    step: Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]
    identity: dict[str, Any]
    data: str
    samples_per_step: Annotated[int, msgspec.Meta(ge=1, lt=1 << 53)]
    scaler: dict[str, int | float] | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True):
    """An entry of manifest.json, which has one for each file, by name."""

    bytes: Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


@dataclass
class Checkpoint:
    """`tensors`: file stem -> name -> tensor (CPU), with at least "trainable" and "optimizer"."""

    tensors: dict[str, dict[str, torch.Tensor]]
    state: Facts


def save(root: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `root/checkpoint-STEP`, then remove all but the newest `keep` valid-looking ones. Returns its path."""
    step = checkpoint.state.step
    target = root / f"checkpoint-{step:07d}"
    staged = root / f".staged-checkpoint-{step:07d}"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        with naming(target, staged):
            staged.mkdir(parents=True)
            (staged / "state.json").write_bytes(_json(checkpoint.state))
            header = {_STATE: sha256(staged / "state.json")}
            for stem, tensors in checkpoint.tensors.items():
                path = staged / f"{stem}.safetensors"
                with disk_errors(path):
                    save_file({k: v.contiguous() for k, v in tensors.items()}, path, header)
            files = sorted(p for p in staged.iterdir())
            manifest = {p.name: _File(p.stat().st_size, sha256(p)) for p in files}
            fsync_tree(staged)
            (staged / "manifest.json").write_bytes(_json(manifest))
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


def _json(content: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"


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
    """Read a checkpoint after checking every file against its manifest, and that they belong together.

    Raises:
        Damaged: naming what is missing, cut, altered or another checkpoint's.
        OSError: a file that is there could not be read, which says nothing about the checkpoint.
    """
    try:
        return _load(folder)
    except (msgspec.MsgspecError, SafetensorError, UnicodeError, RecursionError) as error:
        raise Damaged(f"{folder}: {first_line(error)}") from None


def _load(folder: Path) -> Checkpoint:
    manifest = msgspec.json.decode(_small(folder, "manifest.json"), type=dict[str, _File])
    for name in dict.fromkeys((*_REQUIRED, *manifest)):
        path = folder / name
        if name not in manifest or Path(name).name != name or not path.is_file():
            raise Damaged(f"{folder}: {name} is missing")
        entry = manifest[name]
        if path.stat().st_size != entry.bytes or sha256(path) != entry.sha256:
            raise Damaged(f"{folder}: {name} is not what was saved (cut short or altered)")
    state = msgspec.json.decode(_small(folder, "state.json"), type=Facts)
    if not _within(state.identity, _DEEPEST):
        raise Damaged(f"{folder}: state.json is nested deeper than {_DEEPEST}")
    named = re.search(r"checkpoint-(\d+)$", folder.name)  # a copy may have any other name
    if named and int(named[1]) != state.step:
        raise Damaged(f"{folder}: state.json is of step {state.step}")
    tensors = {}
    for name in manifest:
        if name.endswith(".safetensors"):
            with safe_open(folder / name, "pt") as file:  # older checkpoints have no such header
                if (file.metadata() or {}).get(_STATE, manifest["state.json"].sha256) != manifest["state.json"].sha256:
                    raise Damaged(f"{folder}: {name} was saved with another state.json")
            tensors[name.removesuffix(".safetensors")] = load_file(folder / name)
    return Checkpoint(tensors, state)


def _small(folder: Path, name: str) -> bytes:
    """The bytes of a JSON file."""
    path = folder / name
    if not path.is_file():
        raise Damaged(f"{folder}: {name} is missing")
    if path.stat().st_size > _MAX_JSON:
        raise Damaged(f"{folder}: {name} is larger than {_MAX_JSON >> 20} MiB")
    with naming(path):
        return path.read_bytes()


def _within(value: Any, depth: int) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(_within(v, depth - 1) for v in inside)


Check = Callable[[Path, Checkpoint], None]  # raises Damaged where the checkpoint is to be skipped


def newest_valid(root: Path, check: Check = lambda folder, found: None) -> tuple[Path, Checkpoint, list[str]]:
    """The newest checkpoint that is whole and passes `check`, and one line for each newer one that does not.

    Raises:
        FileNotFoundError: when there is none.
    """
    skipped: list[str] = []
    for _, folder in reversed(_listed(root)):
        try:
            found = load(folder)
            check(folder, found)
        except Damaged as error:
            skipped.append(str(error))
        else:
            return folder, found, skipped
    reasons = f" ({'; '.join(skipped)})" if skipped else ""
    raise FileNotFoundError(f"{root} holds no valid checkpoint to resume from{reasons}")


def find(root: Path, wanted: str, check: Check) -> tuple[Path, Checkpoint, list[str]]:
    """The checkpoint that `resume_from_checkpoint` names: "latest", or a folder."""
    if wanted in NEWEST:
        return newest_valid(root, check)
    folder = Path(wanted) if Path(wanted).is_dir() else root / wanted
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{wanted}: no such checkpoint folder (resume_from_checkpoint takes latest, auto or a folder)"
        )
    found = load(folder)
    check(folder, found)
    return folder, found, []
