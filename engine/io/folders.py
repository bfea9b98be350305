"""Folders that are either whole or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.io.files import fsync, naming


def fsync_tree(folder: Path) -> None:
    """Flush every file below a folder, and the folders, to the disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            fsync(Path(root) / name)
        fsync(Path(root))


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target`; on a clean exit it is fsynced and replaces target, else it is removed.

    A kill between the two renames of a replacement leaves the old one as `.NAME.retired`; the next call restores it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staged, retired = (target.parent / f".{target.name}.{state}" for state in ("staged", "retired"))
    if retired.exists() and not target.exists():
        os.replace(retired, target)
    shutil.rmtree(staged, ignore_errors=True)
    shutil.rmtree(retired, ignore_errors=True)
    try:
        with naming(target, staged):
            staged.mkdir()
            yield staged
            fsync_tree(staged)
            if target.exists():
                os.replace(target, retired)
            try:
                os.replace(staged, target)
            except OSError:
                if retired.exists():
                    os.replace(retired, target)
                raise
            fsync(target.parent)
            shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def check_target(target: str | os.PathLike[str], overwrite: bool, *sources: str | os.PathLike[str]) -> Path:
    """The path of a model folder about to be written, or an error that names what is in the way.

    Raises:
        FileExistsError: it exists, and overwrite is off or what is there is not a model folder.
        ValueError: it is one of the sources.
    """
    path = Path(target)
    for source in map(Path, sources):
        if path.exists() and source.exists() and path.samefile(source):
            raise ValueError(f"{path}: the output folder must not be an input; give another")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; give another folder, or --overwrite")
    if path.exists() and not (path / "unet" / "config.json").is_file():
        raise FileExistsError(f"{path} exists and is not a model folder, so it will not be overwritten; give another")
    return path
