"""Objects in any storage that fsspec knows, under keys: paths below one folder, with `/` between their parts."""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

# Storage where an object appears whole when its upload ends. Elsewhere it is uploaded under another name and renamed.
_WHOLE_PUT = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "memory"}
_TRIES, _PAUSE = 3, 0.5  # of an operation that the storage failed, and seconds before the second
_NUMBERS = {  # of failures that are not tried again; clients of object stores leave them out
    FileNotFoundError: errno.ENOENT,
    PermissionError: errno.EACCES,
    IsADirectoryError: errno.EISDIR,
    NotADirectoryError: errno.ENOTDIR,
}
Result = TypeVar("Result")


class Storage:
    """A folder in some storage.

    Args:
        url: a local path, or a URL that fsspec opens: s3://bucket/prefix, gs://..., file:///...

    Raises:
        ValueError: no such protocol, or its package is not installed.
    """

    def __init__(self, url: str):
        import fsspec

        self.url = url.rstrip("/") or "/"
        try:
            with named(url):
                self.fs, root = fsspec.core.url_to_fs(url)
        except OSError as error:
            if error.errno == errno.EIO:
                raise ValueError(f"{url}: {error.strerror}") from None
            raise
        self.root = root.rstrip("/") or root
        protocol = self.fs.protocol
        self._protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self.local = "file" in self._protocols
        if self.local:
            self.url = self.root  # one place, one name: /a, /a/ and file:///a

    @property
    def shared(self) -> bool:
        """Whether other processes see it."""
        return "memory" not in self._protocols

    def path(self, key: str) -> str:
        """Where a key is, as its file system writes it."""
        return f"{self.root.rstrip('/')}/{key}"

    def holds(self, path: str, other: Storage) -> bool:
        """Whether a path of another storage is this folder, or below it."""
        same = self._protocols == other._protocols
        return same and (path == self.root or path.startswith(f"{self.root.rstrip('/')}/"))

    def answers(self) -> bool:
        """Whether the folder can be reached at all."""
        try:
            return bool(self.fs.exists(self.root))
        except Exception:
            return False

    def make_folder(self, key: str) -> None:
        """Make the folder above a key, where the storage has folders."""
        self._do(key, lambda: self.fs.makedirs(posixpath.dirname(self.path(key)), exist_ok=True))

    def read(self, key: str) -> bytes:
        """An object's bytes.

        Raises:
            OSError: it is not there, or the storage failed; names the object.
        """
        return self._do(key, lambda: self.fs.cat_file(self.path(key)))

    def write(self, key: str, content: bytes) -> None:
        """Write an object, whole or not at all.

        Raises:
            OSError: the storage failed; names the object.
        """
        if self._protocols & _WHOLE_PUT:
            self._do(key, lambda: self.fs.pipe_file(self.path(key), content))
            return
        self.make_folder(key)
        staged = f"{posixpath.dirname(self.path(key))}/.gdpo-sr-{secrets.token_hex(4)}.partial"
        try:
            self._do(key, lambda: self.fs.pipe_file(staged, content))
            self._do(key, lambda: self.fs.mv(staged, self.path(key)))
        except OSError:
            with contextlib.suppress(Exception):
                self.fs.rm_file(staged)
            raise

    def names(self, folder: str) -> list[str]:
        """Sorted keys of what is directly in a folder; none where there is no such folder."""

        def listed() -> list[str]:
            self.fs.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                found = self.fs.ls(self.path(folder), detail=False)
                return sorted(f"{folder}/{posixpath.basename(path.rstrip('/'))}" for path in found)
            return []

        return self._do(folder, listed)

    def remove(self, key: str) -> None:
        """Remove a file or a folder; one that is not there is fine."""
        with contextlib.suppress(FileNotFoundError):
            self._do(key, lambda: self.fs.rm(self.path(key), recursive=True))

    def exists(self, key: str) -> bool:
        """Whether there is such an object. fsspec's own `exists` takes a failure for a no."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self._do(key, lambda: self.fs.info(self.path(key)))
            return True
        return False

    def _do(self, key: str, call: Callable[[], Result]) -> Result:
        """Call it, again where the storage failed for a while; every failure is an OSError that names the key."""
        for attempt in range(_TRIES):
            with named(self.url, key):
                try:
                    return call()
                except tuple(_NUMBERS):
                    raise
                except Exception:
                    if self.local or attempt + 1 == _TRIES:
                        raise
            time.sleep(_PAUSE * 4**attempt)
        raise AssertionError


@contextmanager
def named(url: str, key: str = "") -> Iterator[None]:
    """Failures of a storage, whatever its library raises, as an OSError that names the object."""
    where = f"{url.rstrip('/')}/{key}" if key else ""
    try:
        yield
    except OSError as error:
        kind = next((kind for kind in _NUMBERS if isinstance(error, kind)), OSError)
        number = error.errno or _NUMBERS.get(kind, errno.EIO)
        text = error.strerror or (os.strerror(number) if kind is FileNotFoundError else _line(error))
        raise kind(number, text, where or error.filename or url) from None
    except Exception as error:  # clients of object stores have exceptions of their own
        raise OSError(errno.EIO, _line(error), where or url) from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
