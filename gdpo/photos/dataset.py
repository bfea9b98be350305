"""HR crops for training: which picture, which part of it and which way up are pure functions of (seed, sample).

A sample is a GLOBAL number: 0, 1, 2, ... over the whole run. How the numbers are spread over processes, micro-batches
and workers changes nothing about what each of them sees, and a resumed run continues with the next number.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from engine.io.images import READABLE, ImageError, read_image
from gdpo.photos.folder import listing, picture_sizes, refuse_pairs
from gdpo.randomness import generator_for

SPLITS = ("train", "val")


class Batch(NamedTuple):
    """What the loader yields: file names, captions or None, global sample numbers, hr [B,3,crop,crop] in [0,1], and
    a line for each picture that could not be read and was replaced."""

    names: list[str]
    captions: list[str] | None
    samples: list[int]
    hr: Tensor
    skipped: tuple[str, ...] = ()


class Found(NamedTuple):
    """A picture of the folder: its name there, bytes, and (width, height), or why it cannot be read."""

    name: str
    bytes: int
    size: Any


class CropDataset:
    """Square crops from a folder of pictures.

    Args:
        folder: made by `python -m gdpo.prepare` (train/, val/, manifest.jsonl), or any folder of pictures, searched
            recursively, links followed, in natural order. Pictures may be of any shape that holds a crop.
        split: "train": random part, flips and quarter turns, in an order drawn anew for each epoch. "val": the centre,
            in the folder's order; a folder without held-out crops gives its training crops instead.
        crop_size: side of the crops.
        skip_small: leave out pictures smaller than the crop.
        skip_broken: leave out files that are no pictures.
        progress: show a bar while many headers are read.

    Attributes:
        files: the pictures. `names`: the same relative to `folder`. `captions`: one for each, or None.
        fingerprint: a hash of names and file sizes; two datasets with the same one give the same samples.
        notes: what was left out, a line each.

    Raises:
        ValueError: no such folder, no pictures, files that are no pictures, or pictures smaller than the crop; counted,
            and the first one named. LR pictures beside HR ones.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        crop_size: int,
        *,
        skip_small: bool = False,
        skip_broken: bool = False,
        progress: bool = True,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
        if crop_size < 1:
            raise ValueError(f"crop_size must be positive; got {crop_size}")
        self.folder, self.split, self.crop_size = Path(folder), split, crop_size
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is not a folder; make one of crops with: python -m gdpo.prepare")
        self.notes: list[str] = []
        self._found = _prepared(self.folder) or _plain(self.folder, self.notes, progress)
        self._take(skip_small, skip_broken)

    def held_out(self) -> CropDataset:
        """The val split of the same folder, without looking into it again; what is too small is left out."""
        other = copy.copy(self)
        other._found = self._found  # what is copied is what a worker gets, and that is without it
        other.split, other.notes = "val", []
        other._take(skip_small=True, skip_broken=True)
        return other

    def _take(self, skip_small: bool, skip_broken: bool) -> None:
        """Check the pictures of the split, and keep those that hold a crop."""
        mine = [picture for picture in self._found if picture.name.startswith(f"{self.split}/")]
        found, side = mine or self._found, self.crop_size
        unreadable = [picture.size for picture in found if isinstance(picture.size, str)]
        if unreadable:
            more = f", and {len(unreadable) - 1} more such file(s)" if len(unreadable) > 1 else ""
            if not skip_broken or len(unreadable) == len(found):
                raise ValueError(f"{unreadable[0]}{more}; take such files away, or --data.on_error skip")
            self.notes.append(f"left out: {unreadable[0]}{more}")
            found = [picture for picture in found if not isinstance(picture.size, str)]
        small = [picture for picture in found if min(picture.size) < side]
        if small:
            width, height = small[0].size
            line = f"{self.folder / small[0].name} is {width}x{height}, smaller than the crop size {side}"
            line += f", as are {len(small) - 1} more of {len(found)} pictures" if len(small) > 1 else ""
            if not skip_small or len(small) == len(found):
                remedy = "" if skip_small else "; to leave them out: --data.skip_small true"
                raise ValueError(f"{line}{remedy}")
            self.notes.append(f"left out: {line}")
        kept = [picture for picture in found if min(picture.size) >= side]
        self.names = [picture.name for picture in kept]
        self.files = [self.folder / picture.name for picture in kept]
        digest = hashlib.blake2b(digest_size=16)
        for picture in kept:
            digest.update(f"{picture.name}\0{picture.bytes}\0".encode("utf-8", "surrogateescape"))
        self.fingerprint = digest.hexdigest()
        self.captions = _captions(self.folder, self.names)
        self._order = functools.lru_cache(maxsize=2)(self._permutation)

    def __len__(self) -> int:
        return len(self.files)

    def index_of(self, sample: int, *, seed: int) -> int:
        """Which picture a global sample number shows; each picture once an epoch."""
        epoch, position = divmod(sample, len(self))
        return int(self._order(seed, epoch)[position]) if self.split == "train" else position

    def _permutation(self, seed: int, epoch: int) -> Tensor:
        return torch.randperm(len(self), generator=generator_for(seed, "order", epoch))

    def item(self, index: int, *, seed: int, sample: int) -> dict:
        """-> name, hr [3,crop,crop] float32 in [0,1], caption (or None). The part shown depends on (seed, sample).

        Raises:
            ImageError: the picture is damaged; the message names it.
        """
        pixels = read_image(self.files[index]).pixels
        height, width = (side - self.crop_size for side in pixels.shape[:2])
        if min(height, width) < 0:
            raise ImageError(f"{self.files[index]}: smaller than the crop size {self.crop_size}")
        if self.split == "train":
            rng = generator_for(seed, "crop", sample)
            top, left, turns, flip = (int(torch.randint(n, (), generator=rng)) for n in (height + 1, width + 1, 4, 2))
        else:
            top, left, turns, flip = height // 2, width // 2, 0, 0
        crop = np.rot90(pixels[top : top + self.crop_size, left : left + self.crop_size], turns)
        crop = np.ascontiguousarray((crop[:, ::-1] if flip else crop).transpose(2, 0, 1), dtype=np.float32)
        hr = torch.from_numpy(crop).div_(np.iinfo(pixels.dtype).max)
        return {"name": self.names[index], "hr": hr, "caption": self.captions and self.captions[index]}

    def __getstate__(self) -> dict:  # workers that are not forked get a pickle; a cached method has none
        return {k: v for k, v in self.__dict__.items() if k not in ("_order", "_found")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._order = functools.lru_cache(maxsize=2)(self._permutation)


_TRIES = 10  # pictures that a sample may take, one after the other, before the run ends all the same


def loader(
    dataset: CropDataset,
    sample_lists: Iterable[list[int]],
    seed: int,
    num_workers: int = 0,
    on_error: str = "stop",
) -> Iterator[Batch]:
    """Load one batch for each list of global sample numbers, ahead of time in `num_workers` processes.

    The batches do not depend on `num_workers`.

    Args:
        on_error: for a picture that cannot be read: "stop", or "skip": another takes its place, which one is a
            function of (seed, sample), and the sample keeps its number.

    Raises:
        ImageError: a picture that cannot be read; or ten in a row.
    """
    batches = DataLoader(
        _Samples(dataset, seed, on_error),
        batch_sampler=sample_lists,  # type: ignore[arg-type]  # any iterable of lists will do
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_group,
        generator=torch.Generator(),  # else the loader would draw from the global one
    )
    for batch in batches:
        if isinstance(batch, ImageError):
            raise batch
        yield batch


class _Samples(Dataset):
    """Indexed by global sample number."""

    def __init__(self, dataset: CropDataset, seed: int, on_error: str) -> None:
        self.dataset, self.seed, self.tries = dataset, seed, 1 if on_error == "stop" else _TRIES

    def __getitem__(self, sample: int) -> dict | ImageError:
        index = self.dataset.index_of(sample, seed=self.seed)
        skipped: list[str] = []
        for again in range(self.tries):
            try:
                item = self.dataset.item(index, seed=self.seed, sample=sample)
                return item | {"sample": sample, "skipped": skipped}
            except ImageError as error:
                failure = error
                skipped.append(str(error))
                draw = generator_for(self.seed, "instead", sample, again)
                index = int(torch.randint(len(self.dataset), (), generator=draw))
        return failure  # raised in a worker, it would come back as a page of its traceback


def _collate(samples: list[dict | ImageError]) -> Batch | ImageError:
    items = []
    for sample in samples:
        if isinstance(sample, ImageError):
            return sample
        items.append(sample)
    captions = None if items[0]["caption"] is None else [i["caption"] for i in items]
    skipped = tuple(line for i in items for line in i["skipped"])
    pictures = torch.stack([i["hr"] for i in items])
    return Batch([i["name"] for i in items], captions, [i["sample"] for i in items], pictures, skipped)


def _leave_group(worker: int) -> None:
    """Ctrl-C and a launcher's SIGTERM go to the process group: the main process saves, then ends its workers itself."""
    os.setsid()


def read_jsonl(path: Path, *keys: str) -> list[dict]:
    """The objects of a JSON-lines file, each of which must have these keys.

    Raises:
        ValueError: names file and line.
    """
    rows = []
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from None
    for number, line in enumerate(text.splitlines(), 1):
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


def _plain(folder: Path, notes: list[str], progress: bool) -> list[Found]:
    """The pictures of any folder. What is left out is added to the notes."""
    found = listing(folder)
    if found.dangling:
        name, target = next(iter(found.dangling.items()))
        more = f", and {len(found.dangling) - 1} more such link(s)" if len(found.dangling) > 1 else ""
        raise ValueError(f"{folder / name} is a link to {target}, which is not there{more}; mend or remove it")
    if found.others:
        suffixes = " ".join(sorted({Path(name).suffix.lower() for name in found.others}))
        notes.append(f"left out: {len(found.others)} file(s) of formats that are not read ({suffixes}), such as "
                     f"{folder / found.others[0]}; gdpo.prepare names them all")  # fmt: skip
    if not found.names:
        raise ValueError(
            f"{folder} holds no pictures ({' '.join(sorted(READABLE))}){'; ' + notes[-1] if notes else ''}"
        )
    refuse_pairs(folder, found.names)
    sizes = picture_sizes(found, progress=progress)
    return [Found(name, facts[0], size) for name, facts, size in zip(found.names, found.stats, sizes)]


def _captions(folder: Path, names: list[str]) -> list[str] | None:
    path = folder / "captions.jsonl"
    if not path.is_file():
        return None
    captions = {str(row["file"]): str(row["caption"]) for row in read_jsonl(path, "file", "caption")}
    missing = [name for name in names if name not in captions]
    if missing:
        raise ValueError(f"{path} has no caption for {len(missing)} of {len(names)} pictures, the first {missing[0]}")
    return [captions[name] for name in names]
