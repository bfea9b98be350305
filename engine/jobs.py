"""Which file becomes which: inputs, globs and folders to a list of jobs, with every clash found before any work."""

from __future__ import annotations

import glob
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from engine.io.formats import KINDS, kind_of
from engine.io.images import READABLE, SUFFIXES
from engine.io.notices import say


@dataclass(frozen=True)
class Job:
    """A picture to make: `target` from `source`. `label` is what messages call the input."""

    source: Path
    target: Path
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or str(self.source)


def plan(
    inputs: Sequence[str],
    output: str,
    *,
    suffix: str = "",
    extension: str | None = None,
    recursive: bool = False,
    on_clash: Literal["error", "rename"] = "error",
    notice: Callable[[str], None] = say,
) -> list[Job]:
    """Pair every input with its output.

    Args:
        inputs: files, folders and glob patterns.
        output: a file when there is one input file and this has a picture's suffix; else a folder.
        suffix: appended to the stem of every output.
        extension: of the outputs, such as "png"; None keeps the input's, or takes png where that cannot be written.
        recursive: descend into input folders and mirror their trees.
        on_clash: what becomes of an output that is an input, or that two inputs would write: an error, or a number
            after its name.
        notice: called with a line for each folder that holds files of other kinds, which are left out.

    Raises:
        ValueError: nothing matches, an output that two inputs would write, or that is an input itself.
    """
    extension = f".{kind_of(extension)}" if extension else None
    if extension and extension not in SUFFIXES:
        raise ValueError(f"format must be one of {' '.join(KINDS)}; got {extension[1:]}")
    if "" in (*inputs, output):
        raise ValueError("an input or the output is an empty path; an unset variable?")
    out = Path(output)
    found = [pair for text in inputs for pair in _expand(text, recursive, notice)]
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
            wanted = f"name it with one of {' '.join(SUFFIXES)}, or - for standard output"
            raise ValueError(f"output {output} is a file; {wanted if one_file else 'several inputs need a folder'}")
        if out.suffix.lower() in SUFFIXES and not out.is_dir() and not output.endswith(os.sep):
            raise ValueError(f"output {output} is named like a picture; several inputs need a folder (or: {output}/)")
        jobs = []
        for source, relative in _without_own_outputs(found, inputs, out, suffix):
            kept = relative.suffix if relative.suffix.lower() in SUFFIXES else ".png"
            jobs.append(Job(source, out / relative.with_name(f"{relative.stem}{suffix}{extension or kept}")))
    return _without_clashes(jobs, on_clash)


def _expand(text: str, recursive: bool, notice: Callable[[str], None]) -> Iterator[tuple[Path, Path]]:
    """(file, its path below the output folder) for one argument."""
    path = Path(text)
    if path.is_dir():
        files, others = _walk(path, recursive, notice)
        if not files:
            hint = "" if recursive else " (its sub-folders: --recursive)"
            known = " ".join([*SUFFIXES, *sorted(READABLE - set(SUFFIXES))])
            raise ValueError(f"{text}: no {known} picture in this folder{hint}")
        if others:
            by_count = sorted(others.items(), key=lambda kind: (-kind[1], kind[0]))
            kinds = ", ".join(f"{count} {kind or 'without suffix'}" for kind, count in by_count)
            left_out, all_files = others.total(), others.total() + len(files)
            notice(f"{text}: {left_out} of {all_files} files left out; they are of other kinds ({kinds})")
        yield from ((path / name, Path(name)) for name in files)
    elif path.exists() or not glob.has_magic(text):
        yield path, Path(path.name)  # a missing file is reported when its turn comes, after the others
    else:
        matches = [Path(m) for m in sorted(glob.glob(_pattern(text), recursive=True))]
        matches = [p for p in matches if p.suffix.lower() in READABLE and p.is_file()]
        if not matches:
            raise ValueError(f"{text}: no picture matches")
        yield from ((p, Path(p.name)) for p in matches)


