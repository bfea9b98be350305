"""From one photo to its crops: convert to 8-bit sRGB, halve, cut, measure texture, hash. Used by `gdpo.prepare`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from PIL import Image

from engine.io.images import Picture
from engine.io.profiles import to_srgb_unless_it_is
from gdpo.kernels import attribute_ratios
from gdpo.scores.luma import BT601

_LUMA = np.array(BT601, np.float32)
_BATCH = 32  # crops whose texture is measured at a time
_MAX_BANDS = 7  # of a distance; beyond, bands are so narrow that nearly all hashes agree in one
_BLOCK = 4096  # hashes that are compared with those kept before, and then with each other
_AT_ONCE = 1 << 22  # pairs


@dataclass(frozen=True)
class Crop:
    """A square part of a photo: top left corner in the halved photo, share of textured area, pixels [S,S,3] uint8."""

    y: int
    x: int
    texture: float
    pixels: np.ndarray


@dataclass
class Photo:
    """A photo as crops are cut from it.

    Attributes:
        pixels: [H,W,3] uint8, sRGB.
        opaque: [H,W] bool, or None where all of it is.
        converted: what was changed on the way, in words.
    """

    pixels: np.ndarray
    opaque: np.ndarray | None = None
    converted: list[str] = field(default_factory=list)


def convert(picture: Picture, halvings: int) -> Photo:
    """Any picture -> 8-bit sRGB, `halvings` times halved by area averaging (in its own bit depth; rounded once).

    Args:
        halvings: 0 to 4.

    Raises:
        ImageError: its colour profile cannot be used, or its colours are HDR.
    """
    converted = []
    opaque = None
    if picture.gray:
        converted.append("gray: three equal channels")
    if picture.pixels.dtype == np.uint16:
        converted.append("16 bit: rounded to 8")
    if picture.alpha is not None and (picture.alpha < np.iinfo(picture.alpha.dtype).max).any():
        converted.append("transparent parts: left out")
        opaque = _block_sums(picture.alpha[..., None] == np.iinfo(picture.alpha.dtype).max, halvings)[..., 0]
        opaque = opaque == 4**halvings
    full = int(np.iinfo(picture.pixels.dtype).max) * 4**halvings
    sums = _block_sums(picture.pixels, halvings).astype(np.float32)  # exact: below 2^24
    pixels = np.rint(sums * np.float32(255 / full)).astype(np.uint8)
    if to_srgb := to_srgb_unless_it_is(picture):
        converted.append("colour profile: to sRGB")
        pixels = to_srgb(pixels)
    return Photo(pixels, opaque, converted)


def _block_sums(pixels: np.ndarray, halvings: int) -> np.ndarray:
    """[H,W,C] -> [H >> n, W >> n, C] sums over blocks of 2^n (uint32 or as given), without what does not fill one."""
    side = 2**halvings
    if side == 1:
        return pixels
    height, width = pixels.shape[0] // side * side, pixels.shape[1] // side * side
    total = np.zeros((height // side, width // side, pixels.shape[2]), np.uint32)
    for dy in range(side):
        for dx in range(side):
            total += pixels[dy:height:side, dx:width:side]
    return total


def positions(length: int, size: int, stride: int) -> list[int]:
    """Starts of windows that cover `length` from end to end, evenly, at most `stride` apart; none if it is too short.

    >>> positions(1000, 256, 256)
    [0, 248, 496, 744]
    """
    if length < size:
        return []
    steps = math.ceil((length - size) / stride)
    return [i * (length - size) // max(steps, 1) for i in range(steps + 1)]


def cut(photo: Photo, size: int, stride: int, min_texture: float) -> tuple[list[Crop], int]:
    """All windows of a photo that are opaque and textured enough, row by row -> (crops, number of windows seen).

    Args:
        min_texture: least share of textured area (`gdpo.kernels.attribute_ratios`, 10x10 patches, threshold 50).
    """
    height, width = photo.pixels.shape[:2]
    windows = [(y, x) for y in positions(height, size, stride) for x in positions(width, size, stride)]
    found = []
    for start in range(0, len(windows), _BATCH):
        batch = windows[start : start + _BATCH]
        if photo.opaque is not None:
            batch = [(y, x) for y, x in batch if photo.opaque[y : y + size, x : x + size].all()]
        if not batch:
            continue
        pixels = [photo.pixels[y : y + size, x : x + size] for y, x in batch]
        gray = np.stack([p @ _LUMA for p in pixels]) / np.float32(255)
        _, texture, _ = attribute_ratios(torch.from_numpy(gray).clamp_(0, 1))
        kept = zip(batch, pixels, texture.double().round(decimals=2).tolist())
        found += [Crop(y, x, share, p) for (y, x), p, share in kept if share >= min_texture]
    return found, len(windows)


def difference_hash(pixels: np.ndarray) -> int:
    """dHash: is each cell of a 9x8 thumbnail darker than its right neighbour? 64 bits, alike for near-duplicates."""
    thumbnail = Image.fromarray(pixels).convert("L").resize((9, 8), Image.Resampling.BOX)
    cells = np.asarray(thumbnail).astype(np.int16)
    return int.from_bytes(np.packbits(cells[:, :-1] < cells[:, 1:]).tobytes(), "big")


def near_duplicates(hashes: list[int], distance: int) -> list[int]:
    """For each hash, the index of the first kept one within `distance` bits, or -1 where it is kept itself.

    Args:
        hashes: of 64 bits.
        distance: 0 finds equal hashes; negative finds none.
    """
    if distance < 0 or not hashes:
        return [-1] * len(hashes)
    everything, first, place = np.unique(np.array(hashes, np.uint64), return_index=True, return_inverse=True)
    order = np.argsort(first)  # distinct values as they come; equal ones share what becomes of the first of them
    values, first = everything[order], first[order]
    origin = np.full(len(values), -1)  # the position in `values` of the kept one that stands for each
    kept = np.zeros(0, np.int64)
    done = 0
    while done < len(values):
        block = np.arange(done, min(len(values), done + max(_BLOCK, len(kept) // 4)))
        done += len(block)
        best = np.full(len(block), len(values))
        for mine, theirs in _near_pairs(values[block], values[kept], distance):
            np.minimum.at(best, mine, kept[theirs])
        origin[block] = np.where(best < len(values), best, -1)
        fresh = block[origin[block] < 0]
        if not len(fresh):
            continue
        pairs = [(i[i < j], j[i < j]) for i, j in _near_pairs(values[fresh], values[fresh], distance)]
        i, j = (np.concatenate(side) for side in zip(*pairs))
        for earlier, later in zip(fresh[i[s := np.lexsort((i, j))]].tolist(), fresh[j[s]].tolist()):
            if origin[later] < 0 and origin[earlier] < 0:
                origin[later] = earlier
        kept = np.concatenate([kept, fresh[origin[fresh] < 0]])
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    of_value = rank[place]
    twin = np.where(origin[of_value] < 0, first[of_value], first[origin[of_value]])
    return np.where(twin == np.arange(len(hashes)), -1, twin).tolist()


def _near_pairs(a: np.ndarray, b: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Index arrays (i, j), a pair perhaps more than once, such that a[i] and b[j] differ in at most `distance` bits.

    Such hashes agree in one of distance + 1 bands of bits, so only those that do are compared.
    """
    edges = [64 * i // (distance + 1) for i in range(distance + 2)] if distance <= _MAX_BANDS else [0, 0]
    for low, high in pairwise(edges):
        band = np.uint64((1 << (high - low)) - 1)
        keys_a, keys_b = (x >> np.uint64(low) & band for x in (a, b))
        order = np.argsort(keys_b, kind="stable")
        keys_b, sorted_b = keys_b[order], b[order]
        start = np.searchsorted(keys_b, keys_a, "left")
        count = np.searchsorted(keys_b, keys_a, "right") - start
        ends = np.cumsum(count)
        from_ = 0
        while from_ < len(a):
            before = ends[from_ - 1] if from_ else 0
            to = max(from_ + 1, int(np.searchsorted(ends, before + _AT_ONCE, "right")))
            i = np.repeat(np.arange(from_, to), count[from_:to])
            j = np.arange(len(i)) + np.repeat(start[from_:to] - (ends - count)[from_:to] + before, count[from_:to])
            near = np.bitwise_count(a[i] ^ sorted_b[j]) <= distance
            yield i[near], order[j[near]]
            from_ = to
