"""BMP, GIF and PNM, read only. Pillow decodes all but PNM of 16 bit."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, PpmImagePlugin

from engine.io.codecs.libraries import common_metadata, open_pillow, pixels_of, split
from engine.io.picture import Header, ImageError, Notice, Picture

_PLUGINS: dict[str, Any] = {
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "PNM": PpmImagePlugin.PpmImageFile,
}
_SEPARATOR = rb"(?:\s|#[^\r\n]*[\r\n])+"
_PNM_START = re.compile(rb"P[1-6]" + (_SEPARATOR + rb"\d{1,10}") * 2 + rb"[\s#]")
_LONGEST_PNM_HEADER = 1 << 16  # Pillow reads comments byte by byte, megabytes of them for seconds
_PNM_HEADER = re.compile(rb"P([2356])" + (_SEPARATOR + rb"(\d{1,9})") * 3 + rb"\s")


def header(kind: str) -> Callable[[BinaryIO], Header]:
    def read_header(file: BinaryIO) -> Header:
        if kind == "PNM":
            if not _PNM_START.match(file.read(_LONGEST_PNM_HEADER)):
                raise ImageError("damaged PNM header")
            file.seek(0)
        image = open_pillow(_PLUGINS[kind], file)
        return Header(image.width, image.height)

    return read_header


def read(kind: str) -> Callable[[bytes, Header, Notice], Picture]:
    def read_pixels(data: bytes, known: Header, notice: Notice) -> Picture:
        if kind == "PNM" and (deep := _deep_pnm(data, known)):
            return deep
        image = open_pillow(_PLUGINS[kind], io.BytesIO(data))
        covered = image.tile[0][1] if kind == "GIF" and image.tile else (0, 0, *image.size)
        image.load()
        pixels, gray, alpha = pixels_of(image)
        if covered != (0, 0, *image.size):  # nothing was drawn on the rest of a GIF's canvas
            left, top, right, bottom = covered
            inner = np.full(pixels.shape[:2], 255, np.uint8) if alpha is None else alpha
            alpha = np.zeros_like(inner)
            alpha[top:bottom, left:right] = inner[top:bottom, left:right]
        found, text = common_metadata(image.info), {}
        if isinstance(comment := image.info.get("comment"), bytes) and comment.strip():
            text["Comment"] = comment.decode("utf-8", "replace")
        if kind == "GIF" and (frames := image.n_frames) > 1:
            notice(f"a GIF of {frames} frames; the first is read")
        return Picture(pixels, gray, alpha, kind, text=text, **found)

    return read_pixels


def _deep_pnm(data: bytes, known: Header) -> Picture | None:
    """PGM and PPM of more than 8 bit; None where it is another PNM."""
    found = _PNM_HEADER.match(data)
    if not found or int(found[4]) <= 255:
        return None
    most, bands, plain = int(found[4]), 1 if found[1] in b"25" else 3, found[1] in b"23"
    count = known.width * known.height * bands
    if (int(found[2]), int(found[3])) != (known.width, known.height) or most > 65535:
        raise ImageError("damaged PNM header")
    if plain:
        samples = _numbers(re.sub(rb"#[^\r\n]*", b" ", data[found.end() :]), count)
    else:
        samples = np.frombuffer(data, ">u2", min(count, (len(data) - found.end()) // 2), found.end())
    if len(samples) < count:
        raise ImageError("truncated PNM: a part of its pixels is missing")
    samples = np.clip(samples.reshape(known.height, known.width, bands), 0, most)
    if most != 65535:
        samples = np.rint(samples * (65535 / most))
    pixels, gray, _ = split(samples.astype(np.uint16))
    return Picture(pixels, gray, None, "PNM")


def _numbers(text: bytes, count: int) -> np.ndarray:
    """The first `count` decimal numbers of a text, or all where there are fewer.

    Raises:
        ImageError: there is something else in it.
    """
    if text.translate(None, b"0123456789 \t\n\v\f\r"):
        raise ImageError("damaged PNM: its pixels are not numbers")
    ink = np.frombuffer(b" " + text, np.uint8) > 32
    there = int(np.count_nonzero(ink[1:] & ~ink[:-1]))  # asked for more, numpy makes them up
    return np.fromstring(text, np.int64, min(count, there), sep=" ")