def _pattern(text: str) -> str:
    """A glob pattern in which the folders that are there mean themselves: one may be called "photos [2024]"."""
    folder, rest = os.path.split(text)
    while folder and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
        rest = os.path.join(name, rest)
    return os.path.join(glob.escape(folder), rest)


def _walk(folder: Path, recursive: bool, notice: Callable[[str], None]) -> tuple[list[str], Counter[str]]:
    """The pictures in a folder, as sorted paths below it, and how many files there are of each other kind."""

    def unreadable(error: OSError) -> None:
        if error.filename == str(folder):
            raise error
        notice(f"warning: {error.filename}: {error.strerror}; this folder is left out")

    files: list[str] = []
    others: Counter[str] = Counter()
    for root, folders, names in os.walk(folder, onerror=unreadable):
        if not recursive:
            folders.clear()
        below = "" if root == str(folder) else os.path.relpath(root, folder)
        for name in names:
            if name.startswith("."):
                continue
            kind = os.path.splitext(name)[1].lower()
            if kind not in READABLE:
                others[kind] += 1
            elif os.path.isfile(path := os.path.join(root, name)):
                files.append(os.path.join(below, name))
            else:
                others["link to nothing" if os.path.islink(path) else "pipe or device"] += 1
    return sorted(files, key=lambda name: name.split(os.sep)), others


def _without_own_outputs(
    found: list[tuple[Path, Path]], inputs: Sequence[str], out: Path, suffix: str
) -> Iterator[tuple[Path, Path]]:
    """Leave out what an earlier run wrote: a folder below the input's, or a suffixed copy beside its original."""
    named = set(inputs)
    resolved = out.resolve()
    below = resolved not in {Path(text).resolve() for text in inputs}
    originals = {source.with_suffix("") for source, _ in found} if suffix else set()
    folders: dict[Path, bool] = {}  # folder of an input -> whether it is the output's, or lies below it
    for source, relative in found:
        if str(source) not in named:
            if below and source.parent not in folders:
                folders[source.parent] = source.parent.resolve().is_relative_to(resolved)
            if below and folders[source.parent]:
                continue
            if (
                suffix
                and source.stem.endswith(suffix)
                and source.with_name(source.stem.removesuffix(suffix)) in originals
            ):
                continue
        yield source, relative


def _without_clashes(jobs: list[Job], on_clash: str) -> list[Job]:
    """The jobs, each once, with no two of one output and none that would overwrite an input.

    Names are compared as the least distinguishing file systems do: without case, in one Unicode form.
    """
    sources = {identity for job in jobs if (identity := _identity(job.source))}
    parents: dict[Path, Path] = {}
    written: dict[tuple[Path, str], Path] = {}
    kept = []
    for job in dict.fromkeys(jobs):
        candidate, number = job.target, 1
        while True:
            parent = parents.setdefault(candidate.parent, candidate.parent.resolve())
            key = (parent, unicodedata.normalize("NFC", candidate.name).casefold())
            is_input = _identity(candidate) in sources
            if not is_input and key not in written:
                break
            if on_clash == "error":
                if is_input:
                    raise ValueError(
                        f"{job.target} is an input: it would be overwritten; choose another folder, --suffix _x4 "
                        "or --on-clash rename"
                    )
                raise ValueError(
                    f"{written[key]} and {job.source} would both be written to {job.target}; rename one, use folders, "
                    "or --on-clash rename"
                )
            number += 1
            candidate = numbered(job.target, number)
        written[key] = job.source
        kept.append(replace(job, target=candidate))
    return kept


def numbered(target: Path, number: int) -> Path:
    """The name that a clash gives: photo.png -> photo-2.png."""
    return target.with_name(f"{target.stem}-{number}{target.suffix}")


def _identity(path: Path) -> tuple[int, ...] | None:
    """Which file this is, whatever its name looks like here (other case, another Unicode form); None: no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    # Inode numbers alone do not tell files apart on every network file system.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
