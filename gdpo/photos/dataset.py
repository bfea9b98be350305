"""HR crops for training: which picture, which part of it and which way up are pure functions of (seed, sample).

A sample is a GLOBAL number: 0, 1, 2, ... over the whole run. How the numbers are spread over processes, micro-batches
and workers changes nothing about what each of them sees, and a resumed run continues with the next number.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from engine.io.images import ImageError, Picture
from engine.io.profiles import to_srgb_unless_it_is
from gdpo.photos.pairs import magnification, open_pairs
from gdpo.photos.store import Found, Store
from gdpo.photos.stores import hr_alone, open_store
from gdpo.randomness import generator_for

SPLITS = ("train", "val")


class Batch(NamedTuple):
    """What the loader yields.

    Attributes:
        names: of the pictures.
        captions: of the pictures, or None.
        samples: global numbers.
        hr: [B,3,crop,crop] in [0,1], sRGB.
        skipped: a line for each picture that could not be read and was replaced.
        real: position in the batch -> the pair's LR [3,crop,crop] in [0,1], upsampled as inference does it; the others
            are to be degraded.
    """

    names: list[str]
    captions: list[str] | None
    samples: list[int]
    hr: Tensor
    skipped: tuple[str, ...] = ()
    real: dict[int, Tensor] = {}  # noqa: RUF012  # never written to


class CropDataset:
    """Square crops from pictures, or from real pairs of LR and HR pictures.

    Args:
        folder: made by `python -m gdpo.prepare` (train/, val/, manifest.jsonl), or any folder of pictures, searched
            recursively, links followed, in natural order; a list file, shards or a dataset on disk (`open_store`).
            Pictures may be of any shape that holds a crop.
        split: "train": random part, flips and quarter turns, in an order drawn anew for each epoch. "val": the centre,
            in the folder's order; a folder without held-out crops gives its training crops instead.
        crop_size: side of the crops.
        lr: where the LR pictures lie (`open_pairs`); None: there are none, the HR is to be degraded.
        skip_small: leave out pictures smaller than the crop.
        skip_broken: leave out files that are no pictures, and pictures without partner.
        captions: read the captions, of which each picture must then have one.
        progress: show a bar while many headers are read.

    Attributes:
        names: of the pictures, relative to `folder`. `captions`: one for each; None where there are none, or unread.
        fingerprint: a hash of names and file sizes; two datasets with the same one give the same samples.
        notes: what was left out, a line each.

    Raises:
        ValueError: no such folder, no pictures, files that are no pictures, or pictures smaller than the crop; counted,
            and the first one named. LR pictures beside HR ones. Pairs that are none.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        crop_size: int,
        *,
        lr: str | Path | None = None,
        skip_small: bool = False,
        skip_broken: bool = False,
        captions: bool = True,
        progress: bool = True,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
        if crop_size < 1:
            raise ValueError(f"crop_size must be positive; got {crop_size}")
        self.folder, self.split, self.crop_size, self._captioned = Path(folder), split, crop_size, captions
        self._lr: Store | None = None
        if lr is None:
            self._store = open_store(folder, skip_broken=skip_broken, progress=progress)
            self._found = hr_alone(self._store)
            self.notes = self._store.notes
        else:
            pairs = open_pairs(str(lr), str(folder), skip_broken=skip_broken, progress=progress)
            self._store, self._lr, self._found, self.notes = pairs
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
            what = "file" if self._lr is None else "pair"
            more = f", and {len(unreadable) - 1} more such {what}(s)" if len(unreadable) > 1 else ""
            if not skip_broken or len(unreadable) == len(found):
                raise ValueError(f"{unreadable[0]}{more}; take such {what}s away, or --data.on_error skip")
            self.notes.append(f"left out: {unreadable[0]}{more}")
        sized = [(picture, picture.size) for picture in found if not isinstance(picture.size, str)]
        small = [(picture, size) for picture, size in sized if min(size) < side]
        if small:
            picture, (width, height) = small[0]
            line = f"{self._store.label(picture)} is {width}x{height}, smaller than the crop size {side}"
            line += f", as are {len(small) - 1} more of {len(sized)} pictures" if len(small) > 1 else ""
            if not skip_small or len(small) == len(sized):
                remedy = "" if skip_small else "; to leave them out: --data.skip_small true"
                raise ValueError(f"{line}{remedy}")
            self.notes.append(f"left out: {line}")
        self._kept = [picture for picture, size in sized if min(size) >= side]
        self._check_scales()
        digest = hashlib.blake2b(self._store.identity.encode(), digest_size=16)
        for picture in self._kept:
            digest.update(f"{picture.name}\0{picture.bytes}\0".encode("utf-8", "surrogateescape"))
            if partner := picture.partner:
                digest.update(f"{partner.name}\0{partner.bytes}\0".encode("utf-8", "surrogateescape"))
        self.fingerprint = digest.hexdigest()
        self.captions = _captions(self._store, self.names) if self._captioned else None
        self._order = functools.lru_cache(maxsize=2)(self._permutation)

    def _check_scales(self) -> None:
        """A crop must start and end at a pixel of the LR."""
        for picture in self._kept if self._lr is not None else ():
            assert picture.partner is not None  # of every pair
            scale = picture.size[0] // picture.partner.size[0]  # type: ignore[operator]
            if self.crop_size % scale:
                raise ValueError(
                    f"crop_size must be a multiple of {scale}: {self._store.label(picture)} is {scale} times as large "
                    f"as its LR; got {self.crop_size}"
                )

    @property
    def names(self) -> list[str]:
        """Of the pictures, in order."""
        return [picture.name for picture in self._kept]

    def __len__(self) -> int:
        return len(self._kept)

    def index_of(self, sample: int, *, seed: int) -> int:
        """Which picture a global sample number shows; each picture once an epoch."""
        epoch, position = divmod(sample, len(self))
        return int(self._order(seed, epoch)[position]) if self.split == "train" else position

    def _permutation(self, seed: int, epoch: int) -> Tensor:
        return torch.randperm(len(self), generator=generator_for(seed, "order", epoch))

    def part_of(self, sample: int) -> tuple[CropDataset, int]:
        """The dataset that a sample comes from, and the sample's number there (see `Mixture`)."""
        return self, sample

    def spread(self, count: int) -> list[int]:
        """At most `count` samples of the val split, spread over it."""
        count = min(count, len(self))
        return [i * len(self) // count for i in range(count)]

    def item(self, index: int, *, seed: int, sample: int) -> dict:
        """-> name, hr [3,crop,crop] float32 in [0,1], caption (or None), lr of the same shape (None where it is to be
        made). The part shown depends on (seed, sample).

        Raises:
            ImageError: the picture is damaged, or of colours that cannot become sRGB; the message names it.
        """
        found = self._kept[index]
        picture = self._store.read(found)
        partner, scale = self._partner(found, picture)
        crop = self.crop_size // scale  # all in pixels of the LR; without one, of the HR
        height, width = (side // scale - crop for side in picture.pixels.shape[:2])
        if min(height, width) < 0:
            raise ImageError(f"{self._store.label(found)}: smaller than the crop size {self.crop_size}")
        if self.split == "train":
            rng = generator_for(seed, "crop", sample)
            top, left, turns, flip = (int(torch.randint(n, (), generator=rng)) for n in (height + 1, width + 1, 4, 2))
        else:
            top, left, turns, flip = height // 2, width // 2, 0, 0
        try:
            hr = _window(picture, top * scale, left * scale, self.crop_size, turns, flip)
            lr = None if partner is None else _window(partner, top, left, crop, turns, flip)
        except ImageError as error:
            raise ImageError(f"{self._store.label(found)}: {error}") from error
        return {"name": found.name, "hr": hr, "caption": self.captions and self.captions[index], "lr": lr}

    def _partner(self, found: Found, picture: Picture) -> tuple[Picture | None, int]:
        """The LR of a pair, and how many times larger the HR is."""
        partner = found.partner
        if self._lr is None or partner is None:
            return None, 1
        small = self._lr.read(partner)
        scale = magnification(picture.pixels.shape[:2], small.pixels.shape[:2])
        if not scale or self.crop_size % scale:
            raise ImageError(
                f"{self._store.label(found)}: its size is not that of its LR, {self._lr.label(partner)}, magnified"
            )
        return small, scale

    def __getstate__(self) -> dict:  # workers that are not forked get a pickle; a cached method has none
        return {k: v for k, v in self.__dict__.items() if k not in ("_order", "_found")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._order = functools.lru_cache(maxsize=2)(self._permutation)


def _window(picture: Picture, top: int, left: int, side: int, turns: int, flip: int) -> Tensor:
    """A part of a picture, in sRGB -> [3,side,side] float32 in [0,1], turned and mirrored."""
    part = picture.pixels[top : top + side, left : left + side]
    if to_srgb := to_srgb_unless_it_is(picture):
        part = to_srgb(part)
    crop = np.rot90(part, turns)
    crop = np.ascontiguousarray((crop[:, ::-1] if flip else crop).transpose(2, 0, 1), dtype=np.float32)
    return torch.from_numpy(crop).div_(np.iinfo(part.dtype).max)


class Samples(Protocol):
    """What a loader takes samples from: a `CropDataset`, or several in a `Mixture`."""

    def part_of(self, sample: int) -> tuple[CropDataset, int]:
        """The dataset that a global sample number comes from, and its number there."""


_TRIES = 10  # pictures that a sample may take, one after the other, before the run ends all the same


def loader(
    dataset: Samples,
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

    def __init__(self, dataset: Samples, seed: int, on_error: str) -> None:
        self.dataset, self.seed, self.tries = dataset, seed, 1 if on_error == "stop" else _TRIES

    def __getitem__(self, sample: int) -> dict | ImageError:
        dataset, number = self.dataset.part_of(sample)
        index = dataset.index_of(number, seed=self.seed)
        skipped: list[str] = []
        for again in range(self.tries):
            try:
                item = dataset.item(index, seed=self.seed, sample=sample)
                return item | {"sample": sample, "skipped": skipped}
            except ImageError as error:
                failure = error
                skipped.append(str(error))
                draw = generator_for(self.seed, "instead", sample, again)
                index = int(torch.randint(len(dataset), (), generator=draw))
        return failure  # raised in a worker, it would come back as a page of its traceback


def _collate(samples: list[dict | ImageError]) -> Batch | ImageError:
    items = []
    for sample in samples:
        if isinstance(sample, ImageError):
            return sample
        items.append(sample)
    captions = None if any(i["caption"] is None for i in items) else [i["caption"] for i in items]
    skipped = tuple(line for i in items for line in i["skipped"])
    pictures = torch.stack([i["hr"] for i in items])
    real = {n: i["lr"] for n, i in enumerate(items) if i["lr"] is not None}
    return Batch([i["name"] for i in items], captions, [i["sample"] for i in items], pictures, skipped, real)


def _leave_group(worker: int) -> None:
    """Ctrl-C and a launcher's SIGTERM go to the process group: the main process saves, then ends its workers itself."""
    os.setsid()


def _captions(store: Store, names: list[str]) -> list[str] | None:
    captions = store.captions()
    if captions is None:
        return None
    missing = [name for name in names if name not in captions]
    if missing:
        raise ValueError(
            f"{store.captions_at} has no caption for {len(missing)} of {len(names)} pictures, the first {missing[0]}"
        )
    return [captions[name] for name in names]
