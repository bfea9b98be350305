"""What was made from what: `.gdpo-upscale.jsonl` beside the outputs has a line for each.

A line names an output, the input that it was made from, and the recipe: every option on which its bytes depend. It is
written before the output is renamed into place, so that whatever a killed run leaves is known to be ours. Lines are
only ever appended, each in one write under a lock: several runs may share a folder. A torn line is skipped.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from engine.io.files import lock, sha256
from engine.io.notices import warn_once

NAME = ".gdpo-upscale.jsonl"
_VERSION = 1
_SECOND = 1_000_000_000

Recipe = Mapping[str, Any]


@dataclass(frozen=True)
class FileState:
    """Which bytes a file holds: its hash, and what tells without reading it that they are still the same."""

    size: int
    mtime_ns: int
    ctime_ns: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileState:
        """The state of a file; the times are taken first, so that a change in between is seen later.

        Raises:
            OSError: it cannot be read, or is no file but a pipe or a device, which might never end.
        """
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, sha256(path))


@dataclass(frozen=True)
class Record:
    """A line of the journal: `output` (a name in this folder) was made from `source` by `recipe`.

    `origin` is where the source was, relative to this folder where it can be.
    """

    output: str
    made: FileState
    origin: str
    source: FileState
    recipe: Recipe


@dataclass(frozen=True)
class Finding:
    """What is known about an output that is to be made.

    Attributes:
        kind: "absent"; "finished": made from this input with these options; "stale": made by this command from an
            earlier state of the input or with other options; "foreign": not known to be ours, or the result of another
            input.
        reason: in words, of "stale" and "foreign".
    """

    kind: Literal["absent", "finished", "stale", "foreign"]
    reason: str = ""


class Journal:
    """The journal of one folder. A folder that cannot be written has none; then one warning is printed."""

    def __init__(self, folder: Path):
        self._folder, self._path = folder, folder / NAME
        self._records: dict[str, list[Record]] = {}
        self._read = 0  # bytes

    def look(self, target: Path, source: Path, recipe: Recipe, *, origin: str = "") -> Finding:
        """Whether `target`, in this folder, is what would be made from `source` now.

        Args:
            target: the output.
            source: the input, as it can be opened.
            recipe: every option on which the output's bytes depend.
            origin: what the input is called here where it is no file of the user's, such as "standard input".

        Raises:
            OSError: the input cannot be read.
        """
        try:
            status = target.stat()
        except FileNotFoundError:
            return Finding("absent")
        self._refresh()
        record = self._maker(target, status)
        if record is None:
            known = target.name in self._records
            return Finding("foreign", "has changed since it was made" if known else "was not made by this command")
        now = source.stat()
        quick = (now.st_size, now.st_mtime_ns, now.st_ctime_ns)
        before = record.source
        if quick != (before.size, before.mtime_ns, before.ctime_ns):
            origin = origin or self._origin_of(source)
            if now.st_size != before.size or sha256(source) != before.sha256:
                if origin != record.origin:
                    return Finding("foreign", f"was made from another picture, {record.origin}")
                return Finding("stale", "the input has changed")
            record = Record(record.output, record.made, origin, FileState(*quick, before.sha256), record.recipe)
            self._append(record)  # so that the next look need not read the input
        if record.recipe == recipe:
            return Finding("finished")
        changed = [
            f"{name} {_text(record.recipe.get(name))} -> {_text(recipe.get(name))}"
            for name in sorted({*record.recipe, *recipe})
            if record.recipe.get(name) != recipe.get(name)
        ]
        # An option that came with a later version has no value in older records.
        return Finding("stale", f"other options: {', '.join(changed)}") if changed else Finding("finished")

    def record(
        self, staged: Path, target: Path, source: Path, state: FileState, recipe: Recipe, *, origin: str = ""
    ) -> None:
        """Write down that `staged`, about to be renamed to `target`, was made from `source` in this state.

        It is on the disk when this returns.
        """
        where = origin or self._origin_of(source)
        self._append(Record(target.name, FileState.of(staged), where, state, dict(recipe)))

    def _origin_of(self, source: Path) -> str:
        """Where an input is: relative to this folder, so that both can move together."""
        try:
            return os.path.relpath(os.path.realpath(source), os.path.realpath(self._folder))
        except ValueError:  # another drive
            return os.path.realpath(source)

    def _maker(self, target: Path, status: os.stat_result) -> Record | None:
        """The newest record of the bytes that the output holds."""
        same_size = [r for r in reversed(self._records.get(target.name, [])) if r.made.size == status.st_size]
        for record in same_size:
            # Some file systems keep whole seconds.
            if status.st_mtime_ns in (record.made.mtime_ns, record.made.mtime_ns // _SECOND * _SECOND):
                return record
        if same_size:
            digest = sha256(target)
            return next((r for r in same_size if r.made.sha256 == digest), None)
        return None

    def _refresh(self) -> None:
        """Read the lines that were appended since the last time, by this or another process."""
        try:
            with open(self._path, "rb") as f:
                if os.fstat(f.fileno()).st_size < self._read:  # replaced
                    self._records, self._read = {}, 0
                f.seek(self._read)
                data = f.read()
        except FileNotFoundError:
            return
        except OSError as error:
            self._warn(error)
            return
        whole = data.rfind(b"\n") + 1
        self._read += whole
        for line in data[:whole].splitlines():
            if record := _parse(line):
                self._records.setdefault(record.output, []).append(record)

    def _append(self, record: Record) -> None:
        line = json.dumps({"version": _VERSION, **asdict(record)}).encode() + b"\n"
        try:
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
            handle = os.open(self._path, flags, 0o666)
            try:
                lock(handle)
                size = os.fstat(handle).st_size
                if size and os.pread(handle, 1, size - 1) != b"\n":  # a killed run's torn line
                    line = b"\n" + line
                while line:  # a disk may take a part; a full one raises
                    line = line[os.write(handle, line) :]
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        reason = error.strerror or error
        warn_once(f"journal {self._path}", f"{self._path}: {reason}; the next run will not know what is finished here")


def _text(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 20 else f"{text[:12]}..."


def _parse(line: bytes) -> Record | None:
    """A record, or None for a torn or foreign line."""
    try:
        row = json.loads(line)
        if row["version"] != _VERSION:
            return None
        made, source = (FileState(**row[key]) for key in ("made", "source"))
        record = Record(row["output"], made, row["origin"], source, row["recipe"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    states = all(isinstance(n, int) for state in (made, source) for n in (state.size, state.mtime_ns, state.ctime_ns))
    whole = states and isinstance(record.output, str) and isinstance(record.origin, str)
    return record if whole and isinstance(record.recipe, dict) else None
