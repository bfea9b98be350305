"""Accepted pictures: waiting, then worked on in threads, with limits of time and memory."""

from __future__ import annotations

import asyncio
import io
import math
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from engine.io.formats import BY_SUFFIX, LONGEST_HEAD, SUFFIXES, format_of
from engine.io.images import ImageError, picture_size, read_image
from engine.runtime.upscaler import Upscaler, output_size
from engine.serve.metrics import Metrics
from engine.settings import Settings


class Refused(Exception):
    """A request that gets another answer than its picture.

    Attributes:
        code: the HTTP status.
        retry: seconds after which it may be sent again.
    """

    def __init__(self, code: int, message: str, retry: int | None = None):
        super().__init__(message)
        self.code, self.retry = code, retry


@dataclass(frozen=True)
class Limits:
    """What one service takes on.

    Attributes:
        max_bytes: of a request's body.
        max_pixels: of an input; a result has at most 16 times as many. All inputs that are worked on at a time
            together have no more either, so that this bounds the memory.
        at_once: pictures worked on at a time, for each worker.
        queue: accepted requests that wait for their turn.
        seconds: from a request's acceptance to its result.
        body_seconds: for a request's body to arrive.
    """

    max_bytes: int = 64 << 20
    max_pixels: int = 16_000_000
    at_once: int = 8
    queue: int = 64
    seconds: float = 300
    body_seconds: float = 60


@dataclass
class Task:
    """One picture to make: `data` from a file that its sender calls `name`, as a file with the suffix `kind`.

    `kind` None keeps the input's format, or takes png where that is not written.
    """

    name: str
    data: bytes
    settings: Settings
    kind: str | None
    begun: float  # time.monotonic() of its acceptance
    cancelled: threading.Event = field(default_factory=threading.Event)

    def check(self, limit: float) -> None:
        """Stop here if its time is over, or nobody waits for it."""
        if self.cancelled.is_set():
            raise Refused(499, "the client is gone")
        if time.monotonic() > self.begun + limit:
            raise Refused(504, f"{self.name}: not finished within {limit:g} seconds; send a smaller picture, or later")


class Room:
    """Pixels that are worked on at a time."""

    def __init__(self, capacity: int):
        self._free, self._changed = capacity, threading.Condition()

    @contextmanager
    def of(self, pixels: int, task: Task, limit: float) -> Iterator[None]:
        with self._changed:
            while pixels > self._free:
                task.check(limit)
                self._changed.wait(0.5)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


class Works:
    """All workers of a service.

    Args:
        ups: one loaded model for each device; threads may share it.
        limits: see `Limits`.
        metrics: where figures go.
    """

    def __init__(self, ups: Sequence[Upscaler], limits: Limits, metrics: Metrics):
        self.limits, self._metrics = limits, metrics
        self._ups, self._load, self._lock = ups, [0] * len(ups), threading.Lock()
        self._places = limits.at_once * len(ups)
        self._threads = ThreadPoolExecutor(self._places, "picture")
        self._room = Room(limits.max_pixels * len(ups))
        self._mean = 1.0  # seconds that a picture took, the last ones weighing most
        self.accepted = 0

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def check_room(self) -> None:
        """Refuse what would wait too long (only the event loop calls this and `make`)."""
        if self.accepted >= self._places + self.limits.queue:
            wait = math.ceil(self._mean * self.limits.queue / self._places)
            raise Refused(429, f"{self.accepted} pictures are waiting or worked on; send it again later", max(wait, 1))

    async def make(self, task: Task) -> tuple[str, bytes]:
        """The format and the bytes of a result, once its turn has come.

        Raises:
            Refused: it cannot be made; the message says why.
        """
        self.check_room()
        self.accepted += 1
        self._metrics.waiting.inc()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._make, task)
        finally:
            self.accepted -= 1

    def _make(self, task: Task) -> tuple[str, bytes]:
        self._metrics.waiting.dec()
        task.check(self.limits.seconds)
        with self._metrics.running.track_inprogress():
            begin = time.monotonic()
            try:
                pixels = self._examine(task)
                with self._room.of(pixels, task, self.limits.seconds), self._least_loaded() as up:
                    made = self._upscale(task, up)
                self._metrics.pixels.inc(pixels)
                self._metrics.seconds.observe(time.monotonic() - task.begun)
                return made
            except ValueError as error:
                raise Refused(422, " ".join(str(error).split())) from error
            except MemoryError:
                raise Refused(503, f"{task.name}: not enough memory at the moment", 10) from None
            finally:
                self._mean += (time.monotonic() - begin - self._mean) / 8

    def _examine(self, task: Task) -> int:
        """The pixels of a picture, from its first bytes and its header."""
        try:
            format_of(task.data[:LONGEST_HEAD])
        except ImageError as error:
            raise Refused(415, f"{task.name}: {error}") from None
        size = picture_size(io.BytesIO(task.data))
        most = self.limits.max_pixels
        if size is None:
            return 1  # damaged: reading it says how
        height, width = size
        if height * width > most:
            raise Refused(413, f"{task.name}: {width}x{height} pixels; at most {most / 1e6:g} megapixels are taken")
        factor = task.settings.factor(height, width)
        result = output_size(height, width, factor, max_pixels=1 << 62)  # judged here
        if result[0] * result[1] > 16 * most:
            raise Refused(413, f"{task.name}: the result would have {result[1]}x{result[0]} pixels; "
                               f"at most {16 * most / 1e6:g} megapixels are made")  # fmt: skip
        return height * width

    def _upscale(self, task: Task, up: Upscaler) -> tuple[str, bytes]:
        up.check_tiling(task.settings.tile, task.settings.batch)
        picture = read_image(task.name, data=task.data, max_pixels=self.limits.max_pixels, notice=lambda line: None)
        kind = task.kind or next(suffix for suffix, row in BY_SUFFIX.items() if row.name == picture.format)[1:]
        kind = kind if f".{kind}" in SUFFIXES else "png"
        with tempfile.TemporaryDirectory(prefix="gdpo-serve-") as folder:
            target = Path(folder) / f"result.{kind}"
            try:
                task.settings.make(
                    up,
                    picture,
                    target,
                    lambda done, total: task.check(self.limits.seconds),
                    notice=lambda line: None,
                )
            except ImageError as error:
                raise ImageError(str(error).replace(str(target), task.name)) from None
            return kind, target.read_bytes()

    @contextmanager
    def _least_loaded(self) -> Iterator[Upscaler]:
        with self._lock:
            index = self._load.index(min(self._load))
            self._load[index] += 1
        try:
            yield self._ups[index]
        finally:
            with self._lock:
                self._load[index] -= 1
