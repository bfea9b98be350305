"""A folder of pictures: what is in it and below it, links followed, and how large the pictures are.

200,000 headers take a minute to read, so what was read is remembered, in the user's cache folder and checked against
each file's size and time; a start then takes seconds.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import stat
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.io.files import naming
from engine.io.images import MAX_PIXELS, READABLE, picture_size
from engine.io.sink import atomic_file

# Pictures of other kinds: not read, and said by name.
OTHER_SUFFIXES = frozenset({".gif", ".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl", ".mpo", ".psd", ".exr", ".hdr",
                            ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"}) - READABLE  # fmt: skip
_PICTURES = READABLE | OTHER_SUFFIXES
_SIDES = {side: re.compile(rf"(?i)(?P<before>(?:^|.*[-_. ]))(?:{words})(?P<after>(?:[-_. ].*)?)$")
          for side, words in (("HR", r"(?:hr|gt|hq)(mod\d+)?"), ("LR", r"(?:lr|lq)(bic)?(?:_?x?\d+)?"))}  # fmt: skip
_ANY_SIDE = re.compile("(?i)hr|gt|hq|lr|lq")  # in every name that one of these matches


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


def natural(name: str) -> str:
    """A sort key by which crop9 comes before crop10, without regard to case. Names that differ in case alone have the
    same key: sort by the name first."""
    return _NUMBER.sub(lambda match: _countable(match[0]), name.lower())


_NUMBER = re.compile("[0-9]+")


@functools.lru_cache(1 << 16)  # most numbers come many times
def _countable(number: str) -> str:
    """Digits such that texts of them sort as the numbers do: how many there are, then they, then zeros before them."""
    digits = number.lstrip("0")
    return f"\0{len(digits):03}{digits}{number}\0"


def listing(folder: Path) -> Listing:
    """The pictures in a folder and below it. Links are followed: each folder and each file once, so that no loop is.

    Raises:
        OSError: a folder that cannot be listed.
    """
    found = Listing(folder)
    names: list[str] = []
    facts, places = array("q"), array("Q")  # bytes and time; device and number: millions of small objects take memory
    links: list[tuple[str, str]] = []
    folders: set[tuple[int, int]] = set()

    def walk(path: str, name: str, status: os.stat_result) -> None:
        """Take what lies in a folder; links wait until all that is there without them is known."""
        if (status.st_dev, status.st_ino) in folders:
            return
        folders.add((status.st_dev, status.st_ino))
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
        names.append(name)
        facts.extend((status.st_size, status.st_mtime_ns))
        places.extend((status.st_dev, status.st_ino))

    walk(os.fspath(folder), "", os.stat(folder))
    while links:
        seen = set(zip(places[::2], places[1::2]))
        now, links = sorted(sorted(links), key=lambda link: natural(link[0])), []
        for name, path in now:
            try:
                status = os.stat(path)
            except OSError:  # to nothing, or round in circles
                if _is_picture(name) or not Path(name).suffix:
                    found.dangling[name] = os.readlink(path)
                continue
            place = (status.st_dev, status.st_ino)
            if stat.S_ISDIR(status.st_mode):
                before = len(names)
                walk(path, f"{name}/", status)
                seen.update(zip(places[2 * before :: 2], places[2 * before + 1 :: 2]))
            elif _is_picture(name) and stat.S_ISREG(status.st_mode) and place not in seen:
                seen.add(place)
                take(name, status)
    by_name = sorted(range(len(names)), key=names.__getitem__)
    for i in sorted(by_name, key=lambda i: natural(names[i])):
        if _suffix(names[i]) in READABLE:
            found.names.append(names[i])
            found.stats.append((facts[2 * i], facts[2 * i + 1]))
        else:
            found.others.append(names[i])
    return found


def _is_picture(name: str) -> bool:
    return _suffix(name) in _PICTURES


def _suffix(name: str) -> str:
    """Of a file that is not hidden."""
    return name[name.rfind(".") :].lower()


def side_of(name: str) -> str | None:
    """ "HR" or "LR", as a picture's name or a folder above it says: x_HR.png, LR/x.png, x.lq.png; None for neither."""
    parts = name.split("/")
    for part in reversed([*parts[:-1], stem_of(parts[-1])]):
        for side, pattern in _SIDES.items():
            if pattern.match(part):
                return side
    return None


def without_side(name: str) -> str:
    """A picture's name without its suffix and what tells HR from LR: the same for both pictures of a pair."""
    *folders, last = name.split("/")
    kept = [f for f in folders if not any(p.match(f) for p in _SIDES.values()) and not re.fullmatch(r"(?i)x\d+", f)]
    last = stem_of(last)
    for pattern in _SIDES.values():
        if match := pattern.match(last):
            last = match["before"] + "*" + match["after"]
    return "/".join([*kept, re.sub(r"(?i)(?<=.)[-_. ]?x\d+$", "", last)])


