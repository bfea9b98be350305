"""Calls to Pillow and libvips that all formats share."""

from __future__ import annotations

import os
import struct
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile

from engine.io.metadata import MAX_METADATA
from engine.io.picture import ImageError


def open_pillow(plugin: type[ImageFile.ImageFile], file: BinaryIO) -> Any:
    """Open by one decoder itself: Image.open has a limit of pixels of its own, which is not the caller's.

    Raises:
        ImageError: the header is damaged.
    """
    try:
        return plugin(file, "")  # type: ignore[arg-type]
    except (SyntaxError, IndexError, TypeError, KeyError, OverflowError, struct.error):
        raise ImageError(f"damaged or truncated {plugin.format} header") from None


def pixels_of(image: Image.Image) -> tuple[np.ndarray, bool, np.ndarray | None]:
    """Decoded 8-bit pixels as (pixels [H,W,3], gray, alpha [H,W] or None).

    Raises:
        ImageError: pixels of another kind, such as floating point.
    """
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr"):
        raise ImageError(f"pixels of the kind {image.mode!r} are not read; convert the picture to 8-bit RGB")
    gray, alpha = image.mode in ("1", "L", "LA"), None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB")), gray, alpha


def common_metadata(info: dict[Any, Any]) -> dict[str, Any]:
    """What Pillow found of EXIF, XMP, profile and resolution. Oversized blocks are left behind, not an error."""
    exif, xmp, icc, dpi = (info.get(key) for key in ("exif", "xmp", "icc_profile", "dpi"))
    exif = exif.removeprefix(b"Exif\0\0") if isinstance(exif, bytes) else None
    xmp = xmp.encode() if isinstance(xmp, str) else xmp
    return {
        "exif": exif if exif and len(exif) <= MAX_METADATA else None,
        "xmp": xmp if isinstance(xmp, bytes) and 0 < len(xmp) <= MAX_METADATA else None,
        "icc": icc if isinstance(icc, bytes) and icc else None,
        "dpi": sensible_dpi(dpi),
    }


def sensible_dpi(dpi: Any) -> tuple[float, float] | None:
    """A resolution as two numbers, or None where it is none."""
    try:
        horizontal, vertical = float(dpi[0]), float(dpi[1])
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        return None
    return (horizontal, vertical) if 0 < horizontal < 1e6 and 0 < vertical < 1e6 else None


def vips() -> Any:
    """libvips, on first use: it takes 60 ms to load and few pictures need it."""
    os.environ.setdefault("VIPS_WARNING", "0")  # its warnings go to stderr in lines of their own
    try:
        import pyvips
    except OSError as error:  # it names the system's library, which it looks for last
        raise ImageError(f"libvips could not be loaded; is there enough memory? ({str(error)[:80]})") from None

    pyvips.cache_set_max(0)  # a cache of operations would grow over a long folder
    pyvips._remove_log_handler()  # it prints a traceback where a file's own words, in no encoding, are in a warning
    return pyvips


def samples_of(image: Any) -> np.ndarray:
    """A libvips image as [H,W,bands] uint8 or uint16."""
    return image.numpy().reshape(image.height, image.width, image.bands)


def vips_image(samples: np.ndarray) -> Any:
    """[H,W,1..4] uint8 or uint16 as a libvips image, without a copy."""
    kind, deep = ("ushort", True) if samples.dtype == np.uint16 else ("uchar", False)
    samples = np.ascontiguousarray(samples)
    height, width, bands = samples.shape
    image = vips().Image.new_from_memory(samples.data, width, height, bands, kind)
    names = ("grey16", "rgb16") if deep else ("b-w", "srgb")
    return image.copy(interpretation=names[bands > 2])


def split(samples: np.ndarray) -> tuple[np.ndarray, bool, np.ndarray | None]:
    """[H,W,1..4] -> (pixels [H,W,3], gray, alpha [H,W] or None)."""
    bands = samples.shape[2]
    alpha = np.ascontiguousarray(samples[..., -1]) if bands in (2, 4) else None
    pixels = np.repeat(samples[..., :1], 3, axis=2) if bands <= 2 else np.ascontiguousarray(samples[..., :3])
    return pixels, bands <= 2, alpha


def unpremultiply(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours that were stored multiplied by their opacity, divided by it."""
    full, out = np.iinfo(alpha.dtype).max, np.empty_like(pixels)
    for top in range(0, len(pixels), 256):
        rows = slice(top, top + 256)
        opacity = np.maximum(alpha[rows, :, None], 1).astype(np.float32) / full
        out[rows] = np.minimum(np.rint(pixels[rows] / opacity), full)
    return out
