"""Which file becomes which: inputs, globs and folders to a list of jobs, with every clash found before any work."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.io.images import SUFFIXES


@dataclass(frozen=True)
class Job:
    source: Path
    target: Path


def plan(
    inputs: Sequence[str],
    output: str,
    *,
    suffix: str = "",
    extension: str | None = None,
    recursive: bool = False,
) -> list[Job]:
    """Pair every input with its output.

    Args:
        inputs: files, folders and glob patterns.
        output: a file when there is one input file and this has a picture's suffix; else a folder.
        suffix: appended to the stem of every output.
        extension: of the outputs, such as "png"; None keeps the input's.
        recursive: descend into input folders and mirror their trees.

    Raises:
        ValueError: nothing matches, an output that two inputs would write, or that is an input itself.
    """
    extension = f".{extension.removeprefix('.').lower()}" if extension else None
    if extension and extension not in SUFFIXES:
        raise ValueError(f"format must be one of {' '.join(s[1:] for s in SUFFIXES)}; got {extension[1:]}")
    if "" in (*inputs, output):
        raise ValueError("an input or the output is an empty path; an unset variable?")
    out = Path(output)
    found = [pair for text in inputs for pair in _expand(text, recursive)]
    one_file = len(inputs) == 1 and len(found) == 1 and not Path(inputs[0]).is_dir()
    to_file = one_file and bool(out.suffix) and not out.is_dir() and not output.endswith(os.sep)
    if to_file and out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"output {output}: cannot write {out.suffix}; use {' '.join(SUFFIXES)} (a folder: {output}/)")
    if to_file:
        if extension and SUFFIXES[extension] != SUFFIXES[out.suffix.lower()]:
            raise ValueError(f"output {output} and format {extension[1:]} contradict each other")
        jobs = [Job(found[0][0], out.with_name(f"{out.stem}{suffix}{out.suffix}"))]
    else:
        if out.exists() and not out.is_dir():
            raise ValueError(f"output {output} is a file; several inputs need a folder")
        if out.suffix.lower() in SUFFIXES and not out.is_dir() and not output.endswith(os.sep):
            raise ValueError(f"output {output} is named like a picture; several inputs need a folder (or: {output}/)")
        jobs = []
        for source, relative in _without_own_outputs(found, inputs, out, suffix):
            jobs.append(Job(source, out / relative.with_name(f"{relative.stem}{suffix}{extension or relative.suffix}")))
    _check(jobs)
    return jobs


def _expand(text: str, recursive: bool) -> Iterator[tuple[Path, Path]]:
    """(file, its path below the output folder) for one argument."""
    path = Path(text)
    if path.is_dir():
        walk = sorted(path.rglob("*") if recursive else path.iterdir())
        files = [p for p in walk if p.suffix.lower() in SUFFIXES and p.is_file() and not p.name.startswith(".")]
        if not files:
            hint = "" if recursive else " (its sub-folders: --recursive)"
            raise ValueError(f"{text}: no {' '.join(SUFFIXES)} picture in this folder{hint}")
        yield from ((p, p.relative_to(path)) for p in files)
    elif path.exists() or not glob.has_magic(text):
        yield path, Path(path.name)  # a missing file is reported when its turn comes, after the others
    else:
        files = [Path(m) for m in sorted(glob.glob(text, recursive=True))]
        files = [p for p in files if p.is_file() and p.suffix.lower() in SUFFIXES]
        if not files:
            raise ValueError(f"{text}: no picture matches")
        yield from ((p, Path(p.name)) for p in files)


def _without_own_outputs(
    found: list[tuple[Path, Path]], inputs: Sequence[str], out: Path, suffix: str
) -> Iterator[tuple[Path, Path]]:
    """Leave out what an earlier run wrote: a folder below the input's, or a suffixed copy beside its original."""
    named = set(inputs)
    below = out.resolve() not in {Path(text).resolve() for text in inputs}
    originals = {source.with_suffix("") for source, _ in found}
    for source, relative in found:
        if str(source) not in named:
            if below and out.resolve() in source.resolve().parents:
                continue
            if (
                suffix
                and source.stem.endswith(suffix)
                and source.with_name(source.stem.removesuffix(suffix)) in originals
            ):
                continue
        yield source, relative


def _check(jobs: list[Job]) -> None:
    sources = {job.source.resolve() for job in jobs}
    written: dict[str, Path] = {}
    for job in jobs:
        target = job.target.resolve()
        if target in sources:
            raise ValueError(
                f"{job.target} is an input: it would be overwritten; choose another folder or --suffix _x4"
            )
        other = written.setdefault(
            str(target).lower(), job.source
        )  # two names that differ in case are one on some disks
        if other != job.source:
            raise ValueError(
                f"{other} and {job.source} would both be written to {job.target}; rename one or use folders"
            )