def stem_of(name: str) -> str:
    """A file's name without the suffix of a picture."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in _PICTURES else name


def refuse_pairs(folder: Path, names: Iterable[str]) -> None:
    """Refuse a folder that holds HR and LR pictures side by side: the LR ones would be trained on as HR.

    Raises:
        ValueError: subfolders HR and LR, or pictures X_HR and X_LR4, and the like (GT, HQ, LQ, LRx4, DIV2K_train_HR).
    """
    stems: dict[tuple[str, str], dict[str, str]] = {}
    seen: set[str] = set()
    for name in filter(_ANY_SIDE.search, names):
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
                            "ones; name a folder that holds the HR pictures alone, or train on both by data.pairs"
                        )


Size = tuple[int, int] | str  # (width, height), or why the picture cannot be read


def picture_sizes(found: Listing, *, progress: bool = True, what: str | None = None) -> list[Size]:
    """(width, height) of each picture, or why it cannot be read; headers that were read before are not read again.

    Args:
        progress: show a bar where it takes longer than a second.
        what: the name under which they are remembered; None: the folder.
    """
    return remembered_sizes(
        what or os.path.realpath(found.folder),
        found.names,
        found.stats,
        lambda i: header_size(found.folder / found.names[i]),
        progress,
    )


def remembered_sizes(
    what: str, names: Sequence[str], stats: Sequence[tuple[int, int]], look: Callable[[int], Size], progress: bool
) -> list[Size]:
    """The sizes of pictures that were seen before, and have the same two numbers in `stats`; `look` is asked for the
    others.

    Args:
        what: the name under which they are remembered.
        look: position -> size.
    """
    cache = cache_file(what)
    known, facts = read_cache(cache, 4)
    sizes: list[Size | None]
    if known == list(names) and np.array_equal(facts[:, :2], np.array(stats, np.int64).reshape(-1, 2)):
        shared: dict[tuple[int, int], tuple[int, int]] = {}  # most pictures have one of a few sizes
        return [shared.setdefault(size, size) for size in map(tuple, facts[:, 2:].tolist())]
    row = {name: i for i, name in enumerate(known)}
    sizes = [None] * len(names)
    for i, (name, facts_of) in enumerate(zip(names, stats)):
        if (at := row.get(name)) is not None and tuple(facts[at, :2].tolist()) == facts_of:
            sizes[i] = (int(facts[at, 2]), int(facts[at, 3]))
    todo = [i for i, size in enumerate(sizes) if size is None]
    for i in tqdm(todo, desc="headers", unit="picture", delay=1, disable=not progress, file=sys.stderr):
        sizes[i] = look(i)
    done = [size for size in sizes if size is not None]
    if todo or len(known) != len(done):
        write_cache(cache, [(n, (*s, *x)) for n, s, x in zip(names, stats, done) if not isinstance(x, str)])
    return done


def header_size(path: Path) -> Size:
    """(width, height) as the header says, or why the picture cannot be read."""
    return checked_size(picture_size(path), str(path))


def checked_size(size: tuple[int, int] | None, name: str) -> Size:
    """(height, width) of a header, or None where it cannot be read -> (width, height), or why it is not taken."""
    if size is None:
        return f"{name} is not a picture that can be read"
    height, width = size
    if width * height > MAX_PIXELS:
        return f"{name} is {width}x{height}; pictures of at most {MAX_PIXELS / 1e6:.0f} megapixels are read"
    return width, height


def cache_file(what: str) -> Path:
    """Where what is known of a folder or an archive is kept."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "gdpo" / "headers" / f"{hashlib.blake2b(os.fsencode(what), digest_size=16).hexdigest()}.npz"


def read_cache(file: Path, columns: int) -> tuple[list[str], np.ndarray]:
    """N names, and as many numbers of each [N,columns] int64; nothing where there is no cache or it is damaged."""
    try:
        with open(file, "rb") as f, np.load(f, allow_pickle=False) as content:
            names = os.fsdecode(content["names"].tobytes()).split("\0")
            facts = content["facts"]
        if facts.shape == (len(names), columns) and facts.dtype == np.int64:
            return names, facts
    except Exception:  # of many kinds; a cache is a convenience
        pass
    return [], np.zeros((0, columns), np.int64)


def write_cache(file: Path, rows: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    """Keep rows of a name and some numbers, where there is a place for them."""
    if not rows:
        return
    names = np.frombuffer(os.fsencode("\0".join(n for n, _ in rows)), np.uint8)
    facts = np.array([f for _, f in rows], np.int64)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as f:
            np.savez(f, names=names, facts=facts)
    except OSError:  # no home, or one that cannot be written: the headers are read again next time
        pass


def read_text(path: Path) -> str:
    """A text file, without the mark with which some editors begin it.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        with naming(path):
            return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from None


def captions_of(path: Path) -> dict[str, str]:
    """file -> caption of a captions.jsonl. What is no text (null, a list) is no caption.

    Raises:
        ValueError: names file and line.
    """
    rows = read_jsonl(path, "file", "caption")
    return {str(row["file"]): row["caption"] for row in rows if isinstance(row["caption"], str)}


def read_jsonl(path: Path, *keys: str) -> list[dict]:
    """The objects of a JSON-lines file, each of which must have these keys.

    Raises:
        ValueError: names file and line.
    """
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            missing = [key for key in keys if key not in row]
        except (ValueError, TypeError):
            raise ValueError(f"{path}, line {number}: not a JSON object") from None
        if not isinstance(row, dict) or missing:
            raise ValueError(f"{path}, line {number}: expected an object with {', '.join(keys)}")
        rows.append(row)
    return rows
