"""A whole picture through the model: colours, transparency and grayness.

Nothing under transparent pixels may show. Before the model their colours are replaced by those of the visible pixels
around them, so that what was stored there has no influence at all; the mask goes through the model as a gray picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import ImageColor

from engine.io.metadata import scaled_panorama
from engine.io.picture import Picture, to_8_bit
from engine.io.profiles import as_srgb
from engine.runtime.color import Moments, adain_tables
from engine.runtime.resample import resize
from engine.runtime.upscaler import Upscaler

Progress = Callable[[int, int], None]
_FAINT = 1 / 16  # below this opacity a colour is mixed with its surroundings: premultiplied files store it coarsely
_ROWS = 256  # handled at a time


def upscale_picture(
    up: Upscaler, picture: Picture, *, background: str | None = None, progress: Progress | None = None, **options: Any
) -> Picture:
    """Upscale colours and mask.

    Args:
        up: a loaded model.
        picture: as `read_image` gives it.
        background: a colour (see `parse_background`) on which transparency is flattened; None keeps it.
        progress: called with (tiles done, tiles in all), both passes together; what it raises cancels.
        options: of `Upscaler.upscale`: seed, tile, scale, color, batch.

    Returns:
        The picture at its new size. A gray picture, also one stored as RGB, is neutral in every pixel.

    Raises:
        ValueError: an argument is not what it should be; the message names it.
        FloatingPointError: the model gave a value that is not finite.
    """
    colour = parse_background(background) if background is not None else None
    passes = 1 if picture.alpha is None else 2
    pixels = picture.pixels if picture.alpha is None else fill_hidden(picture.pixels, picture.alpha)
    if picture.alpha is not None and options.get("color") == "adain":
        result = _adain_of_visible(up, pixels, picture.alpha, _part(progress, 0, passes), options)
    else:
        result = up.upscale(pixels, progress=_part(progress, 0, passes), **options)
    alpha = None
    if picture.alpha is not None:
        alpha = _upscale_mask(up, picture.alpha, _part(progress, 1, passes), options)
    xmp = picture.xmp and scaled_panorama(picture.xmp, picture.pixels.shape[:2], result.shape[:2])
    done = replace(picture, pixels=result, alpha=alpha, xmp=xmp)
    return done if colour is None else flatten(done, colour)


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
    weight = np.minimum(alpha.astype(np.float32) / (np.iinfo(alpha.dtype).max * _FAINT), 1)
    out = np.empty_like(pixels)
    for channel in range(3):
        out[..., channel] = np.rint(_push_pull(pixels[..., channel].astype(np.float32), weight))
    return out


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
    up: Upscaler, pixels: np.ndarray, alpha: np.ndarray, progress: Progress | None, options: dict[str, Any]
) -> np.ndarray:
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
    if made.count:
        tables = adain_tables(made, wanted)
        for band in bands:
            result[band] = np.stack([tables[c][result[band][..., c]] for c in range(3)], axis=2)
    return result if pixels.dtype == np.uint16 else to_8_bit(result)


def _upscale_mask(up: Upscaler, alpha: np.ndarray, progress: Progress | None, options: dict[str, Any]) -> np.ndarray:
    """The mask as a gray picture through the model, within the limits of its surroundings: flat areas stay exact."""
    result = up.upscale(np.repeat(alpha[..., None], 3, axis=2), progress=progress, **(options | {"color": "wavelet"}))
    height, width = result.shape[:2]
    least, most = _extremes(alpha)
    rows = np.arange(height) * alpha.shape[0] // height
    columns = np.arange(width) * alpha.shape[1] // width
    out = np.empty((height, width), alpha.dtype)
    for top in range(0, height, _ROWS):
        band = slice(top, top + _ROWS)
        at = np.ix_(rows[band], columns)
        out[band] = np.clip(result[band, :, 0], least[at], most[at])
    return out


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
