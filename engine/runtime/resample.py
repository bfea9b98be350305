"""The project's one resampler: separable bicubic, a = -0.5, antialiased when it shrinks, edges renormalised.

It is what Pillow's BICUBIC does in mode "F" and torch's `bicubic, antialias=True`. The order of the float32 operations
is fixed (columns first, then rows, taps from the first to the last, each product and sum rounded), so that another
language can give the same bits, and so that any window of the result equals the same window of the whole.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import numpy as np

NAME = "bicubic a=-0.5 antialias"


@functools.lru_cache(maxsize=8)
def taps(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The filter that takes a line of `size` samples to `new_size`.

    Returns:
        first: int64 [new_size], the first sample each output reads.
        weights: float32 [new_size, T], normalised; taps beyond a line's end have weight 0.
    """
    if size < 1 or new_size < 1:
        raise ValueError(f"sizes must be at least 1; got {size} -> {new_size}")
    scale = size / new_size
    stretch = max(scale, 1.0)
    center = (np.arange(new_size) + 0.5) * scale
    first = np.maximum(np.floor(center - 2 * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum(np.floor(center + 2 * stretch + 0.5).astype(np.int64), size)
    position = first[:, None] + np.arange(int((last - first).max()))
    t = np.abs((position - center[:, None] + 0.5) / stretch)
    a = -0.5
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = (((t - 5) * t + 8) * t - 4) * a
    weights = np.where(t < 1, near, np.where(t < 2, far, 0.0)) * (position < last[:, None])
    total = functools.reduce(np.add, weights.T)  # from the first tap to the last; np.sum would pair them up
    return first, (weights / total[:, None]).astype(np.float32)


def reflect(index: np.ndarray, size: int) -> np.ndarray:
    """Fold indices beyond a line back into it, as between two mirrors: ... 1 0 | 0 1 2 ... n-1 | n-1 n-2 ..."""
    index = index % (2 * size)
    return np.minimum(index, 2 * size - 1 - index)


def _apply(planes: np.ndarray, first: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    """Filter one axis of [C,H,W] float32."""
    last = planes.shape[axis] - 1
    shape = (1, 1, -1) if axis == 2 else (1, -1, 1)
    total: np.ndarray | None = None
    for k in range(weights.shape[1]):
        # A tap past the end has weight 0: which sample it reads does not matter.
        part = np.take(planes, np.minimum(first + k, last), axis=axis)
        part *= weights[:, k].reshape(shape)
        total = part if total is None else np.add(total, part, out=total)
    assert total is not None  # a filter has taps
    return total


def resize_window(
    pixels: np.ndarray,
    size: tuple[int, int],
    rows: tuple[int, int],
    columns: tuple[int, int],
    *,
    part: tuple[int, int] | None = None,
) -> np.ndarray:
    """A window of the resized picture; beyond the picture it continues mirrored.

    Args:
        pixels: [H,W,C], any real dtype.
        size: (height, width) of the whole resized picture.
        rows, columns: half-open ranges of the window, within the resized picture or beyond it.
        part: (first row of `pixels`, height of the whole picture), where `pixels` are some of its rows only: those that
            the window reads.

    Returns:
        float32 [C, rows, columns] in the units of `pixels`, not clipped (a cubic overshoots).
    """
    start, height = part or (0, pixels.shape[0])
    y = reflect(np.arange(*rows), size[0])
    x = reflect(np.arange(*columns), size[1])
    first_y, weights_y = taps(height, size[0])
    first_x, weights_x = taps(pixels.shape[1], size[1])
    top, bottom = int(first_y[y].min()), min(int(first_y[y].max()) + weights_y.shape[1], height)
    left, right = int(first_x[x].min()), min(int(first_x[x].max()) + weights_x.shape[1], pixels.shape[1])
    planes = np.ascontiguousarray(pixels[top - start : bottom - start, left:right].transpose(2, 0, 1), np.float32)
    planes = _apply(planes, first_x[x] - left, weights_x[x], axis=2)
    return _apply(planes, first_y[y] - top, weights_y[y], axis=1)


def resize(pixels: np.ndarray, size: tuple[int, int], *, band: int = 256) -> np.ndarray:
    """Resize a picture [H,W,C] of uint8 or uint16 to (height, width), rounded to its dtype, in bands of rows."""
    limit = np.iinfo(pixels.dtype).max
    out = np.empty((*size, pixels.shape[2]), pixels.dtype)
    for top in range(0, size[0], band):
        rows = (top, min(top + band, size[0]))
        window = resize_window(pixels, size, rows, (0, size[1]))
        out[rows[0] : rows[1]] = np.clip(np.floor(window + np.float32(0.5)), 0, limit).transpose(1, 2, 0)
    return out


def resize_bands(
    bands: Iterable[tuple[int, np.ndarray]], old: tuple[int, int], size: tuple[int, int], *, most: int = 128
) -> Iterator[tuple[int, np.ndarray]]:
    """`resize` of a picture that comes in bands; the same values.

    Args:
        bands: (first row, [n,W,C] uint8 or uint16), from the top to the bottom.
        old: (height, width) of the picture.
        size: (height, width) of the result.
        most: rows read, and made, at a time.

    Yields:
        (first row, [n,w,C]).
    """
    first, weights = taps(old[0], size[0])
    ends = np.minimum(first + weights.shape[1], old[0])  # of the rows that each row of the result reads
    step = max(min(most, most * size[0] // old[0]), 1)
    kept: np.ndarray | None = None  # rows from `top`
    top = done = 0
    for _, rows in bands:
        kept = rows if kept is None else np.concatenate([kept, rows])
        limit = np.iinfo(kept.dtype).max
        ready = int(np.searchsorted(ends, top + len(kept), side="right"))
        while done < ready:
            last = min(done + step, ready)
            window = resize_window(kept, size, (done, last), (0, size[1]), part=(top, old[0]))
            yield done, np.clip(np.floor(window + np.float32(0.5)), 0, limit).astype(kept.dtype).transpose(1, 2, 0)
            done = last
        if done < size[0]:
            needed = min(max(int(first[done]), top), top + len(kept))
            kept, top = kept[needed - top :], needed
