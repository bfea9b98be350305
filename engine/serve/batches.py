"""Tiles of different pictures in one batch.

Each picture goes through the engine in a thread of its own and hands its tiles to one thread, which runs the graphs.
While a batch runs, the tiles for the next one gather, so nothing ever waits for a batch to fill. Tiles share a batch
when they have one shape: always with a plan of a fixed tile, otherwise when their pictures are cut alike.

LitServe and `batched` were looked at. LitServe batches whole requests, so small pictures would wait for a large one
beside them; `batched` polls, and mixes shapes.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from engine.runtime.backends import Session
from engine.runtime.upscaler import Upscaler

Inputs = Mapping[str, np.ndarray]
_AHEAD = 2  # batches that one picture has under way: it cuts the next tiles while these run


@dataclass(eq=False)  # each is itself: arrays have no truth to compare
class _Tiles:
    """Some tiles of one picture, on their way through one graph."""

    graph: str
    inputs: Inputs
    done: Future[np.ndarray] = field(default_factory=Future)

    @property
    def count(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def kind(self) -> tuple:
        """What tiles of one batch have in common."""
        return (self.graph, *((name, a.shape[1:]) for name, a in sorted(self.inputs.items())))


class Batcher:
    """One thread that runs the graphs of a folder on the tiles of any number of pictures, the oldest first.

    Args:
        sessions: the graphs by name.
        least, largest: tiles in a batch; fewer are filled up by repeating the last one.
        observe: told how many tiles each batch has.
    """

    def __init__(self, sessions: Mapping[str, Session], least: int, largest: int, observe: Callable[[int], object]):
        self._sessions, self._least, self._largest, self._observe = sessions, least, largest, observe
        self._ahead = min(session.at_once for session in sessions.values())
        self._inbox: queue.SimpleQueue[_Tiles | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def submit(self, graph: str, inputs: Inputs) -> Future[np.ndarray]:
        """Hand tiles [B,C,H,W] of one picture in; their results are the future's, and the caller's to keep."""
        tiles = _Tiles(graph, inputs)
        self._inbox.put(tiles)
        return tiles.done

    def close(self) -> None:
        """Finish what was handed in and end the thread."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        waiting: deque[_Tiles] = deque()
        running: deque[tuple[list[_Tiles], Callable[[], np.ndarray]]] = deque()
        closing = False
        while waiting or running or not closing:
            closing |= self._take(waiting, wait=not (waiting or running or closing))
            if waiting and len(running) < self._ahead:
                batch = self._next(waiting)
                running.append((batch, self._start(batch)))
            elif running:
                self._finish(*running.popleft())

    def _take(self, waiting: deque[_Tiles], wait: bool) -> bool:
        """Move what has come to `waiting`; whether the end has come."""
        while True:
            try:
                tiles = self._inbox.get(wait)
            except queue.Empty:
                return False
            if tiles is None:
                return True
            waiting.append(tiles)
            wait = False

    def _next(self, waiting: deque[_Tiles]) -> list[_Tiles]:
        """The oldest tiles, and as many others of their kind as the batch takes."""
        first = waiting.popleft()
        batch, room = [first], self._largest - first.count
        for tiles in list(waiting):
            if tiles.kind == first.kind and tiles.count <= room:
                batch.append(tiles)
                room -= tiles.count
                waiting.remove(tiles)
        return batch

    def _start(self, batch: list[_Tiles]) -> Callable[[], np.ndarray]:
        """Begin a batch. What goes wrong belongs to its pictures, not to this thread: it is raised at the end."""
        try:
            count = sum(tiles.count for tiles in batch)
            inputs = {}
            for name in batch[0].inputs:
                parts = [tiles.inputs[name] for tiles in batch]
                parts += [parts[-1][-1:]] * (self._least - count)
                inputs[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
            self._observe(count)
            return self._sessions[batch[0].graph].start(inputs)
        except Exception as error:
            return _raiser(error)

    def _finish(self, batch: list[_Tiles], finish: Callable[[], np.ndarray]) -> None:
        try:
            result, first, parts = finish(), 0, []
            for tiles in batch:
                parts.append(result[first : first + tiles.count].copy())  # the next batch overwrites it
                first += tiles.count
        except Exception as error:
            if len(batch) == 1:
                batch[0].done.set_exception(error)
            else:  # out of memory, as a rule: one after the other they may fit
                for tiles in batch:
                    self._finish([tiles], self._start([tiles]))
            return
        for tiles, part in zip(batch, parts):
            tiles.done.set_result(part)


def _raiser(error: Exception) -> Callable[[], np.ndarray]:
    def fail() -> np.ndarray:
        raise error

    return fail


class _Shared:
    """A graph as one picture sees it; see `Session`."""

    at_once = _AHEAD

    def __init__(self, batcher: Batcher, graph: str):
        self._batcher, self._graph = batcher, graph

    def __call__(self, inputs: Inputs) -> np.ndarray:
        return self.start(inputs)()

    def start(self, inputs: Inputs) -> Callable[[], np.ndarray]:
        return self._batcher.submit(self._graph, inputs).result


class SharedUpscaler(Upscaler):
    """An Upscaler whose pictures, one in each thread, share batches. The bytes are those of the one that it is made of.

    Args:
        up: loaded with core=False.
        largest: tiles in a batch; None takes the profile's largest.
        observe: told how many tiles each batch has.
    """

    def __init__(self, up: Upscaler, largest: int | None = None, observe: Callable[[int], object] = lambda tiles: None):
        least, usual, most = up.manifest.profile.batch
        largest = up.check_tiling(batch=largest)[1] if largest else most
        self.batcher = Batcher(up.sessions, least, largest, observe)
        profile = replace(up.manifest.profile, batch=(1, min(usual, largest), largest))  # the batcher fills up
        sessions: dict[str, Session] = {name: _Shared(self.batcher, name) for name in up.sessions}
        super().__init__(replace(up.manifest, profile=profile), sessions, up.backend, precision=up.precision)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        yield  # shared sessions keep no buffers
