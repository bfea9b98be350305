"""WebP and AVIF, through Pillow. An AVIF of more than 8 bit is decoded by libvips."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from PIL import AvifImagePlugin, Image, WebPImagePlugin

from engine.io import metadata
from engine.io.bands import Bands
from engine.io.codecs import isobmff
from engine.io.libraries import common_metadata, open_pillow, pixels_of, samples_of, split, vips
from engine.io.picture import Header, Notice, Picture, first_frame, upright
from engine.io.sink import Sink

_PLUGINS: dict[str, Any] = {"WEBP": WebPImagePlugin.WebPImageFile, "AVIF": AvifImagePlugin.AvifImageFile}


def header(kind: str) -> Callable[[BinaryIO], Header]:
    def read_header(file: BinaryIO) -> Header:
        image = open_pillow(_PLUGINS[kind], file)
        found = common_metadata(image.info)
        # Pillow puts what an AVIF's own properties say into EXIF; its XMP decides nothing.
        xmp = found["xmp"] if kind == "WEBP" else None
        return Header(image.width, image.height, metadata.orientation_of(found["exif"], xmp))

    return read_header


def read(kind: str) -> Callable[[bytes, Header, Notice], Picture]:
    def read_pixels(data: bytes, known: Header, notice: Notice) -> Picture:
        image = open_pillow(_PLUGINS[kind], io.BytesIO(data))
        if (frames := getattr(image, "n_frames", 1)) > 1:
            notice(first_frame(kind, frames))
        found = common_metadata(image.info)
        if kind == "AVIF":
            found["color_tags"] = {} if found["icc"] else isobmff.color_tags(data)
            if (depth := isobmff.depth(data)) > 8:
                return _deep_avif(data, depth, known, found)
        image.load()
        pixels, gray, alpha = pixels_of(image)
        return Picture(pixels, gray, alpha, kind, **found)

    return read_pixels


def _deep_avif(data: bytes, depth: int, known: Header, found: dict[str, Any]) -> Picture:
    """10 and 12 bit. libvips turns the picture upright; it is turned back, so that it is turned once."""
    image = vips().Image.heifload_buffer(data, fail_on="error")
    samples = samples_of(image)
    if samples.dtype == np.uint16:
        samples = isobmff.full_range(samples, depth)
    pixels, gray, alpha = split(samples)
    back = {6: 8, 8: 6}.get(known.orientation, known.orientation)
    return upright(Picture(pixels, gray, alpha, "AVIF", **found), back)


def write(kind: str) -> Callable[[Sink, Bands, Picture, int, bool, Notice], None]:
    def write_pixels(sink: Sink, bands: Bands, picture: Picture, quality: int, lossless: bool, notice: Notice) -> None:
        options: dict[str, Any] = {"quality": quality, "icc_profile": picture.icc}
        if picture.exif:
            options["exif"] = b"Exif\0\0" + picture.exif
        if picture.xmp:
            options["xmp"] = picture.xmp
        if kind == "WEBP":
            options |= {"lossless": lossless, "method": 4, "exact": bands.shape[2] == 4}
        else:
            options |= {"subsampling": "4:4:4", "speed": 6}
        sink.write(_encoded(Image.fromarray(bands.array()), kind, options, notice).getbuffer())

    return write_pixels


def _encoded(image: Image.Image, kind: str, options: dict[str, Any], notice: Notice) -> io.BytesIO:
    """A file in memory. Pillow parses EXIF before it writes it, and raises nearly everything on a hostile block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            buffer = io.BytesIO()
            image.save(buffer, kind, **options)
        except Exception:
            if "exif" not in options:
                raise
            buffer = io.BytesIO()
            image.save(buffer, kind, **{key: value for key, value in options.items() if key != "exif"})
            notice("EXIF left out: it is damaged")
    return buffer
