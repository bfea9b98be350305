"""Pictures whose opposite edges meet: textures that are laid side by side, and panoramas of 360 degrees.

The picture is continued beyond its edges by its own other side, upscaled, and cropped. What lies on both sides of a
seam was computed twice then, from the same pixels but other noise; the two are cross-faded, so that the edges meet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from engine.io.images import Picture
from engine.runtime.resample import taps

MARGIN = 32  # input pixels: more than the overlap of two tiles
_FADE = 8  # input pixels


def upscale_wrapped(
    picture: Picture, upscale: Callable[[Picture], Picture], scale: int, size: tuple[int, int], *, vertical: bool
) -> Picture:
    """Upscale a picture whose left and right edges meet, and with `vertical` also the upper and the lower one.

    Args:
        picture: the input, H x W.
        upscale: makes a picture `scale` times as large.
        scale: the model's own factor.
        size: height and width of the result; other sizes than scale * H x scale * W are resized, around the edges too.
    """
    axes = (0, 1) if vertical else (1,)
    height, width = picture.pixels.shape[:2]
    margin = MARGIN
    large = upscale(_each(picture, lambda a: np.pad(a, _around(a, axes, margin), mode="wrap")))
    for axis in axes:
        side = (height, width)[axis]
        close = functools.partial(_close, axis=axis, side=side * scale, margin=margin * scale, scale=scale)
        large = _each(large, close)
    if size != (height * scale, width * scale):
        large = _each(large, lambda a: resize_wrapped(a, size, axes))
    return large


def _each(picture: Picture, change: Callable[[np.ndarray], np.ndarray]) -> Picture:
    """Change the colours and, where there is one, the mask."""
    alpha = None if picture.alpha is None else np.ascontiguousarray(change(picture.alpha))
    return replace(picture, pixels=np.ascontiguousarray(change(picture.pixels)), alpha=alpha)


def _around(a: np.ndarray, axes: tuple[int, ...], margin: int) -> list[tuple[int, int]]:
    return [(margin, margin) if axis in axes else (0, 0) for axis in range(a.ndim)]


def _close(a: np.ndarray, axis: int, side: int, margin: int, scale: int) -> np.ndarray:
    """Crop one axis to `side`, the last samples before the seam faded into what was computed on its other side."""
    a = np.moveaxis(a, axis, 0)
    inner = a[margin : margin + side].copy()
    fade = min(_FADE * scale, side, margin)
    share = ((np.arange(fade) + 0.5) / fade).reshape(-1, *[1] * (a.ndim - 1)).astype(np.float32)
    share = share * share * (3 - 2 * share)
    beyond = a[margin - fade : margin]
    inner[side - fade :] = np.rint(inner[side - fade :] * (1 - share) + beyond * share).astype(a.dtype)
    return np.moveaxis(inner, 0, axis)


def resize_wrapped(a: np.ndarray, size: tuple[int, int], axes: tuple[int, ...]) -> np.ndarray:
    """Resize [H,W] or [H,W,C] of uint8 or uint16; the filter reads around the edges of the axes that wrap."""
    limit = np.iinfo(a.dtype).max
    for axis in (1, 0):
        old, new = a.shape[axis], size[axis]
        if old == new:
            continue
        if axis in axes:  # the middle of three copies in a row sees a neighbour on both sides
            first, weights = (part[new : 2 * new] for part in taps(3 * old, 3 * new))
            read = (first[:, None] + np.arange(weights.shape[1])) % old
        else:
            first, weights = taps(old, new)
            read = np.minimum(first[:, None] + np.arange(weights.shape[1]), old - 1)
        lines = np.moveaxis(a, axis, 0)
        out = np.empty((new, *lines.shape[1:]), a.dtype)
        for k in range(0, new, 256):  # in bands, in bounded memory
            total = np.zeros((len(read[k : k + 256]), *lines.shape[1:]), np.float32)
            for tap in range(weights.shape[1]):
                weight = weights[k : k + 256, tap].reshape(-1, *[1] * (lines.ndim - 1))
                total += lines[read[k : k + 256, tap]] * weight
            out[k : k + 256] = np.clip(np.floor(total + np.float32(0.5)), 0, limit)
        a = np.moveaxis(out, 0, axis)
    return a
