"""Runs jobs one after the other: what is finished is skipped, what fails is named, and the others go on."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.compare_page import ComparePage, compare_page
from engine.io.images import picture_size, read_image
from engine.io.journal import FileState, Finding, Journal
from engine.io.memory import give_back
from engine.io.notices import say
from engine.io.progress import Progress, print_event
from engine.jobs import Job, numbered
from engine.runtime.upscaler import Upscaler
from engine.settings import Settings, lossless_of

OF_ONE_PICTURE = (ValueError, OSError, RuntimeError, FloatingPointError, MemoryError)  # the others go on
_MEMORY = ("bad_alloc", "failed to allocate", "out of memory", "unable to allocate", "cannot allocate")


class Worker:
    """Makes pictures with one loaded model.

    Args:
        up: the model.
        settings: how pictures are made.
        model: which one it is, as `model_identity` says.
        overwrite: make what is finished again, and replace files that are not ours.
        rename: write beside files that are not ours.
        events: print one JSON object for each event and picture to stdout.
        quiet: no progress, and no report where all went well.
        page: where to write a page with before and after.
    """

    def __init__(
        self,
        up: Upscaler,
        settings: Settings,
        model: str,
        *,
        overwrite: bool = False,
        rename: bool = False,
        events: bool = False,
        quiet: bool = False,
        page: str | None = None,
    ):
        self.up, self.settings, self.overwrite, self.rename = up, settings, overwrite, rename
        self.events, self.quiet, self.page = events, quiet, page
        self.failed: list[str] = []
        self.again: list[str] = []
        self.written = self.skipped = 0
        self._recipe = settings.recipe(up, model)
        self._journal = functools.cache(Journal)

    def run(self, jobs: list[Job]) -> int:
        """Do all jobs and report to stderr.

        Returns:
            The exit code: 1 if some failed.
        """
        jobs = [self._renamed(job, {job.target for job in jobs}) for job in jobs] if self.rename else jobs
        finished = [self._is_finished(job) for job in jobs]
        sizes = [0 if done else _pixels(job.source) for job, done in zip(jobs, finished)]
        event = print_event if self.events and not self.quiet else None
        progress = Progress(len(jobs), sum(sizes), quiet=self.quiet, event=event)
        with compare_page(self.page) if self.page else contextlib.nullcontext() as slider, progress:
            for job, done, pixels in zip(jobs, finished, sizes):
                begin = time.perf_counter()
                row: dict[str, Any] = {"event": "picture", "input": job.name, "output": str(job.target)}
                progress.begin(pixels, input=job.name, output=str(job.target))
                try:
                    finding = Finding("finished") if done else self._look(job)
                    row |= self._one(job, finding, slider, progress)
                except OF_ONE_PICTURE as error:
                    reason = self._reason(job, error)
                    self.failed.append(reason)
                    row |= {"status": "failed", "error": reason}
                progress.end()
                give_back()
                if self.events:
                    print_event(row | {"seconds": round(time.perf_counter() - begin, 3)})
        self._report()
        return 1 if self.failed else 0

    def _one(self, job: Job, finding: Finding, slider: ComparePage | None, progress: Progress) -> dict[str, Any]:
        s = self.settings
        if finding.kind == "finished":
            if slider is not None:  # the page shows every picture, whenever it was finished
                before = read_image(job.source, max_pixels=s.max_pixels)
                after = read_image(job.target, max_pixels=s.limit)
                slider.add(Path(job.name).name, before.pixels, after.pixels, before.icc)
            self.skipped += 1
            return {"status": "skipped"}
        if finding.kind == "foreign":
            replaced = "" if job.target.is_dir() else "--overwrite replaces it, "
            raise ValueError(
                f"{job.target}: is there already and {finding.reason}; {replaced}--on-clash rename writes beside it"
            )
        journal = self._journal(job.target.parent)
        source = FileState.of(job.source)  # before it is read: a change in between must be seen by the next run
        picture = read_image(job.source, max_pixels=s.max_pixels)
        whole: list[np.ndarray] = []  # the result, where the page shows it

        def keep(shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray:
            whole.append(np.empty(shape, dtype))
            return whole[0]

        height, width = s.make(
            self.up,
            picture,
            job.target,
            progress.tile,
            keep=None if slider is None else keep,
            sealed=lambda staged: journal.record(
                staged, job.target, job.source, source, self._recipe_of(job), origin=job.label
            ),
        )
        self.written += 1
        if slider is not None:
            slider.add(Path(job.name).name, picture.pixels, whole[0], picture.icc)
        row = {"status": "written", "width": width, "height": height, "path": self.up.path}
        if finding.kind == "stale":
            self.again.append(f"{job.target}: made again: {finding.reason}")
            row["again"] = finding.reason
        return row

    def _look(self, job: Job) -> Finding:
        """What is known about the output; with --overwrite it does not matter, but for a folder."""
        if job.target.is_dir():
            return Finding("foreign", "is a folder")
        if self.overwrite or not job.target.exists():
            return Finding("absent")
        journal = self._journal(job.target.parent)
        return journal.look(job.target, job.source, self._recipe_of(job), origin=job.label)

    def _renamed(self, job: Job, taken: set[Path]) -> Job:
        """The job with a target that is free, or holds an earlier result of this input."""
        number, candidate = 1, job
        with contextlib.suppress(OSError):  # of the input: it fails in its turn
            while self._look(candidate).kind == "foreign" or (number > 1 and candidate.target in taken):
                number += 1
                candidate = replace(job, target=numbered(job.target, number))
        return candidate

    def _is_finished(self, job: Job) -> bool:
        with contextlib.suppress(OSError):  # of the input: it fails in its turn
            return self._look(job).kind == "finished"
        return False

    def _recipe_of(self, job: Job) -> Mapping[str, Any]:
        """Without the options that the output's format does not have."""
        choice = lossless_of(job.target)
        lossless = self.settings.lossless and choice == "option"
        without: dict[str, Any] = {} if choice == "option" else {"lossless": None}
        return {**self._recipe, **without, **({"quality": None} if lossless or choice == "always" else {})}

    def _reason(self, job: Job, error: Exception) -> str:
        """One line that names the picture and, where memory lacked, what helps."""
        reason = " ".join(str(error).split()) or type(error).__name__
        if job.label:
            reason = reason.replace(str(job.source), job.label)
        if isinstance(error, OSError) and error.strerror:
            reason = f"{error.filename or job.target}: {error.strerror}"
        if isinstance(error, MemoryError) or any(word in reason.lower() for word in _MEMORY):
            reason = f"{job.name}: not enough memory{self._smaller_tile()}"
        if "megapixels; at most" in reason:
            reason += "; --max-pixels raises the limit"
        return reason if job.name in reason else f"{job.name}: {reason}"

    def _smaller_tile(self) -> str:
        geometry, profile = self.up.manifest.geometry, self.up.manifest.profile
        longest, batch = self.up.check_tiling(self.settings.tile, self.settings.batch)
        half = max(longest // 2 // geometry.multiple * geometry.multiple, profile.tile[0])
        if half < longest:
            return f"; try --tile {half // geometry.scale}"
        if batch > profile.batch[0]:
            return f"; try --batch {profile.batch[0]}"
        return "; the tiles are the smallest that the model takes: the picture itself is too large for this machine"

    def _report(self) -> None:
        if not self.quiet or self.failed or self.skipped or self.again:
            counts = [f"{self.written} written"]
            counts += [f"{self.skipped} skipped (finished before; --overwrite does them again)"] if self.skipped else []
            counts += [f"{len(self.failed)} failed:"] if self.failed else []
            say(f"{self.up.backend} ({self.up.path}, {self.up.precision}): {', '.join(counts)}")
        for line in self.again[:_SHOWN]:
            say(line)
        if len(self.again) > _SHOWN:
            say(f"... and {len(self.again) - _SHOWN} more made again")
        for line in self.failed:
            say(f"error: {line}")


_SHOWN = 10  # of the pictures that were made again


def _pixels(source: Path) -> int:
    """Pixels of a picture from its header; 1 where that cannot be read: it fails in its turn."""
    size = picture_size(source)
    return size[0] * size[1] if size else 1


def model_identity(folder: Path) -> str:
    """Which model a folder holds: the hash of an engine folder's manifest, or of the names and times of other files."""
    signed = folder / "manifest.sha256"
    if signed.is_file():
        return signed.read_text().split()[0]
    digest = hashlib.sha256()
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(root) / name
            status = path.stat()
            digest.update(f"{path.relative_to(folder)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
