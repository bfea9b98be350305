"""Which pictures there are: keys of a folder, a glob pattern, or a file of keys, and the key of each result."""

from __future__ import annotations

import csv
import errno
import io
import json
import posixpath
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from engine.bulk.storage import Storage, named
from engine.io.formats import READABLE, SUFFIXES

_LISTS = (".parquet", ".csv")
Keys = Callable[[Storage], Iterator[str]]  # given the output, whose pictures are left out


def output_key(key: str, extension: str | None) -> str:
    """The key of a result. No two keys share one, and where the format stays the name stays.

    A picture of another format keeps its name before the new suffix: a.heic -> a.heic.png. So that this never meets
    a picture that is called so already, a.heic.png -> a.heic.png.png.

    Args:
        key: with the suffix of a picture.
        extension: of all results, such as ".png"; None keeps the input's, or takes .png where that is not written.
    """
    stem, suffix = posixpath.splitext(key)
    wanted = extension or (suffix.lower() if suffix.lower() in SUFFIXES else ".png")
    stays = suffix.lower() == wanted and posixpath.splitext(stem)[1].lower() not in READABLE
    return key if stays else key + wanted


def check_key(key: str) -> None:
    """Refuse a key that is no picture's, or that leads elsewhere.

    Raises:
        ValueError: the message says what is wrong with it.
    """
    if not key or key.startswith("/") or any(part in ("", ".", "..") for part in key.split("/")):
        raise ValueError(f"key {key!r} must be a path below the folder of the pictures, without . and ..")
    if posixpath.splitext(key)[1].lower() not in READABLE:
        raise ValueError(f"key {key!r} has no suffix of a picture ({' '.join(sorted(READABLE))})")


def source_of(text: str, root: str | None = None) -> tuple[Storage, Keys]:
    """Where the pictures are, and what lists their keys.

    Args:
        text: a folder, a glob pattern, or a .parquet or .csv file with a column `key`.
        root: the folder that keys of a file are relative to; None takes the file's own.

    Raises:
        ValueError: root without a file of keys, or an unknown protocol.
    """
    if posixpath.splitext(text)[1].lower() in _LISTS:
        place = Storage(root or posixpath.dirname(text) or ".")
        return place, lambda out: _listed(text, place)
    if root is not None:
        raise ValueError(f"--root goes with a .parquet or .csv file of keys; got {text}")
    place, wild = Storage(text), [text.index(c) for c in "*?[" if c in text]
    if wild and not (place.local and place.fs.isdir(place.root)):  # a folder may be called "photos [2024]"
        place = Storage(posixpath.dirname(text[: min(wild)]) or ".")
        return place, lambda out: _matching(text, place, out)
    return place, lambda out: _below(place, out)


def _below(place: Storage, out: Storage) -> Iterator[str]:
    """Keys of the pictures in a folder and its sub-folders, one sub-folder after the other."""
    with named(place.url):
        if place.local and not place.fs.isdir(place.root):
            if place.fs.exists(place.root):
                raise NotADirectoryError(
                    errno.ENOTDIR, "is a file; give a folder, a pattern, or a list of keys (.csv, .parquet)"
                )
            raise FileNotFoundError(errno.ENOENT, "no such folder")
        for folder, folders, files in place.fs.walk(place.root, on_error="raise"):
            if out.holds(folder, place):
                folders.clear()  # of a list or a dict: what is taken out is not entered
                continue
            yield from filter(_is_shown, sorted(_key(place, f"{folder.rstrip('/')}/{name}") for name in files))


def _matching(pattern: str, place: Storage, out: Storage) -> Iterator[str]:
    import fsspec

    with named(pattern):
        paths = sorted(place.fs.glob(fsspec.core.url_to_fs(pattern)[1]))
        yield from (key for path in paths if not out.holds(path, place) and _is_shown(key := _key(place, path)))


def _listed(file: str, place: Storage) -> Iterator[str]:
    """Keys of a column, a part of the file at a time. A key may be written as a whole URL or path."""
    import fsspec

    names = (place.url, place.root, place.fs.unstrip_protocol(place.root))
    prefixes = [f"{name.rstrip('/')}/" for name in names]
    with named(file):
        opened = fsspec.open(file, "rb").open()
    with opened:
        for text in _csv(file, opened) if file.lower().endswith(".csv") else _parquet(file, opened):
            yield next((text[len(p) :] for p in prefixes if text.startswith(p)), text)


def _csv(file: str, opened: Any) -> Iterator[str]:
    with io.TextIOWrapper(opened, encoding="utf-8-sig", newline="") as text:
        try:
            rows = csv.DictReader(text)
            _check_columns(file, rows.fieldnames or [])
            yield from (row["key"] or "" for row in rows)
        except UnicodeDecodeError:
            raise ValueError(f"{file}: not a text file in UTF-8") from None
        except csv.Error as error:
            raise ValueError(f"{file}: not a CSV file ({error})") from None


def _parquet(file: str, opened: Any) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(opened)
        _check_columns(file, table.schema_arrow.names)
        for batch in table.iter_batches(columns=["key"]):
            yield from (str(key or "") for key in batch.column(0).to_pylist())
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file}: not a parquet file ({' '.join(str(error).split())[:200]})") from None


def _check_columns(file: str, names: Any) -> None:
    if "key" not in names:
        raise ValueError(f"{file}: has no column key; its columns: {', '.join(names)}")


def _key(place: Storage, path: str) -> str:
    return path[len(place.root.rstrip("/")) + 1 :] if path.startswith(place.root) else path.lstrip("/")


def _is_shown(key: str) -> bool:
    hidden = any(part.startswith(".") for part in key.split("/"))
    return not hidden and posixpath.splitext(key)[1].lower() in READABLE


def batches(items: Iterator[str], size: int) -> Iterator[list[str]]:
    """`size` items at a time."""
    while batch := list(islice(items, size)):
        yield batch


def spool(keys: Iterator[str], file: Path) -> int:
    """Write keys to a file, so that they take no memory; returns how many."""
    count = 0
    with open(file, "w", encoding="utf-8") as f:
        for key in keys:
            f.write(json.dumps(key) + "\n")
            count += 1
    return count


def spooled(file: Path) -> Iterator[str]:
    """The keys of a spooled file."""
    with open(file, encoding="utf-8") as f:
        yield from map(json.loads, f)
