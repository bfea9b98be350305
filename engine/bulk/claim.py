"""One output, one run: storage has no locks in common, so a claim is an object that its run keeps rewriting."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engine.bulk.storage import Storage
from engine.io.cli import Failed
from engine.io.notices import say

BEAT = 5.0  # seconds between two signs of life of a run


@contextmanager
def claimed(out: Storage, key: str) -> Iterator[Claim]:
    """The output for this run alone. A run that gives no sign of life for three beats is replaced.

    Raises:
        ValueError: another run lives.
        OSError: the output cannot be written.
    """
    claim = Claim(out, key)
    claim.take()
    try:
        yield claim
    finally:
        claim.drop()


class Claim:
    """See `claimed`."""

    def __init__(self, out: Storage, key: str):
        self._out, self._key = out, key
        self._run, self._beats = secrets.token_hex(8), 0
        self._stop, self._lost = threading.Event(), False
        self._thread = threading.Thread(target=self._live, daemon=True)

    def take(self) -> None:
        before = self._read()
        if before is not None:
            say(f"{self._out.url}: a run on {before.get('host')} did not end there; waiting {3 * BEAT:g} s for a sign "
                "of its life")  # fmt: skip
            until = time.monotonic() + 3 * BEAT
            while time.monotonic() < until:
                time.sleep(BEAT / 5)
                now = self._read()
                if now is None:
                    break
                if now != before:
                    raise ValueError(
                        f"{self._out.url}: another run (on {now.get('host')}) writes there; wait for its end, or give "
                        "another output"
                    )
        self._write()
        time.sleep(BEAT / 10)  # of two that take it at the same time the last one wins
        self.check()
        self._thread.start()

    def check(self) -> None:
        """Raise Failed where another run has the output now."""
        now = self._read()
        if self._lost or now is None or now.get("run") != self._run:
            raise Failed(f"{self._out.url}: another run took this output over; this one stops")

    def drop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(BEAT)
        with contextlib.suppress(OSError):  # the storage is gone: the next run waits for three beats
            found = self._read()
            if found is not None and found.get("run") == self._run:
                self._out.remove(self._key)

    def _live(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                self.check()
                self._write()
            except Failed:
                self._lost = True
                return
            except OSError:
                continue  # the storage is away for a while; so it is for those who would take the output over

    def _write(self) -> None:
        self._beats += 1
        content = {"run": self._run, "host": socket.gethostname(), "beat": self._beats}
        self._out.write(self._key, json.dumps(content).encode())

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._out.read(self._key))
        except (FileNotFoundError, ValueError):
            return None
