"""One process that makes pictures."""

from __future__ import annotations

import errno
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from engine.bulk.keys import check_key, output_key
from engine.bulk.ledger import COLUMNS, Row, schema
from engine.bulk.notes import Notes
from engine.bulk.storage import Storage
from engine.io.files import sha256
from engine.io.images import MAX_BYTES, read_image
from engine.io.journal import FileState
from engine.runtime.upscaler import Upscaler, model_folder
from engine.settings import Settings
from engine.worker import OF_ONE_PICTURE, model_identity

DEATHS = 3  # of processes that were making a picture, after which it is not tried again
_OF_A_NAME = {errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


@dataclass(frozen=True)
class Work:
    """What every process of a run is told.

    Attributes:
        source, out: URLs of the folders of pictures and results.
        settings: how pictures are made.
        extension: of all results; None keeps the input's.
        model: an engine folder, at the same path on each machine; None is the bundled model.
        identity: of the model; a machine that has another one stops the run.
        load: options of `Upscaler.load`.
    """

    source: str
    out: str
    settings: Settings
    extension: str | None = None
    model: str | None = None
    identity: str = ""
    load: dict[str, Any] = field(default_factory=dict)

    def open(self) -> Upscaler:
        """The model.

        Raises:
            RuntimeError, ValueError: it is not there, is another one, or cannot run here.
        """
        found = model_identity(model_folder(self.model))
        if found != self.identity:
            raise ValueError(f"{self.model or 'the bundled model'}: is another model here than where the run was begun")
        up = Upscaler.load(self.model, **self.load)
        up.check_tiling(self.settings.tile, self.settings.batch)
        return up

    def recipe(self) -> dict[str, Any]:
        """Every option on which the bytes of the results depend, and where the pictures are."""
        kept = ("seed", "scale", "longest", "tile", "color", "background", "quality", "lossless", "strip_metadata")
        loaded = {name: self.load.get(name) for name in ("backend", "precision")}
        chosen = {name: getattr(self.settings, name) for name in kept}
        return {"source": self.source, "model": self.identity, "format": self.extension} | loaded | chosen


class Stop(RuntimeError):
    """The run cannot go on: the fault is in no picture."""


class Enlarger:
    """Makes blocks of pictures. An actor of Ray Data's pool: its model is loaded once.

    Args:
        work: see there.
        board: the `Board`, as a Ray actor.
    """

    def __init__(self, work: Work, board: Any):
        self._work, self._board = work, board
        try:
            self._source, self._out = Storage(work.source), Storage(work.out)
            self._notes = Notes(self._out)
            self._up = work.open()
        except Exception as error:
            self._stop(error)

    def __call__(self, block: Any) -> Any:
        """A ledger's rows (a pyarrow table) for a table with a column `key`."""
        import pyarrow as pa
        import ray

        keys = block.column("key").to_pylist()
        known, died = ray.get(self._board.known.remote(keys))
        rows, notes = [], []
        for key in keys:
            row = known.get(key)
            if row is None:
                self._board.begin.remote(key)
                row = _gave_up(key) if died.get(key, 0) >= DEATHS else self.make(key)
                notes.append(self._board.end.remote(row))
            rows.append(row)
        ray.get(notes)  # noted before the block counts as done
        return pa.Table.from_pylist(rows, schema=schema())

    def make(self, key: str) -> Row:
        """Make one picture; returns its row. A fault of the picture is a row, any other stops the run.

        Raises:
            Stop: the source is away, the result cannot be stored, or no space is left for temporary files.
        """
        begin = time.perf_counter()
        row: Row = dict.fromkeys(COLUMNS)
        row["key"] = key
        with self._storing():
            folder = tempfile.TemporaryDirectory(prefix="gdpo-bulk-")
        with folder as scratch:
            source = self._source.path(key) if self._source.local else f"{scratch}/in{Path(key).suffix}"
            try:
                check_key(key)
                row["output"] = output_key(key, self._work.extension)
                return self._through_files(row, Path(source), Path(scratch), begin)
            except Stop:
                raise
            except OF_ONE_PICTURE as error:
                names = (f"{source}: ", f"{self._source.url}/{key}: ")  # the row has it
                reason = _reason(error)
                row |= {"status": "failed", "error": reason.removeprefix(names[0]).removeprefix(names[1])}
                return row | _since(begin)

    def _through_files(self, row: Row, source: Path, scratch: Path, begin: float) -> Row:
        """The row of a result that is stored. Local files are read and written in place."""
        key, output = row["key"], row["output"]
        if not self._source.local:
            content = self._read(key)
            with self._storing():
                source.write_bytes(content)
        elif not source.exists():
            self._read(key)  # says why
        digest = FileState.of(source).sha256
        with self._storing():
            there = self._out.exists(output)  # by a run that was killed before its row was written, or by others
            if there and self._out.local:
                proven = self._notes.find(key, sha256(Path(self._out.path(output))), digest)
                if proven is not None:
                    return proven
        picture = read_image(source, max_pixels=self._work.settings.max_pixels)

        def finished(file: Path) -> Row:
            return row | {"status": "done", "sha256": sha256(file), "size": file.stat().st_size} | _since(begin)

        with self._storing():
            if self._out.local and not there:
                target = Path(self._out.path(output))
                target.parent.mkdir(parents=True, exist_ok=True)
                made: list[Row] = []

                def note(staged: Path) -> None:
                    made.append(finished(staged))
                    self._notes.add(made[0], digest)

                self._work.settings.make(self._up, picture, target, sealed=note)
                return made[0]
            target = scratch / f"out{Path(output).suffix}"
            self._work.settings.make(self._up, picture, target)
            if not there:
                self._out.write(output, target.read_bytes())
            elif self._out.read(output) != target.read_bytes():
                raise ValueError(f"{output} is there already with other content; move it away, or give another output")
            return finished(target)

    def _read(self, key: str) -> bytes:
        """An object's bytes, where the source is there and it is not too large."""
        try:
            content = self._source.read(key)
        except OSError as error:
            absent = isinstance(error, FileNotFoundError | PermissionError) and not self._source.local
            if not absent and not self._source.answers():
                self._stop(error)
            raise
        if len(content) > MAX_BYTES:
            raise ValueError(f"{len(content) / 2**20:.0f} MiB; files of at most {MAX_BYTES >> 20} MiB are read")
        return content

    @contextmanager
    def _storing(self) -> Iterator[None]:
        """What fails inside with an OSError is the storage's fault, and would fail for the next picture too."""
        try:
            yield
        except OSError as error:
            if error.errno in _OF_A_NAME:
                raise
            self._stop(error)

    def _stop(self, error: BaseException) -> NoReturn:
        reason = _reason(error)
        if self._board is not None:
            import ray

            ray.get(self._board.stop.remote(reason))
        raise Stop(reason) from None


def _since(begin: float) -> Row:
    return {"seconds": round(time.perf_counter() - begin, 4)}


def _gave_up(key: str) -> Row:
    error = f"the process ended {DEATHS} times while this picture was made; it may need more memory than there is"
    return dict.fromkeys(COLUMNS) | {"key": key, "status": "failed", "error": error, "seconds": 0.0}


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
