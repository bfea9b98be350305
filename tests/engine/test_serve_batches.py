"""The thread that runs the tiles of many pictures: whatever comes, each gets its own answer."""

import threading
import time

import numpy as np
import pytest

from engine.runtime.backends import Waiting
from engine.serve.batches import Batcher


class Double(Waiting):
    """Doubles its input, once `go` is set; refuses batches with a value of 13, and of more than `most` tiles."""

    def __init__(self, most: int = 8):
        self.go, self.most, self.shapes, self._buffer = threading.Event(), most, [], np.empty(1 << 16, np.float32)

    def __call__(self, inputs):
        assert self.go.wait(30)
        x = inputs["x"]
        self.shapes.append(x.shape)
        if len(x) > self.most or 13 in x:
            raise MemoryError("too much")
        result = self._buffer[: x.size].reshape(x.shape)  # reused, as the sessions' are
        result[...] = 2 * x
        return result


def tiles(value: float, count: int = 1, side: int = 2) -> dict[str, np.ndarray]:
    return {"x": np.full((count, 1, side, side), value, np.float32)}


@pytest.fixture
def busy():
    """A batcher whose first batch runs, so that what is submitted waits; it ends with the test."""
    session = Double()
    batcher = Batcher({"g": session}, 1, 8, lambda count: None)
    first = batcher.submit("g", tiles(0))
    while batcher._inbox.qsize():  # its thread has taken the first
        time.sleep(0.01)
    yield batcher, session
    session.go.set()
    assert not first.result(30).any()
    batcher.close()


def test_tiles_of_other_shapes_between_two_of_one_shape(busy):
    batcher, session = busy
    given = [(1, 2), (2, 3), (3, 2), (4, 4), (5, 3), (6, 2)]
    waiting = [batcher.submit("g", tiles(value, side=side)) for value, side in given]
    session.go.set()
    for (value, side), answer in zip(given, waiting):
        assert np.array_equal(answer.result(30), tiles(2 * value, side=side)["x"])
    assert sorted(session.shapes[1:]) == [(1, 1, 4, 4), (2, 1, 3, 3), (3, 1, 2, 2)]


def test_what_fails_fails_its_picture_alone(busy):
    batcher, session = busy
    session.most = 3
    good, bad, large = (batcher.submit("g", tiles(*given)) for given in ((1,), (13,), (2, 3)))
    session.go.set()
    assert (good.result(30) == 2).all() and (large.result(30) == 4).all()
    with pytest.raises(MemoryError, match="too much"):
        bad.result(30)
    assert (batcher.submit("g", tiles(5)).result(30) == 10).all()


def test_memory_that_lacks_while_tiles_are_joined_ends_nothing(busy, monkeypatch):
    batcher, session = busy

    def full(parts):
        raise MemoryError("no room")

    monkeypatch.setattr(np, "concatenate", full)
    both = [batcher.submit("g", tiles(value)) for value in (1, 2)]
    session.go.set()
    assert [float(answer.result(30).max()) for answer in both] == [2, 4]
