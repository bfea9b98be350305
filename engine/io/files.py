"""Files that are either whole or absent: written beside, flushed to the disk, renamed into place."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on a clean exit it is fsynced and replaces `path`, else it is removed.

    The yielded name keeps the suffix, so that codecs which choose by suffix see the right one.

    Raises:
        OSError: the folder is missing or not writable; it names `path`, not the file beside it.
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.stem[:80]}-", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    os.close(handle)
    staged = Path(name)
    try:
        umask = os.umask(0)
        os.umask(umask)
        staged.chmod(0o666 & ~umask)  # mkstemp makes private files; the user's umask decides
        yield staged
        fsync(staged)
        os.replace(staged, path)
        fsync(path.parent)
    finally:
        staged.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a whole file or nothing."""
    with atomic_path(path) as staged:
        staged.write_bytes(content.encode() if isinstance(content, str) else content)


def sha256(path: str | os.PathLike[str]) -> str:
    """The hexadecimal SHA-256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
