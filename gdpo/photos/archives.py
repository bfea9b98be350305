"""Many pictures in few files: tar shards as WebDataset writes them, and Hugging Face datasets on disk.

Pictures are read at any place, by the global number of a sample, not as a stream: so which picture a sample shows does
not depend on processes, workers or where a run was stopped.
"""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from engine.io.files import naming
from engine.io.images import READABLE, ImageError, Picture, picture_size, read_image
from gdpo.photos.folder import cache_file, checked_size, read_cache, remembered_sizes, write_cache
from gdpo.photos.store import Found, Store


class _Part(NamedTuple):
    """A file inside a shard."""

    shard: int
    offset: int
    bytes: int


class _Window(io.RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self.file, self.offset, self.length, self.at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, to: int, whence: int = 0) -> int:
        self.at = max(0, to + (0, self.at, self.length)[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.offset + self.at)
        data = self.file.read(max(0, min(len(buffer), self.length - self.at)))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


class Archive(Store):
    """Pictures that are no files of their own, HR and LR perhaps side by side."""

    sides = True

    @property
    def captions_at(self) -> Path:
        return self.where


class Shards(Archive):
    """Tar shards: KEY.png, or KEY.hr.png and KEY.lr.png, with a caption in KEY.txt. Names are SHARD/KEY.png."""

    def __init__(self, where: Path, shards: list[Path], skip_broken: bool, progress: bool) -> None:
        super().__init__(where, [], [])
        self.shards, self.stems, self.first = shards, _stems(shards), ""
        self.texts: dict[str, _Part] = {}  # by SHARD/KEY
        for number, shard in enumerate(shards):
            self._index(number, shard, skip_broken, progress)
        if not self.found:
            instead = f", but {self.first} and the like" if self.first else ""
            raise ValueError(f"{where}: its shards hold no pictures ({' '.join(sorted(READABLE))}){instead}")

    def _index(self, number: int, shard: Path, skip_broken: bool, progress: bool) -> None:
        """Where each picture of a shard is and how large; remembered until the shard changes."""
        status = os.stat(shard)
        what = f"{os.path.realpath(shard)}\0{status.st_size}\0{status.st_mtime_ns}"
        cache = cache_file(f"shard\0{what}")
        names, facts = read_cache(cache, 2)
        known: dict[str, tuple[int, ...]] = dict(zip(names, map(tuple, facts.tolist())))
        if not known:
            known, broken = _members(shard)
            if broken:
                line = f"{shard}: a broken shard ({broken}); {len(known)} files of it are whole"
                if not skip_broken:
                    raise ValueError(f"{line}; fetch it again, or --data.on_error skip")
                self.notes.append(line)
            else:
                write_cache(cache, list(known.items()))
        parts = {n: _Part(number, *facts) for n, facts in known.items()}
        pictures = [n for n in parts if os.path.splitext(n)[1].lower() in READABLE]
        with open(shard, "rb") as file:

            def look(i: int) -> Any:
                part = parts[pictures[i]]
                window = io.BufferedReader(_Window(file, part.offset, part.bytes))
                return checked_size(picture_size(window), f"{shard}: {pictures[i]}")

            stats = [(parts[n].bytes, parts[n].offset) for n in pictures]
            sizes = remembered_sizes(f"sizes\0{what}", pictures, stats, look, progress)
        stem, self.first = self.stems[number], self.first or next(iter(parts), "")
        self.found += [Found(f"{stem}/{n}", parts[n].bytes, x, parts[n]) for n, x in zip(pictures, sizes)]
        self.texts |= {f"{stem}/{n[:-4]}": part for n, part in parts.items() if n.endswith(".txt")}

    def label(self, picture: Found) -> str:
        number = picture.place.shard
        return f"{self.shards[number]}: {picture.name[len(self.stems[number]) + 1 :]}"

    def read(self, picture: Found) -> Picture:
        label = self.label(picture)
        try:
            data = self._bytes(picture.place)
        except OSError as error:
            raise ImageError(f"{label}: {error.strerror}") from None
        return read_image(label, data=data)

    def _bytes(self, part: _Part) -> bytes:
        with naming(self.shards[part.shard]), open(self.shards[part.shard], "rb") as file:
            file.seek(part.offset)
            return file.read(part.bytes)

    def captions(self) -> dict[str, str] | None:
        """name -> caption, where a text lies beside a picture: KEY.txt, KEY being the name up to its first dot."""
        if not self.texts:
            return None
        texts: dict[str, str] = {}
        for number, shard in enumerate(self.shards):
            with naming(shard), open(shard, "rb") as file:
                for key, part in self.texts.items():
                    if part.shard == number:
                        file.seek(part.offset)
                        try:
                            texts[key] = file.read(part.bytes).decode("utf-8-sig").strip()
                        except UnicodeDecodeError as error:
                            raise ValueError(f"{shard}: {key}.txt is not UTF-8 text ({error})") from None
        keys = {
            p.name: f"{p.name.rpartition('/')[0]}/{p.name.rpartition('/')[2].partition('.')[0]}" for p in self.found
        }
        return {name: texts[key] for name, key in keys.items() if key in texts}


def _stems(shards: list[Path]) -> list[str]:
    """What names in each shard begin with: its file's name, with the folders above it where two have the same name."""
    stems = [shard.stem for shard in shards]
    if len(set(stems)) == len(stems):
        return stems
    above = os.path.commonpath([os.path.abspath(shard.parent) for shard in shards])
    return [os.path.relpath(os.path.abspath(shard.with_suffix("")), above) for shard in shards]


def _members(shard: Path) -> tuple[dict[str, tuple[int, ...]], str]:
    """name -> (offset, bytes) of the files of a tar, and why it is broken, if it is."""
    size = os.path.getsize(shard)
    found: dict[str, tuple[int, ...]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    return found, "it ends in the middle of a file"
                found[member.name.removeprefix("./")] = (member.offset_data, member.size)
            end = tar.offset
        with open(shard, "rb") as file:  # tarfile takes whatever is no header for the end
            file.seek(end)
            block = file.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError, EOFError) as error:
        return found, str(error) or type(error).__name__
    if len(block) < tarfile.BLOCKSIZE or any(block):
        return found, "it ends in the middle" if len(block) < tarfile.BLOCKSIZE else f"garbage at byte {end}"
    return found, ""


class Arrow(Archive):
    """A dataset of the package `datasets`, saved by `save_to_disk`. Names are SPLIT/ROW/COLUMN or ROW/COLUMN.

    Its columns of the type Image are read: `hr` and `lr`, or whichever there are. `text` or `caption` is the caption.
    """

    @staticmethod
    def is_at(path: Path) -> bool:
        """Whether this is such a folder."""
        alone = (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
        return alone or (path / "dataset_dict.json").is_file()

    def __init__(self, where: Path, progress: bool) -> None:
        super().__init__(where, [], [])
        try:
            import datasets
        except ImportError:
            raise ValueError(
                f"{where} is a Hugging Face dataset, which needs the package datasets: pip install 'gdpo-sr[hub]'"
            ) from None
        try:
            loaded: Any = datasets.load_from_disk(str(where))
        except Exception as error:  # of pyarrow, json, fsspec
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{where}: a broken dataset ({reason[:200]})") from None
        splits = loaded if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
        self.parts: dict[str, Any] = {}
        self.columns: dict[tuple[str, str], Any] = {}
        for name, part in splits.items():
            fingerprint = part._fingerprint
            columns = [c for c, feature in part.features.items() if isinstance(feature, datasets.Image)]
            split = {"validation": "val", "test": "val"}.get(name, name)
            if not columns or split in self.parts:
                continue
            self.parts[split] = part
            for column in columns:
                bare = part.select_columns(column).cast_column(column, datasets.Image(decode=False))
                self.columns[split, column] = bare
            self._index(split, len(part), columns, fingerprint, progress)
            self.identity += fingerprint
        if not self.found:
            there = ", ".join(dict.fromkeys(c for part in splits.values() for c in part.column_names))
            raise ValueError(
                f"{where} has no column of the type Image with pictures in it; its columns are {there} "
                "(dataset.cast_column(NAME, datasets.Image()) makes one of encoded pictures)"
            )

    def _index(self, split: str, rows: int, columns: list[str], fingerprint: str, progress: bool) -> None:
        places = [(split, row, column) for row in range(rows) for column in columns]
        names = [f"{split}/{row:08d}/{column}".removeprefix("/") for split, row, column in places]

        def look(i: int) -> Any:
            return checked_size(picture_size(io.BytesIO(self._bytes(places[i]))), f"{self.where}: {names[i]}")

        what = f"arrow\0{os.path.realpath(self.where)}\0{split}\0{fingerprint}"
        sizes = remembered_sizes(what, names, [(0, 0)] * len(names), look, progress)
        self.found += [Found(n, 0, x, place) for n, x, place in zip(names, sizes, places)]

    def label(self, picture: Found) -> str:
        return f"{self.where}: {picture.name}"

    def read(self, picture: Found) -> Picture:
        label = self.label(picture)
        try:
            data = self._bytes(picture.place)
        except Exception as error:  # of pyarrow, or of a file that a row names
            raise ImageError(f"{label}: {' '.join(str(error).split())[:200] or type(error).__name__}") from None
        return read_image(label, data=data)

    def _bytes(self, place: tuple[str, int, str]) -> bytes:
        split, row, column = place
        value = self.columns[split, column][row][column] or {}
        if value.get("bytes"):
            return value["bytes"]
        path = value.get("path")
        return Path(path).read_bytes() if path and os.path.isfile(path) else b""

    def captions(self) -> dict[str, str] | None:
        found: dict[str, str] = {}
        for split, part in self.parts.items():
            column = next((c for c in ("caption", "text") if c in part.column_names), None)
            if column:
                texts = part[column][:]
                rows = ((p.name, texts[p.place[1]]) for p in self.found if p.place[0] == split)
                found |= {name: text for name, text in rows if isinstance(text, str)}
        return found or None
