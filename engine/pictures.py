"""A whole picture through the model: colours, transparency and grayness.

Nothing under transparent pixels may show. Before the model their colours are replaced by those of the visible pixels
around them, so that what was stored there has no influence at all; the mask goes through the model as a gray picture.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import ImageColor

from engine.io.images import Put
from engine.io.metadata import scaled_panorama
from engine.io.picture import Picture, to_8_bit
from engine.io.profiles import as_srgb
from engine.runtime.color import Moments, adain_tables
from engine.runtime.resample import resize
from engine.runtime.restore import Progress
from engine.runtime.upscaler import MAX_OUTPUT_PIXELS, Sink, Upscaler, output_size

_FAINT = 1 / 16  # below this opacity a colour is mixed with its surroundings: premultiplied files store it coarsely
_ROWS = 256  # handled at a time


def upscale_picture(
    up: Upscaler, picture: Picture, *, background: str | None = None, progress: Progress | None = None, **options: Any
) -> Picture:
    """Upscale colours and mask to a picture in memory. Arguments and errors: see `upscale_rows`."""
    limit = options.get("max_pixels", MAX_OUTPUT_PIXELS)
    height, width = picture.pixels.shape[:2]
    size = output_size(height, width, options.get("scale", 4.0), limit)
    like = outcome(picture, size, background)
    pixels = np.empty((*size, 3), like.pixels.dtype)
    alpha = None if like.alpha is None else np.empty(size, like.alpha.dtype)
    done = 0

    def put(rows: np.ndarray, mask: np.ndarray | None) -> None:
        nonlocal done
        pixels[done : done + len(rows)] = rows
        if alpha is not None:
            alpha[done : done + len(rows)] = mask
        done += len(rows)

    upscale_rows(up, picture, put, background=background, progress=progress, **options)
    return replace(like, pixels=pixels, alpha=alpha)


def outcome(picture: Picture, size: tuple[int, int], background: str | None = None) -> Picture:
    """What becomes of a picture upscaled to (height, width), but for its pixels, which are still the input's.

    Raises:
        ImageError: its profile cannot be used, and has to be.
    """
    xmp = picture.xmp and scaled_panorama(picture.xmp, picture.pixels.shape[:2], size)
    picture = replace(picture, xmp=xmp)
    return picture if background is None else flatten(picture, parse_background(background))


def upscale_rows(
    up: Upscaler,
    picture: Picture,
    put: Put,
    *,
    background: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> None:
    """Upscale colours and mask, row by row: nothing is in memory whole but the input (and, with AdaIN, the result).

    Args:
        up: a loaded model.
        picture: as `read_image` gives it.
        put: takes rows [n,W,3] and, where `outcome` has transparency, their mask [n,W], from the top to the bottom; it
            may keep neither. A gray picture, also one stored as RGB, is neutral in every pixel.
        background: a colour (see `parse_background`) on which transparency is flattened; None keeps it.
        progress: called with (tiles done, tiles in all), both passes together; what it raises cancels.
        options: of `Upscaler.upscale`: seed, tile, scale, color, batch, max_pixels.

    Raises:
        ValueError: an argument is not what it should be; the message names it.
        FloatingPointError: the model gave a value that is not finite.
    """
    colour = parse_background(background) if background is not None else None
    if picture.alpha is None:
        up.upscale(picture.pixels, progress=progress, sink=lambda first, rows: put(rows, None), **options)
        return
    mask = _PackedRows()
    _upscale_mask(up, picture.alpha, mask.put, _part(progress, 0, 2), options)

    def masked(first: int, rows: np.ndarray) -> None:
        alpha = mask.take(len(rows))
        if colour is None:
            put(rows, alpha)
        else:
            put(flatten(replace(picture, pixels=rows, alpha=alpha), colour).pixels, None)

    pixels = fill_hidden(picture.pixels, picture.alpha)
    if options.get("color") == "adain":
        _adain_of_visible(up, pixels, picture.alpha, masked, _part(progress, 1, 2), options)
    else:
        up.upscale(pixels, progress=_part(progress, 1, 2), sink=masked, **options)


class _PackedRows:
    """A mask that waits for its colours. Most of a mask is of one value, so that it takes little memory packed."""

    def __init__(self) -> None:
        self._packed: deque[tuple[tuple[int, ...], np.dtype, bytes]] = deque()
        self._rows: np.ndarray | None = None

    def put(self, rows: np.ndarray) -> None:
        self._packed.append((rows.shape, rows.dtype, zlib.compress(rows.tobytes(), 1)))

    def take(self, count: int) -> np.ndarray:
        """The next rows that were put and not taken yet."""
        rows = self._rows
        while rows is None or len(rows) < count:
            shape, dtype, packed = self._packed.popleft()
            more = np.frombuffer(zlib.decompress(packed), dtype).reshape(shape)
            rows = more if rows is None else np.concatenate([rows, more])
        self._rows = rows[count:]
        return rows[:count]


def parse_background(text: str) -> tuple[int, int, int]:
    """A colour of 8 bit from its name or its digits: white, #fff, #ffffff, rgb(255, 255, 255).

    Raises:
        ValueError: this is no opaque colour.
    """
    try:
        red, green, blue = ImageColor.getcolor(text, "RGB")  # type: ignore[misc]
    except (ValueError, TypeError):
        raise ValueError(f"background must be a colour such as white, black or #20a0ff; got {text!r}") from None
    return red, green, blue


def flatten(picture: Picture, colour: tuple[int, int, int]) -> Picture:
    """Put a picture on a background of one colour (8 bit, in the picture's own colour space)."""
    if picture.alpha is None:
        return picture
    coloured = len(set(colour)) > 1
    picture = as_srgb(picture) if picture.gray and coloured else picture  # its profile may be one for gray
    assert picture.alpha is not None
    full = np.iinfo(picture.pixels.dtype).max
    ground = np.array(colour, np.float32) * (full / 255)
    pixels = np.empty_like(picture.pixels)
    for top in range(0, len(pixels), _ROWS):
        rows = slice(top, top + _ROWS)
        opacity = picture.alpha[rows, :, None].astype(np.float32) / full
        pixels[rows] = np.rint(picture.pixels[rows] * opacity + ground * (1 - opacity))
    return replace(picture, pixels=pixels, alpha=None, gray=picture.gray and not coloured)


def fill_hidden(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Replace colours that cannot be seen by those of the visible pixels around them.

    This is the "push-pull" of Gortler et al. (The Lumigraph, 1996).

    Args:
        pixels: [H,W,3] uint8 or uint16, not premultiplied.
        alpha: [H,W], dtype as pixels.

    Returns:
        [H,W,3]: equal to pixels wherever the opacity is 1/16 or more, free of what stood where it is 0.
    """
    height, width = alpha.shape
    # The first step down and the last step up are done in bands: nothing of the picture's size is in floating point.
    bands = [slice(top, min(top + _ROWS, height)) for top in range(0, height, _ROWS)]
    small = [slice(band.start // 2, (band.stop + 1) // 2) for band in bands]
    total = np.empty(((height + 1) // 2, (width + 1) // 2), np.float32)
    for band, rows in zip(bands, small):
        total[rows] = _sum_of_four(_visibility(alpha[band]))
    out, mean, share = np.empty_like(pixels), np.empty_like(total), np.minimum(total, 1)
    for channel in range(3):
        for band, rows in zip(bands, small):
            seen = pixels[band, :, channel] * _visibility(alpha[band])
            mean[rows] = _sum_of_four(seen) / np.maximum(total[rows], np.float32(1e-6))
        around = _push_pull(mean, share)
        for band, rows in zip(bands, small):
            start = max(rows.start - 1, 0)  # bilinear: a row more on both sides
            wide = _doubled(around[start : rows.stop + 1])[2 * (rows.start - start) :, :width]
            weight = _visibility(alpha[band])
            mixed = pixels[band, :, channel] * weight + wide[: len(weight)] * (1 - weight)
            out[band, :, channel] = np.rint(mixed)
    return out


def _visibility(alpha: np.ndarray) -> np.ndarray:
    """float32 in [0,1]: 1 from an opacity of 1/16 on."""
    return np.minimum(alpha.astype(np.float32) / (np.iinfo(alpha.dtype).max * _FAINT), 1)


def _push_pull(plane: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """[H,W]: plane where weight is 1; elsewhere mixed with the weighted mean of ever wider surroundings."""
    if weight.min() >= 1:
        return plane
    if plane.size == 1:
        return plane * weight
    total = _sum_of_four(weight)
    mean = _sum_of_four(plane * weight) / np.maximum(total, np.float32(1e-6))
    wide = _doubled(_push_pull(mean, np.minimum(total, 1)))[: plane.shape[0], : plane.shape[1]]
    return plane * weight + wide * (1 - weight)


def _sum_of_four(plane: np.ndarray) -> np.ndarray:
    """Sums of 2x2 pixels; those beyond an odd edge count as 0."""
    padded = np.pad(plane, [(0, side % 2) for side in plane.shape])
    rows = padded[0::2] + padded[1::2]
    return rows[:, 0::2] + rows[:, 1::2]


def _doubled(plane: np.ndarray) -> np.ndarray:
    """Bilinear enlargement by two."""
    for _ in range(2):  # rows, then, transposed, columns
        padded = np.pad(plane, ((1, 1), (0, 0)), "edge")
        out = np.repeat(plane * np.float32(0.75), 2, axis=0)
        out[0::2] += padded[:-2] * np.float32(0.25)
        out[1::2] += padded[2:] * np.float32(0.25)
        plane = out.T
    return plane


def _adain_of_visible(
    up: Upscaler,
    pixels: np.ndarray,
    alpha: np.ndarray,
    sink: Sink,
    progress: Progress | None,
    options: dict[str, Any],
) -> None:
    """AdaIN whose statistics leave out the pixels that cannot be seen."""
    deep = pixels if pixels.dtype == np.uint16 else pixels * np.uint16(257)
    result = up.upscale(deep, progress=progress, **(options | {"color": "none"}))
    height, width = result.shape[:2]
    target, made, wanted = resize(deep, (height, width)), Moments(), Moments()
    columns = np.arange(width) * alpha.shape[1] // width
    bands = [slice(top, min(top + _ROWS, height)) for top in range(0, height, _ROWS)]
    for band in bands:
        rows = np.arange(band.start, band.stop) * alpha.shape[0] // height
        seen = alpha[np.ix_(rows, columns)] > 0
        for moments, samples in ((made, result), (wanted, target)):
            moments.add(samples[band][seen].T[:, None])
    tables = adain_tables(made, wanted) if made.count else None
    for band in bands:
        part = result[band]
        if tables is not None:
            part = np.stack([tables[c][part[..., c]] for c in range(3)], axis=2)
        sink(band.start, part if pixels.dtype == np.uint16 else to_8_bit(part))


def _upscale_mask(
    up: Upscaler,
    alpha: np.ndarray,
    put: Callable[[np.ndarray], object],
    progress: Progress | None,
    options: dict[str, Any],
) -> None:
    """The mask as a gray picture through the model, within the limits of its surroundings: flat areas stay exact."""
    limit = options.get("max_pixels", MAX_OUTPUT_PIXELS)
    height, width = output_size(alpha.shape[0], alpha.shape[1], options.get("scale", 4.0), limit)
    columns = np.arange(width) * alpha.shape[1] // width

    def clip(first: int, rows: np.ndarray) -> None:
        source = np.arange(first, first + len(rows)) * alpha.shape[0] // height
        start = max(source[0] - 1, 0)
        least, most = _extremes(alpha[start : source[-1] + 2])
        at = np.ix_(source - start, columns)
        put(np.clip(rows[..., 0], least[at], most[at]))

    gray = np.repeat(alpha[..., None], 3, axis=2)
    up.upscale(gray, progress=progress, sink=clip, **(options | {"color": "wavelet"}))


def _extremes(plane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest value of the 3x3 pixels around each."""
    least = most = plane
    for axis in (0, 1):
        width = [(0, 0), (0, 0)]
        width[axis] = (1, 1)
        low, high = np.pad(least, width, "edge"), np.pad(most, width, "edge")
        size = plane.shape[axis]
        parts = [np.arange(start, start + size) for start in range(3)]
        least = np.minimum.reduce([low.take(part, axis) for part in parts])
        most = np.maximum.reduce([high.take(part, axis) for part in parts])
    return least, most


def _part(progress: Progress | None, index: int, passes: int) -> Progress | None:
    """Progress of one of several passes of equal length, as that of the whole."""
    if progress is None:
        return None
    return lambda done, total: progress(index * total + done, passes * total)
