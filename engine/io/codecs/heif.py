"""HEIC, through pillow-heif (an extra: libheif with its HEVC decoder)."""

from __future__ import annotations

from typing import Any, BinaryIO

import numpy as np

from engine.io import metadata
from engine.io.codecs import isobmff
from engine.io.libraries import common_metadata, split, unpremultiply
from engine.io.picture import Header, ImageError, Notice, Picture


def _open(file: Any) -> Any:
    """The primary image, undecoded; libheif turns it upright by itself."""
    try:
        import pillow_heif
    except ImportError:
        raise ImageError("HEIC needs pillow-heif; pip install 'gdpo-sr[formats]'") from None
    found = pillow_heif.open_heif(file, convert_hdr_to_8bit=False)
    return found[found.primary_index]


def header(file: BinaryIO) -> Header:
    image = _open(file)
    return Header(*image.size)


def read(data: bytes, known: Header, notice: Notice) -> Picture:
    image = _open(data)
    samples = np.asarray(image)
    samples = samples[..., None] if samples.ndim == 2 else samples
    if samples.dtype == np.uint16:
        samples = isobmff.full_range(samples, image.info.get("bit_depth", 16))
    pixels, gray, alpha = split(samples)
    if alpha is not None and getattr(image, "premultiplied_alpha", False):
        pixels = unpremultiply(pixels, alpha)
    info = dict(image.info)
    found = common_metadata(info)
    found["exif"] = metadata.upright_exif(found["exif"])
    nclx = info.get("nclx_profile")
    if nclx and not found["icc"]:
        found["color_tags"] = isobmff.cicp(nclx["color_primaries"], nclx["transfer_characteristics"])
    return Picture(pixels, gray, alpha, "HEIC", **found)
