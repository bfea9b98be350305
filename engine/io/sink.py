"""Where encoders write: a file that notices every failed or short write."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from engine.io.files import atomic_path

_HEAD = 1 << 16  # bytes collected before `edit` sees them
Edit = Callable[[bytes], bytes]


class Sink:
    """A file for encoders that swallow errors: every write is whole or raises, and `close` compares sizes.

    Args:
        file: unbuffered; readable, writable and seekable.
    """

    def __init__(self, file: BinaryIO):
        self._file, self._end = file, 0
        self.read, self.seek, self.tell = file.read, file.seek, file.tell
        self._error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Write all of it.

        Raises:
            OSError: the disk is full or failed.
        """
        view = memoryview(data).cast("B")
        start, size = self._file.tell(), len(view)
        left = view
        while len(left):
            written = self._file.write(left)
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left = left[written:]
        if start < self._end:  # the file's size does not show whether this was written
            self._file.seek(start)
            if read_back(self._file, size) != view:
                raise OSError(errno.EIO, "the disk holds something else than was written")
        self._end = max(self._end, self._file.tell())
        return size

    def flush(self) -> None:
        """Nothing is held back."""

    @contextmanager
    def target(self, edit: Edit | None = None, *, seekable: bool = False) -> Iterator[Any]:
        """A target for libvips.

        Args:
            edit: given the first bytes of the file (all that come before the pixels), returns what to write.
            seekable: the encoder may go back and read.

        Raises:
            OSError: a write failed; libvips itself would report it in its own words, if at all.
        """
        import pyvips

        head: bytearray | None = bytearray() if edit else None

        def flush() -> None:
            nonlocal head
            if head is not None and edit:
                first, head = bytes(head), None
                self.write(edit(first))

        def write(data: bytes) -> int:
            if self._error:
                return -1
            try:
                if head is None:
                    return self.write(data)
                head.extend(data)
                if len(head) >= _HEAD:
                    flush()
                return len(data)
            except OSError as error:  # an exception must not leave a callback of C
                self._error = error
                return -1

        target = pyvips.TargetCustom()
        target.on_write(write)
        if seekable:
            target.on_seek(self._file.seek)
            target.on_read(self._file.read)
        try:
            yield target
        except pyvips.Error as error:
            if self._error is None:
                raise OSError(errno.EIO, f"the encoder failed ({' '.join(str(error).split())[:200]})") from None
        if self._error:
            raise self._error
        flush()

    def close(self) -> None:
        """Flush to the disk and compare the file's size with what was written.

        Raises:
            OSError: the disk is full or failed.
        """
        self._file.flush()
        size = os.fstat(self._file.fileno()).st_size
        if size != self._end:
            raise OSError(errno.EIO, f"{size} bytes are on the disk where {self._end} were written")


def read_back(file: Any, size: int) -> bytes:
    """So many bytes that were written before, of an unbuffered file.

    Raises:
        OSError: the disk lost them.
    """
    found = bytearray()
    while len(found) < size and (part := file.read(size - len(found))):
        found += part
    if len(found) < size:
        raise OSError(errno.EIO, "the disk lost what was written")
    return bytes(found)


@contextmanager
def atomic_file(path: str | os.PathLike[str], *, sealed: Callable[[Path], None] | None = None) -> Iterator[Any]:
    """`atomic_path` for a writer that takes a file: every write is whole, else the file at `path` stays as it was.

    Yields a Sink; libraries declare other types of file, and take it.

    Raises:
        OSError: as Sink and atomic_path.
    """
    with atomic_path(path, sealed=sealed) as staged, open(staged, "r+b", buffering=0) as file:
        sink = Sink(file)
        yield sink
        sink.close()
