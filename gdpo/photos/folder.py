"""A folder of pictures: what is in it and below it, links followed, and how large the pictures are.

200,000 headers take a minute to read, so what was read is remembered, in the user's cache folder and checked against
each file's size and time; a start then takes seconds.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.io.files import atomic_path
from engine.io.images import MAX_PIXELS, READABLE, picture_size

# Pictures of other kinds: not read, and said by name.
OTHER_SUFFIXES = frozenset({".gif", ".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl", ".mpo", ".psd", ".exr", ".hdr",
                            ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"}) - READABLE  # fmt: skip
_PICTURES = READABLE | OTHER_SUFFIXES
_SIDES = {side: re.compile(rf"(?i)(?P<before>(?:^|.*[-_. ]))(?:{words})(?P<after>(?:[-_. ].*)?)$")
          for side, words in (("HR", "hr|gt|hq"), ("LR", r"(?:lr|lq)(?:_?x?\d+)?"))}  # fmt: skip


@dataclass
class Listing:
    """What a folder holds.

    Attributes:
        folder: where.
        names: of its pictures, relative to it, in natural order. Hidden ones are left out; one that links reach by
            several ways is there once.
        stats: (bytes, modified in ns) of each.
        others: names of pictures of kinds that are not read.
        dangling: names of links to what is not there -> where they lead.
    """

    folder: Path
    names: list[str] = field(default_factory=list)
    stats: list[tuple[int, int]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    dangling: dict[str, str] = field(default_factory=dict)


def natural(name: str) -> list:
    """A sort key by which crop9 comes before crop10; ties of case and zeros are broken by the name itself."""
    words = re.split(r"(\d+)", name)
    return [*((int(w), w) if w.isdigit() and w.isascii() else (0, w.lower()) for w in words), (0, name)]


def listing(folder: Path) -> Listing:
    """The pictures in a folder and below it. Links are followed: each folder and each file once, so that no loop is.

    Raises:
        OSError: a folder that cannot be listed.
    """
    found = Listing(folder)
    pictures: list[tuple[str, os.stat_result]] = []
    links: list[tuple[str, str]] = []
    seen: set[tuple[int, int]] = set()  # device and number of each folder and file

    def walk(path: str, name: str, status: os.stat_result) -> None:
        """Take what lies in a folder; links wait until all that is there without them is known."""
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                below = f"{name}{entry.name}"
                if entry.is_symlink():
                    links.append((below, entry.path))
                elif entry.is_dir():
                    walk(entry.path, f"{below}/", os.stat(entry.path))
                elif _is_picture(entry.name) and entry.is_file():
                    take(below, entry.stat())

    def take(name: str, status: os.stat_result) -> None:
        seen.add((status.st_dev, status.st_ino))
        pictures.append((name, status))

    walk(os.fspath(folder), "", os.stat(folder))
    while links:
        now, links = sorted(links, key=lambda link: natural(link[0])), []
        for name, path in now:
            try:
                status = os.stat(path)
            except OSError:  # to nothing, or round in circles
                if _is_picture(name) or not Path(name).suffix:
                    found.dangling[name] = os.readlink(path)
                continue
            if stat.S_ISDIR(status.st_mode):
                walk(path, f"{name}/", status)
            elif _is_picture(name) and stat.S_ISREG(status.st_mode) and (status.st_dev, status.st_ino) not in seen:
                take(name, status)
    for name, status in sorted(pictures, key=lambda item: natural(item[0])):
        if os.path.splitext(name)[1].lower() in READABLE:
            found.names.append(name)
            found.stats.append((status.st_size, status.st_mtime_ns))
        else:
            found.others.append(name)
    return found


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in _PICTURES


def refuse_pairs(folder: Path, names: Iterable[str]) -> None:
    """Refuse a folder that holds HR and LR pictures side by side: the LR ones would be trained on as HR.

    Raises:
        ValueError: subfolders HR and LR, or pictures X_HR and X_LR4, and the like (GT, HQ, LQ, LRx4, DIV2K_train_HR).
    """
    stems: dict[tuple[str, str], dict[str, str]] = {}
    seen: set[str] = set()
    for name in names:
        parts = name.split("/")
        stem = os.path.splitext(parts[-1])[0]
        for depth, part in enumerate([*parts[:-1], stem]):
            above = "/".join(parts[:depth])
            last = depth == len(parts) - 1
            if not last:
                if f"{above}/{part}" in seen:
                    continue
                seen.add(f"{above}/{part}")
            for side, pattern in _SIDES.items():
                if match := pattern.match(part):
                    # Folders are a pair by their words alone; pictures by what is left of their names, too.
                    rest = match["before"] + "*" + match["after"] if last else "/"
                    sides = stems.setdefault((above, rest), {})
                    sides.setdefault(side, part)
                    if len(sides) == 2:
                        where = folder / above if above else folder
                        raise ValueError(
                            f"{where} holds {sides['HR']} and {sides['LR']}: the LR pictures would be taken for HR "
                            "ones; name a folder that holds the HR pictures alone"
                        )


def picture_sizes(found: Listing, *, progress: bool = True) -> list[tuple[int, int] | str]:
    """(width, height) of each picture, or why it cannot be read; headers that were read before are not read again.

    Args:
        progress: show a bar where it takes longer than a second.
    """
    cache = _cache_file(found.folder)
    known = _read_cache(cache)
    sizes: list[tuple[int, int] | str | None] = []
    for name, facts in zip(found.names, found.stats):
        entry = known.get(name)
        sizes.append((entry[2], entry[3]) if entry is not None and entry[:2] == facts else None)
    todo = [i for i, size in enumerate(sizes) if size is None]
    for i in tqdm(todo, desc="headers", unit="picture", delay=1, disable=not progress, file=sys.stderr):
        sizes[i] = header_size(found.folder / found.names[i])
    done = [size for size in sizes if size is not None]
    if todo or len(known) != len(done):
        _write_cache(cache, found, done)
    return done


def header_size(path: Path) -> tuple[int, int] | str:
    """(width, height) as the header says, or why the picture cannot be read."""
    size = picture_size(path)
    if size is None:
        return f"{path} is not a picture that can be read"
    height, width = size
    if width * height > MAX_PIXELS:
        return f"{path} is {width}x{height}; pictures of at most {MAX_PIXELS / 1e6:.0f} megapixels are read"
    return width, height


def _cache_file(folder: Path) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    digest = hashlib.blake2b(os.fsencode(os.path.realpath(folder)), digest_size=16).hexdigest()
    return Path(home) / "gdpo" / "headers" / f"{digest}.npz"


def _read_cache(file: Path) -> dict[str, tuple[int, int, int, int]]:
    """name -> (bytes, modified, width, height); nothing where there is no cache or it is damaged."""
    try:
        with open(file, "rb") as f, np.load(f, allow_pickle=False) as content:
            names = os.fsdecode(content["names"].tobytes()).split("\0")
            facts = content["facts"]
        if facts.shape != (len(names), 4) or facts.dtype != np.int64:
            return {}
        return dict(zip(names, map(tuple, facts.tolist())))
    except Exception:  # of many kinds; a cache is a convenience
        return {}


def _write_cache(file: Path, found: Listing, sizes: list[tuple[int, int] | str]) -> None:
    rows = [(n, (*s, *size)) for n, s, size in zip(found.names, found.stats, sizes) if not isinstance(size, str)]
    if not rows:
        return
    names = np.frombuffer(os.fsencode("\0".join(n for n, _ in rows)), np.uint8)
    facts = np.array([f for _, f in rows], np.int64)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as staged, open(staged, "wb") as f:
            np.savez(f, names=names, facts=facts)
    except OSError:  # no home, or one that cannot be written: the headers are read again next time
        pass
