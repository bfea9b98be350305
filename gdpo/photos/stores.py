"""Where pictures lie: a folder, a list of files, tar shards (WebDataset), or a Hugging Face dataset on disk."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from engine.io.images import READABLE
from gdpo.photos.archives import Arrow, Shards
from gdpo.photos.folder import (
    Listing,
    listing,
    picture_sizes,
    read_jsonl,
    read_text,
    refuse_pairs,
    side_of,
)
from gdpo.photos.store import Found, Store


def open_store(where: str | Path, *, pairs: bool = False, skip_broken: bool = False, progress: bool = True) -> Store:
    """The pictures of a folder, `LIST.txt`, shards (`F.tar`, `F-{000..012}.tar`, `F-*.tar`, a folder of them), or a
    folder that `datasets.Dataset.save_to_disk` wrote.

    Args:
        pairs: HR and LR pictures may lie side by side.
        skip_broken: take what is whole of a broken shard, and leave out links to nothing.
        progress: show a bar while many headers are read.

    Raises:
        ValueError: there is no such thing, or it holds no pictures, or is broken; one line.
    """
    path = Path(where)
    if shards := _shards(str(where)):
        return Shards(path, shards, skip_broken, progress)
    if Arrow.is_at(path):
        return Arrow(path, progress)
    if path.is_file():
        if path.suffix.lower() not in (".txt", ".lst"):
            raise ValueError(
                f"{where} is a file; name a folder of pictures, a list of them (.txt), or tar shards (.tar)"
            )
        return _listed(path, skip_broken, progress)
    if not path.is_dir():
        remedy = "" if pairs else "; make one of crops with: python -m gdpo.prepare"
        raise ValueError(f"{where} is not a folder{remedy}")
    notes: list[str] = []
    return Store(path, _prepared(path) or _plain(path, notes, pairs, skip_broken, progress), notes)


def _shards(where: str) -> list[Path]:
    """The files that a name of shards stands for, in order; none where it is no such name.

    Raises:
        ValueError: shards that are not there, or compressed.
    """
    if os.path.isdir(where):
        inside = [Path(where, name) for name in sorted(os.listdir(where)) if name.endswith(".tar")]
        return [] if any(Path(where, other).is_file() for other in ("manifest.jsonl", "state.json")) else inside
    if re.search(r"(?i)\.(tar\.\w+|tgz|zip)$", where):
        raise ValueError(f"{where}: pictures are read at any place of a shard, so it must be a plain .tar; unpack it")
    if not where.lower().endswith(".tar"):
        return []
    found: list[Path] = []
    for name in _braces(where):
        names = sorted(glob.glob(name)) if re.search(r"[*?\[]", name) else [name]
        for path in map(Path, names):
            if not path.is_file():
                raise ValueError(f"{path}: no such shard")
            found.append(path)
    if not found:
        raise ValueError(f"{where}: no such shard")
    return found


def _braces(name: str) -> Iterator[str]:
    """ "F-{000..012}.tar" -> F-000.tar, F-001.tar, ..., as WebDataset writes it."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if not match:
        yield name
        return
    first, last = match.groups()
    for n in range(int(first), int(last) + 1):
        yield from _braces(f"{name[: match.start()]}{str(n).zfill(len(first))}{name[match.end() :]}")


def _prepared(folder: Path) -> list[Found]:
    """The crops that `gdpo.prepare` made, or nothing where it did not make this folder."""
    if not (folder / "manifest.jsonl").is_file():
        return []
    found = []
    for row in read_jsonl(folder / "manifest.jsonl", "file", "size"):
        name = str(row["file"])
        try:
            found.append(Found(name, os.stat(folder / name).st_size, (row["size"], row["size"])))
        except FileNotFoundError:
            raise ValueError(
                f"{folder / name} is missing, though the folder's manifest lists it; run gdpo.prepare again"
            ) from None
    return found


def _plain(folder: Path, notes: list[str], pairs: bool, skip_broken: bool, progress: bool) -> list[Found]:
    """The pictures of any folder. What is left out is added to the notes."""
    found = listing(folder)
    if found.dangling:
        name, target = next(iter(found.dangling.items()))
        more = f", and {len(found.dangling) - 1} more such link(s)" if len(found.dangling) > 1 else ""
        line = f"{folder / name} is a link to {target}, which is not there{more}"
        if not skip_broken:
            raise ValueError(f"{line}; mend or remove it, or --data.on_error skip")
        notes.append(f"left out: {line}")
    if found.others:
        suffixes = " ".join(sorted({Path(name).suffix.lower() for name in found.others}))
        notes.append(f"left out: {len(found.others)} file(s) of formats that are not read ({suffixes}), such as "
                     f"{folder / found.others[0]}; gdpo.prepare names them all")  # fmt: skip
    if not found.names:
        raise ValueError(
            f"{folder} holds no pictures ({' '.join(sorted(READABLE))}){'; ' + notes[-1] if notes else ''}"
        )
    if not pairs:
        refuse_pairs(folder, found.names)
    sizes = picture_sizes(found, progress=progress)
    return [Found(name, facts[0], size) for name, facts, size in zip(found.names, found.stats, sizes)]


class FileList(Store):
    """The files that a list names; `where` is the list's folder."""

    def captions(self) -> dict[str, str] | None:
        return None


def _listed(file: Path, skip_broken: bool, progress: bool) -> Store:
    """A file's pictures: a line each, relative to the list's folder; what follows in brackets (BasicSR) is dropped."""
    found = Listing(file.parent)
    missing: dict[int, str] = {}  # position in the list -> why
    for number, line in enumerate(read_text(file).splitlines(), 1):
        name = re.sub(r"\s+\([\d, ]+\)$", "", line.strip())
        if not name or name.startswith("#"):
            continue
        try:
            status = os.stat(file.parent / name)
            stats = (status.st_size, status.st_mtime_ns)
        except (OSError, ValueError):  # a name with a zero byte
            reason = f"{file}, line {number}: {name!r:.200} is not there"
            if not skip_broken:
                raise ValueError(f"{reason}; a line is a picture's path") from None
            missing[len(found.names)], stats = reason, (0, 0)
        found.names.append(name)
        found.stats.append(stats)
    if not found.names:
        raise ValueError(f"{file} lists no pictures; write a path on each line")
    here = [i for i in range(len(found.names)) if i not in missing]
    there = Listing(file.parent, [found.names[i] for i in here], [found.stats[i] for i in here])
    sizes = iter(picture_sizes(there, progress=progress, what=os.path.realpath(file)))
    listed = enumerate(zip(found.names, found.stats))
    entries = [Found(n, s[0], missing[i] if i in missing else next(sizes)) for i, (n, s) in listed]
    return FileList(file.parent, entries, [])


def hr_alone(store: Store) -> list[Found]:
    """The pictures of a store to train on as HR: without the LR ones that an archive holds beside them."""
    if not store.sides:
        return store.found
    sides = [side_of(picture.name) for picture in store.found]
    if "LR" not in sides:
        return store.found
    kept = [picture for picture, side in zip(store.found, sides) if side != "LR"]
    store.notes.append(f"left out: {len(sides) - len(kept)} LR pictures of {store.where}; data.pairs takes real pairs")
    return kept
