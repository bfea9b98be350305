"""Files that are either whole or absent: written beside, flushed to the disk, renamed into place.

A staged file is locked while it is written. What a killed process left is therefore recognised by its name and by
being unlocked, and the next process that writes to the folder removes it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.io.notices import warn_once

try:
    import fcntl
except ImportError:  # not a POSIX system: files are not locked, and leftovers go after a day
    fcntl = None  # type: ignore[assignment]

_STAGED = re.compile(r"\.gdpo-sr-[0-9a-f]{8}\.partial(\.\w{1,9})?")
_STARTED = time.time()
_DAY = 86_400
# What file systems answer that do not have an operation; EIO, ENOSPC and EDQUOT are failures and stay so.
_REFUSALS = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EBADF}


@contextmanager
def naming(path: str | os.PathLike[str], staged: Path | None = None) -> Iterator[None]:
    """Inside, an OSError that names no file names `path`, and one that names `staged`, or what is in it, as well.

    The system says which file could not be opened, but not which one could not be read or written.
    """
    try:
        yield
    except OSError as error:
        if re.fullmatch(r"\d+ requested and \d+ written", str(error)):  # numpy's
            error = OSError(errno.ENOSPC, f"not all was written ({error})")
        name = error.filename
        if name is None:
            name = path
        elif staged and isinstance(name, str) and (name == str(staged) or name.startswith(f"{staged}{os.sep}")):
            name = f"{path}{name[len(str(staged)) :]}"
        if error.errno is None or name == error.filename:
            raise
        raise OSError(error.errno, error.strerror, str(name)) from None


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, sealed: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on a clean exit it is fsynced and replaces `path`, else it is removed.

    The yielded name is short and keeps the suffix, so that it fits where `path` fits and codecs which choose by suffix
    see the right one. Write to that file; do not replace it by another.

    Args:
        path: the file to write.
        sealed: called with the staged file once it is on the disk, before it is renamed.

    Raises:
        OSError: the folder is missing or not writable; it names `path`, not the file beside it.
    """
    path = Path(path)
    clean_leftovers(path.parent)
    try:
        handle, staged = _stage(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        with naming(path, staged):
            yield staged
            fsync(staged)
            if sealed:
                sealed(staged)
            os.replace(staged, path)
            fsync(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            staged.unlink()
        os.close(handle)  # last: whoever looks for leftovers finds the file locked or gone


def _stage(path: Path) -> tuple[int, Path]:
    """A new empty file beside `path`, with the permissions of the user's umask, and a handle that locks it."""
    suffix = path.suffix if re.fullmatch(r"\.\w{1,9}", path.suffix, re.ASCII) else ""
    while True:
        staged = path.parent / f".gdpo-sr-{secrets.token_hex(4)}.partial{suffix}"
        try:
            handle = os.open(staged, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
            lock(handle)
            if os.fstat(handle).st_nlink:  # else another process took the file for a leftover before it was locked
                return handle, staged
        except FileExistsError:
            continue
        except OSError:
            raise
        except BaseException:  # a signal that arrives here: nobody else knows of the file yet
            with contextlib.suppress(FileNotFoundError):
                staged.unlink()
            raise
        os.close(handle)


def lock(handle: int, *, wait: bool = True) -> bool | None:
    """Lock an open file for this process alone, until it is closed.

    Returns:
        Whether it is locked now (False: another process holds it), or None where the file system has no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


@functools.cache
def clean_leftovers(folder: Path) -> None:
    """Remove staged files of killed processes from a folder: older than this process, and held by nobody.

    Once a folder and process; a folder that cannot be listed is left as it is.
    """
    remove_leftovers(folder, _STARTED)


def remove_leftovers(folder: Path, before: float) -> None:
    """Remove staged files that were last written before a time, and are held by nobody."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _STAGED.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    _remove_unused(entry, before)


def _remove_unused(entry: os.DirEntry[str], before: float) -> None:
    status = entry.stat(follow_symlinks=False)
    if not stat.S_ISREG(status.st_mode) or status.st_mtime >= before:
        return
    handle = os.open(entry.path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    try:
        locked = lock(handle, wait=False)
        if locked or (locked is None and status.st_mtime < before - _DAY):
            os.unlink(entry.path)
    finally:
        os.close(handle)


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk; where the file system does not offer that, warn once and go on.

    Raises:
        OSError: the disk is full or failed.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        folder = path if path.is_dir() else path.parent
        warn_once("fsync", f"{folder}: this file system does not flush on request ({error.strerror}); files are "
                  "written all the same, but a power failure may lose the last ones")  # fmt: skip


def atomic_write(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a whole file or nothing."""
    data = content.encode() if isinstance(content, str) else content
    with atomic_path(path) as staged:
        staged.write_bytes(data)
        if (size := staged.stat().st_size) != len(data):
            raise OSError(errno.EIO, f"{size} bytes are on the disk where {len(data)} were written", str(path))


def sha256(path: str | os.PathLike[str]) -> str:
    """The hexadecimal SHA-256 of a file."""
    with naming(path), open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
