"""Progress of a long list of pictures: a bar on a terminal, a line now and then elsewhere, events for a front end.

Work is counted in pixels of the inputs, tile by tile, so that one picture and a folder of unlike pictures both have an
estimate of the time left.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from engine.io.notices import say, warn_once

LINE_SECONDS = 30.0  # between two lines where stderr is no terminal
_EVENT_SECONDS = 0.1  # between two events of one picture, at least
_BAR = "{percentage:3.0f}%|{bar}| {desc} [{elapsed}<{remaining}]"


def print_event(event: dict[str, Any]) -> None:
    """Print one JSON object to stdout. When its reader has left, the work goes on: results matter more than reports."""
    try:
        print(json.dumps(event), flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            warn_once("stdout", f"standard output: {error.strerror}; no more events are printed")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Progress:
    """How far the work is. Use as a context manager: `begin` a picture, call `tile` for its tiles, then `end` it.

    Args:
        pictures: how many there are.
        work: pixels of all pictures that are to be made.
        quiet: neither a bar nor lines.
        event: called with each progress event (see docs/engine.md); None: no events.
        line_seconds: between two lines where stderr is no terminal.
    """

    def __init__(
        self,
        pictures: int,
        work: int,
        *,
        quiet: bool = False,
        event: Callable[[dict[str, Any]], None] | None = None,
        line_seconds: float = LINE_SECONDS,
    ):
        from tqdm import tqdm

        self._pictures, self._work, self._event = pictures, max(work, 1), event
        self._line_seconds = line_seconds
        self._picture = self._finished = 0  # pictures begun; pixels of those that are ended
        self._pixels, self._tile, self._tiles = 0, 0, 0  # of the current picture
        self._names: dict[str, str] = {}
        self._begin = self._last_event = time.monotonic()
        on_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._bar = tqdm(
            total=self._work,
            bar_format=_BAR,
            miniters=0,
            disable=quiet or not on_terminal,
            file=sys.stderr,
            ncols=_columns() if on_terminal else None,
            nrows=20,  # a terminal of no size would get no bar
        )
        self._stop = threading.Event()
        self._lines = None if quiet or on_terminal else threading.Thread(target=self._print_lines, daemon=True)

    def __enter__(self) -> Progress:
        if self._lines is not None:
            with contextlib.suppress(RuntimeError):  # no thread to be had: then no lines
                self._lines.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._bar.close()

    def begin(self, pixels: int, **names: str) -> None:
        """A picture is begun; `names` (input=, output=) go into its events."""
        self._picture += 1
        self._pixels, self._tile, self._tiles, self._names = pixels, 0, 0, names
        self._show()

    def tile(self, done: int, total: int) -> None:
        """`done` of the current picture's `total` tiles are finished."""
        self._tile, self._tiles = done, total
        self._show()
        now = time.monotonic()
        if self._event and (done in (1, total) or now - self._last_event >= _EVENT_SECONDS):
            self._last_event = now
            left = self.seconds_left()
            self._event(
                {"event": "progress", **self._names, "status": "working"}
                | {"picture": self._picture, "pictures": self._pictures, "tile": done, "tiles": total}
                | {"fraction": round(self.fraction(), 4), "elapsed": round(now - self._begin, 3)}
                | {"eta": None if left is None else round(left, 1)}
            )

    def end(self) -> None:
        """The current picture is ended, made or not."""
        self._finished += self._pixels
        self._pixels = 0
        self._show()

    def fraction(self) -> float:
        """The share of the work that is done."""
        current = self._pixels * self._tile / self._tiles if self._tiles else 0
        return min((self._finished + current) / self._work, 1.0)

    def seconds_left(self) -> float | None:
        """An estimate, from the time that the work so far took; None before any."""
        done = self.fraction()
        return (time.monotonic() - self._begin) * (1 - done) / done if done else None

    def _show(self) -> None:
        if not self._bar.disable:
            self._bar.set_description_str(self._place(), refresh=False)
            self._bar.update(int(self.fraction() * self._work) - self._bar.n)

    def _place(self) -> str:
        place = f"tile {self._tile}/{self._tiles}" if self._tiles else "reading"
        return place if self._pictures == 1 else f"picture {self._picture}/{self._pictures}, {place}"

    def _print_lines(self) -> None:
        while not self._stop.wait(self._line_seconds):
            left = self.seconds_left()
            estimate = "" if left is None else f", about {_clock(left)} left"
            say(f"{self.fraction():4.0%} {self._names.get('input', '')}: {self._place()}{estimate}")


def _columns() -> int:
    """Columns of the terminal; one that does not tell (a recorder, a container) has 80."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80


def _clock(seconds: float) -> str:
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}"
