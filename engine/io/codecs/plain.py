"""BMP, GIF, TGA, PNM and PAM, read only. Pillow decodes all but PNM of 16 bit and PAM."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, PpmImagePlugin, TgaImagePlugin

from engine.io.libraries import common_metadata, open_pillow, pixels_of, split
from engine.io.picture import Header, ImageError, Notice, Picture, first_frame

_PLUGINS: dict[str, Any] = {
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "PNM": PpmImagePlugin.PpmImageFile,
    "TGA": TgaImagePlugin.TgaImageFile,
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
        if kind == "TGA" and not data[17] & 15:  # its fourth samples are no transparency
            alpha = None
        if covered != (0, 0, *image.size):  # nothing was drawn on the rest of a GIF's canvas
            left, top, right, bottom = covered
            inner = np.full(pixels.shape[:2], 255, np.uint8) if alpha is None else alpha
            alpha = np.zeros_like(inner)
            alpha[top:bottom, left:right] = inner[top:bottom, left:right]
        found, text = common_metadata(image.info), {}
        if isinstance(comment := image.info.get("comment"), bytes) and comment.strip():
            text["Comment"] = comment.decode("utf-8", "replace")
        if kind == "GIF" and (frames := image.n_frames) > 1:
            notice(first_frame(kind, frames))
        return Picture(pixels, gray, alpha, kind, text=text, **found)

    return read_pixels


def _deep_pnm(data: bytes, known: Header) -> Picture | None:
    """PGM and PPM of more than 8 bit; None where it is another PNM."""
    found = _PNM_HEADER.match(data)
    if not found or int(found[4]) <= 255:
        return None
    most, bands, plain = int(found[4]), 1 if found[1] in b"25" else 3, found[1] in b"23"
    if (int(found[2]), int(found[3])) != (known.width, known.height) or most > 65535:
        raise ImageError("damaged PNM header")
    if plain:
        samples = _numbers(re.sub(rb"#[^\r\n]*", b" ", data[found.end() :]), known.width * known.height * bands)
    else:
        samples = np.frombuffer(data, ">u2", (len(data) - found.end()) // 2, found.end())
    return _of_samples(samples, known, bands, most, "PNM")


def _of_samples(samples: np.ndarray, known: Header, bands: int, most: int, kind: str) -> Picture:
    """Samples up to `most`, packed, as a picture: uint8 if they are up to 255, else uint16.

    Raises:
        ImageError: there are too few.
    """
    count = known.width * known.height * bands
    if len(samples) < count:
        raise ImageError(f"truncated {kind}: a part of its pixels is missing")
    full, dtype = (255, np.uint8) if most <= 255 else (65535, np.uint16)
    samples = np.clip(samples[:count].reshape(known.height, known.width, bands), 0, most)
    if most != full:
        samples = np.rint(samples * (full / most))
    pixels, gray, alpha = split(samples.astype(dtype))
    return Picture(pixels, gray, alpha, kind)


def pam_header(file: BinaryIO) -> Header:
    fields, _ = _pam(file.read(_LONGEST_PNM_HEADER))
    return Header(fields["WIDTH"], fields["HEIGHT"])


def _pam(data: bytes) -> tuple[dict[str, int], int]:
    """The numbers of a PAM's header, and where its samples begin (netpbm.sourceforge.net/doc/pam.html).

    Raises:
        ImageError: it is none, or its samples are not gray or RGB, with or without transparency.
    """
    text, found, _ = data[:_LONGEST_PNM_HEADER].partition(b"\nENDHDR\n")
    fields: dict[str, int] = {}
    for line in text.split(b"\n")[1:]:
        key, _, value = line.strip().partition(b" ")
        if key in (b"WIDTH", b"HEIGHT", b"DEPTH", b"MAXVAL") and value.strip().isdigit() and len(value) < 20:
            fields[key.decode()] = int(value)
    if not found or len(fields) != 4 or not 1 <= fields["MAXVAL"] <= 65535:
        raise ImageError("damaged or truncated PAM header")
    if not 1 <= fields["DEPTH"] <= 4:
        raise ImageError(f"a PAM of {fields['DEPTH']} samples a pixel; gray and RGB, with or without alpha, are read")
    return fields, len(text) + len(found)


def read_pam(data: bytes, known: Header, notice: Notice) -> Picture:
    fields, start = _pam(data)
    item = 2 if fields["MAXVAL"] > 255 else 1
    samples = np.frombuffer(data, ">u2" if item == 2 else np.uint8, (len(data) - start) // item, start)
    return _of_samples(samples, known, fields["DEPTH"], fields["MAXVAL"], "PAM")


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
