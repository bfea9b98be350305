"""Rows of a picture on their way from the thread that makes them to the one that encodes them.

So a picture is encoded while it is made, and is never in memory whole, unless its encoder needs that.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from engine.io.libraries import vips

_ROWS = 64  # sent at a time
_COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # samples of a pixel -> PNG's name for them


class Bands:
    """A pipe of rows: one thread puts them, another takes them, once, as a libvips image or as an array.

    What goes through is a PNG without compression, which libvips reads row by row, whatever the samples.

    Args:
        shape: (H, W, samples of a pixel: 1 to 4).
        dtype: uint8 or uint16.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: Any):
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.failure: BaseException | None = None  # of the encoder
        self._left = shape[0]  # rows that are still to come
        self._read, self._write = os.pipe()
        self._stored = zlib.compressobj(0)

    @property
    def nbytes(self) -> int:
        height, width, samples = self.shape
        return height * width * samples * self.dtype.itemsize

    def put(self, rows: np.ndarray) -> None:
        """The next rows, [n,W,samples]; waits while the encoder is busy.

        Raises:
            BaseException: what the encoder failed with.
        """
        assert rows.shape[1:] == self.shape[1:] and rows.dtype == self.dtype, (rows.shape, rows.dtype)
        if self._left == self.shape[0]:
            height, width, samples = self.shape
            bits = 8 * self.dtype.itemsize
            self._send(b"\x89PNG\r\n\x1a\n")
            self._chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, _COLOR_TYPES[samples], 0, 0, 0))
        self._left -= len(rows)
        assert self._left >= 0, "more rows than the picture has"
        for top in range(0, len(rows), _ROWS):
            big = rows[top : top + _ROWS].astype(self.dtype.newbyteorder(">"), order="C").view(np.uint8)
            lines = np.zeros((len(big), big[0].size + 1), np.uint8)  # each begins with its filter: none
            lines[:, 1:] = big.reshape(len(big), -1)
            self._chunk(b"IDAT", self._stored.compress(lines.data))
        if not self._left:
            self._chunk(b"IDAT", self._stored.flush())
            self._chunk(b"IEND", b"")

    def _chunk(self, kind: bytes, content: bytes) -> None:
        self._send(struct.pack(">I", len(content)) + kind)
        self._send(content)
        self._send(struct.pack(">I", zlib.crc32(content, zlib.crc32(kind))))

    def _send(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            if self.failure is not None:
                raise self.failure
            left = left[os.write(self._write, left[: 1 << 16]) :]

    def image(self) -> Any:
        """The picture for libvips; rows are read as they are asked for."""
        source = vips().Source.new_from_descriptor(self._read)
        image = vips().Image.pngload_source(source, access="sequential", unlimited=True, fail_on="error")
        return image.copy(xres=1, yres=1)

    def array(self) -> np.ndarray:
        """The whole picture, [H,W,samples]."""
        return self.image().numpy().reshape(self.shape)

    @contextmanager
    def encoding(self, encode: Callable[[], None]) -> Iterator[None]:
        """Run `encode`, which takes the rows, in a thread beside the block that puts them.

        Raises:
            BaseException: what it failed with.
        """

        def work() -> None:
            try:
                encode()
            except BaseException as error:
                self.failure = error
            while os.read(self._read, 1 << 16):  # nobody waits for an encoder that has ended
                pass

        thread = threading.Thread(target=work, name="encoder", daemon=True)
        thread.start()
        try:
            try:
                yield
            finally:
                os.close(self._write)
            thread.join()
        finally:
            thread.join()  # also after an interrupt: its file is closed next
            os.close(self._read)
        if self.failure is not None:
            raise self.failure
