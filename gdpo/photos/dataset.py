"""HR crops for training: which picture, which part of it and which way up are pure functions of (seed, sample).

A sample is a GLOBAL number: 0, 1, 2, ... over the whole run. How the numbers are spread over processes, micro-batches
and workers changes nothing about what each of them sees, and a resumed run goes on with the next number.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from engine.io.images import MAX_PIXELS, SUFFIXES, ImageError, read_image
from gdpo.randomness import generator_for

SPLITS = ("train", "val")


class Batch(NamedTuple):
    """What the loader yields: file names, captions or None, global sample numbers, hr [B,3,crop,crop] in [0,1]."""

    names: list[str]
    captions: list[str] | None
    samples: list[int]
    hr: Tensor


class CropDataset:
    """Square crops from a folder of pictures.

    Args:
        folder: made by `python -m gdpo.prepare` (train/, val/, manifest.jsonl), or any folder of pictures, searched
            recursively, in natural order. Pictures may be of any shape that holds a crop.
        split: "train": random part, flips and quarter turns, in an order drawn anew for each epoch. "val": the centre,
            in the folder's order; a folder without held-out crops gives its training crops instead.
        crop_size: side of the crops.

    Attributes:
        files: the pictures. `names`: the same relative to `folder`. `captions`: one for each, or None.
        fingerprint: a hash of names and file sizes; two datasets with the same one give the same samples.

    Raises:
        ValueError: no such folder, no pictures, a file that is no picture, or one smaller than the crop; named.
    """

    def __init__(self, folder: str | Path, split: str, crop_size: int) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
        if crop_size < 1:
            raise ValueError(f"crop_size must be positive; got {crop_size}")
        self.folder, self.split, self.crop_size = Path(folder), split, crop_size
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is not a folder; make one of crops with: python -m gdpo.prepare")
        sized: list[tuple[str, tuple[int, int] | None]] = _from_manifest(self.folder, split) or [
            (name, None) for name in _listed(self.folder, split)
        ]
        if not sized:
            raise ValueError(f"{folder} holds no pictures ({' '.join(SUFFIXES)})")
        self.names = [name for name, _ in sized]
        self.files = [self.folder / name for name in self.names]
        digest = hashlib.blake2b(digest_size=16)
        for file, (name, size) in zip(self.files, sized):
            if not file.is_file():
                raise ValueError(f"{file} is missing, though the folder's manifest lists it; run gdpo.prepare again")
            width, height = size or _header_size(file)
            if min(width, height) < crop_size:
                raise ValueError(f"{file} is {width}x{height}, smaller than the crop size {crop_size}")
            digest.update(f"{name}\0{file.stat().st_size}\0".encode())
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
        return {k: v for k, v in self.__dict__.items() if k != "_order"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._order = functools.lru_cache(maxsize=2)(self._permutation)


def loader(dataset: CropDataset, sample_lists: Iterable[list[int]], seed: int, num_workers: int = 0) -> Iterator[Batch]:
    """Load one batch for each list of global sample numbers, ahead of time in `num_workers` processes.

    The batches do not depend on `num_workers`.
    """
    batches = DataLoader(
        _Samples(dataset, seed),
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

    def __init__(self, dataset: CropDataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, sample: int) -> dict | ImageError:
        index = self.dataset.index_of(sample, seed=self.seed)
        try:
            return self.dataset.item(index, seed=self.seed, sample=sample) | {"sample": sample}
        except ImageError as error:  # raised in a worker, it would come back as a page of its traceback
            return error


def _collate(samples: list[dict | ImageError]) -> Batch | ImageError:
    items = []
    for sample in samples:
        if isinstance(sample, ImageError):
            return sample
        items.append(sample)
    captions = None if items[0]["caption"] is None else [i["caption"] for i in items]
    return Batch(
        [i["name"] for i in items], captions, [i["sample"] for i in items], torch.stack([i["hr"] for i in items])
    )


def _leave_group(worker: int) -> None:
    """Ctrl-C and a launcher's SIGTERM go to the process group: the main process saves, then ends its workers itself."""
    os.setsid()


def natural(name: str) -> list:
    """A sort key by which crop9 comes before crop10; ties of case and zeros are broken by the name itself."""
    words = re.split(r"(\d+)", name)
    return [*((int(w), w) if w.isdigit() and w.isascii() else (0, w.lower()) for w in words), (0, name)]


def pictures(folder: Path) -> list[str]:
    """Names, relative to `folder`, of the pictures in it and below it, in natural order; hidden ones are left out."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    return sorted((n for n in names if not n.startswith(".") and "/." not in n), key=natural)


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


def _from_manifest(folder: Path, split: str) -> list[tuple[str, tuple[int, int] | None]]:
    """(name, size) of the crops of a split that `gdpo.prepare` made, or nothing where it did not make this folder."""
    if not (folder / "manifest.jsonl").is_file():
        return []
    rows = read_jsonl(folder / "manifest.jsonl", "file", "size")
    found: list[tuple[str, tuple[int, int] | None]] = [(str(r["file"]), (r["size"], r["size"])) for r in rows]
    return [row for row in found if row[0].startswith(f"{split}/")] or found


def _listed(folder: Path, split: str) -> list[str]:
    """Pictures below the subfolder of the split where there is one, else all."""
    names = pictures(folder)
    return [n for n in names if n.startswith(f"{split}/")] or names


def _header_size(path: Path) -> tuple[int, int]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about large pictures: their size is judged here
            with Image.open(path, formats=sorted(set(SUFFIXES.values()))) as image:
                width, height = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a picture that can be read ({error})") from None
    if width * height > MAX_PIXELS:
        raise ValueError(f"{path} is {width}x{height}; pictures of at most {MAX_PIXELS / 1e6:.0f} megapixels are read")
    return width, height


def _captions(folder: Path, names: list[str]) -> list[str] | None:
    path = folder / "captions.jsonl"
    if not path.is_file():
        return None
    captions = {str(row["file"]): str(row["caption"]) for row in read_jsonl(path, "file", "caption")}
    missing = [name for name in names if name not in captions]
    if missing:
        raise ValueError(f"{path} has no caption for {len(missing)} of {len(names)} pictures, the first {missing[0]}")
    return [captions[name] for name in names]
