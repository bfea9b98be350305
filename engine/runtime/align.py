"""From restored bands to the caller's samples: colours aligned, other factors than x4, 8 bit, gray kept gray.

Bands come from the top to the bottom, and each leaves as soon as all that it depends on is there. Only AdaIN, which
needs statistics of the whole picture, holds one (at 16 bit).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from engine.io.picture import to_8_bit
from engine.runtime import color as colors
from engine.runtime.resample import resize_bands, resize_window
from engine.runtime.restore import ROWS, Band


def finish(bands: Iterable[Band], rgb: np.ndarray, native: tuple[int, int], size: tuple[int, int], color: str):
    """Everything behind the model.

    Args:
        bands: restored rows, uint16 [n,W,3] of a picture of the size `native`.
        rgb: [H,W,3] uint8 or uint16, the input.
        native: (height, width) that the model makes.
        size: (height, width) of the result.
        color: one of color.METHODS.

    Yields:
        (first row, [n,w,3]) of the result, dtype as rgb; they are the caller's.
    """
    neutral = colors.is_neutral(rgb)
    aligned = align(bands, rgb, native, color)
    for first, rows in resize_bands(aligned, native, size) if size != native else aligned:
        if rgb.dtype == np.uint8:
            rows = to_8_bit(rows)
        yield first, colors.make_neutral(rows) if neutral else rows


def align(bands: Iterable[Band], rgb: np.ndarray, size: tuple[int, int], color: str) -> Iterator[Band]:
    """Give rows, uint16 [n,W,3] of a picture of `size`, the colours of the input."""
    if color == "adain":
        return _adain(bands, rgb, size)
    return _wavelet(bands, rgb, size) if color == "wavelet" else iter(bands)


def _adain(bands: Iterable[Band], rgb: np.ndarray, size: tuple[int, int]) -> Iterator[Band]:
    picture, result, target = np.empty((*size, 3), np.uint16), colors.Moments(), colors.Moments()
    for first, rows in bands:
        last = first + len(rows)
        picture[first:last] = rows
        result.add(rows.transpose(2, 0, 1))
        target.add(_upsampled(rgb, size, first, last))
    tables = colors.adain_tables(result, target)
    for first in range(0, size[0], ROWS):
        rows = picture[first : first + ROWS]
        yield first, np.stack([tables[c][rows[..., c]] for c in range(3)], axis=2)


def _wavelet(bands: Iterable[Band], rgb: np.ndarray, size: tuple[int, int]) -> Iterator[Band]:
    height, kept, top, done = size[0], np.empty((0, size[1], 3), np.uint16), 0, 0  # kept: rows from `top`
    for _, rows in bands:
        kept = np.concatenate([kept, rows])
        there = top + len(kept)
        ready = there if there == height else there - colors.HALO
        while done < ready:
            last = min(done + ROWS, ready)
            reach = max(done - colors.HALO, 0), min(last + colors.HALO, height)
            part, target = kept[reach[0] - top : reach[1] - top], _upsampled(rgb, size, *reach)
            aligned = colors.wavelet_band(part, target, (done - reach[0], last - reach[0]))
            colors.keep_flat(aligned, done, rgb)
            yield done, aligned
            done = last
        first = max(done - colors.HALO, 0)
        kept, top = kept[first - top :], first


def _upsampled(rgb: np.ndarray, size: tuple[int, int], first: int, last: int) -> np.ndarray:
    """Rows of the upsampled input, uint16 [3, rows, W]: what colours are aligned to."""
    unit = np.float32(colors.FULL / np.iinfo(rgb.dtype).max)
    window = resize_window(rgb, size, (first, last), (0, size[1])) * unit + np.float32(0.5)
    return np.clip(window, 0, colors.FULL).astype(np.uint16)
