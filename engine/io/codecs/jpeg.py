"""JPEG, through libvips; Pillow reads what is damaged, and CMYK. Every segment but the pixels is written here."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, JpegImagePlugin

from engine.io import metadata
from engine.io.bands import Bands
from engine.io.libraries import common_metadata, open_pillow, pixels_of, samples_of, sensible_dpi, split, vips
from engine.io.picture import Header, ImageError, Notice, Picture
from engine.io.profiles import cmyk_to_rgb
from engine.io.sink import Sink

MAX_SCANS = 500  # of a progressive JPEG: a small file with thousands of scans keeps a decoder busy for minutes
MAX_WORK = 4_000_000_000  # scans times pixels: 40 scans of 100 megapixels
_SEGMENT = 65_533  # bytes of content that fit into one
_END = b"\xff\xd9"
_HEADER = re.compile(rb"[^\xff]*\xff+[^\xff]", re.S)  # up to the kind of the next segment
_AFTER_SCAN = re.compile(rb"\xff+[^\xff\0\xd0-\xd7]", re.S)  # the same, in a scan's data
_MOST_SEGMENTS = 100_000
_SCAN, _BASELINE = 0xDA, (0xC0, 0xC1)
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1, 0xC3, 0xC9, 0xCB), (0xC2, 0xCA)  # frames: Huffman and arithmetic
_FRAMES = _SEQUENTIAL + _PROGRESSIVE


def header(file: BinaryIO) -> Header:
    try:
        image = open_pillow(JpegImagePlugin.JpegImageFile, file)
    except ImageError:
        file.seek(0)
        for kind, _, content in _segments(file.read(1 << 20)):
            if kind in _FRAMES and content[:1] not in (b"", b"\x08"):
                raise ImageError(f"a JPEG of {content[0]} bit a sample; those of 8 bit are read") from None
        raise
    found = common_metadata(image.info)
    return Header(image.width, image.height, metadata.orientation_of(found["exif"], found["xmp"]))


def read(data: bytes, known: Header, notice: Notice) -> Picture:
    scans, refined = _scans(data)
    if scans > MAX_SCANS or scans * known.width * known.height > MAX_WORK:
        raise ImageError(f"a JPEG of {scans} scans; at most {MAX_SCANS} are read, fewer of a large picture")
    if not refined:
        raise ImageError("truncated JPEG: its last scans are missing")
    image = open_pillow(JpegImagePlugin.JpegImageFile, io.BytesIO(data))
    samples = _samples(data)
    if samples is None or image.mode not in ("L", "RGB"):
        image = _loaded(image, data, notice)
        samples = None
    info, found = image.info, common_metadata(image.info)
    density = info.get("jfif_density") if info.get("jfif_unit") in (1, 2) else None  # Pillow's dpi may be made up
    found["dpi"] = sensible_dpi([d * (2.54 if info["jfif_unit"] == 2 else 1) for d in density]) if density else None
    resources = info.get("photoshop")
    iptc = resources.get(0x0404) if isinstance(resources, dict) else None
    comment = info.get("comment")
    text = {"Comment": _words(comment)} if isinstance(comment, bytes) and comment.strip(b"\0") else {}
    if image.mode == "CMYK":
        pixels, gray = cmyk_to_rgb(np.asarray(image), found["icc"]), False
        found["icc"] = None
    else:
        pixels, gray, _ = pixels_of(image) if samples is None else split(samples)
    return Picture(pixels, gray, None, "JPEG", iptc=iptc or None, text=text, **found)


def _samples(data: bytes) -> np.ndarray | None:
    """Pixels [H,W,bands] of a JPEG about which its decoder has nothing to say; None of one that needs a second look.

    Raises:
        ImageError: it lacks pixels, for which decoders put gray.
    """
    try:
        return _decoded(data)
    except vips().Error as error:
        if "premature end of data segment" in str(error) and data.rstrip(b"\0").endswith(_END):
            raise ImageError("truncated JPEG: a part of its pixels is missing") from None
        return None


def _decoded(data: bytes) -> np.ndarray:
    """Pixels [H,W,bands] of a JPEG.

    libvips looks for its decoder's warnings before each 8 rows, so it never sees those of the last. Without subsampling
    in height, such rows are independent: 8 more are asked for, and what is said about them is of no concern. With it,
    several times 8 rows are decoded at once, and only a picture of no more than 8 rows needs a second look: with as
    many rows as its data hold, which make its last ones others.

    Raises:
        pyvips.Error: the decoder has something to say.
    """
    frame, scans = (0, b""), 0
    for kind, at, content in _segments(data):
        scans += kind == _SCAN
        if kind in _BASELINE:
            frame = at, content
    at, content = frame
    height, sampling = int.from_bytes(content[1:3]), [factors & 15 for factors in content[7::3]]
    if len(sampling) == 1:  # of one component it means nothing, but its decoder goes by it
        data, sampling = data[: at + 7] + b"\x11" + data[at + 8 :], [1]

    def load(rows: int) -> np.ndarray:
        longer = data[: at + 1] + struct.pack(">H", rows) + data[at + 3 :] if rows else data
        return samples_of(vips().Image.jpegload_buffer(longer, fail_on="warning", access="sequential"))

    # All scans of a progressive JPEG are decoded before its first row.
    if scans != 1 or not 0 < height < 65_400:
        return load(height)
    if all(factor == 1 for factor in sampling):
        return load(-(-height // 8) * 8 + 8)[:height]
    if height <= 8:
        load(8 * max(sampling))
    return load(height)


def lacks_pixels(data: bytes, rows: int) -> bool:
    """Whether a JPEG that is a part of another file has fewer rows than that file says, or data of them are missing."""
    try:
        return len(_decoded(data)) < rows or not _scans(data)[1]
    except vips().Error as error:
        return "premature end" in str(error).lower()


def _loaded(image: Any, data: bytes, notice: Notice) -> Any:
    """Decoded by Pillow, which takes more kinds of damage than libvips."""
    try:
        image.load()
        return image
    except OSError as error:
        if "truncated" not in str(error):
            raise
    image = _without_end(data)
    notice("the end of this JPEG is missing; all of its pixels are there")
    return image


def _words(text: bytes) -> str:
    text = text.rstrip(b"\0")
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text.decode("latin1")


def _without_end(data: bytes) -> Image.Image:
    """Decode a JPEG that lacks its end marker.

    Raises:
        ImageError: it lacks pixels as well.
    """
    whole = data.rstrip(b"\xff") + _END
    try:
        _decoded(whole)  # Pillow would fill what is missing with gray
    except vips().Error:
        raise ImageError("truncated JPEG: a part of its pixels is missing") from None
    image = open_pillow(JpegImagePlugin.JpegImageFile, io.BytesIO(whole))
    image.load()
    return image


def _scans(data: bytes) -> tuple[int, bool]:
    """How many scans a JPEG has, and whether they bring every coefficient of every component to its last bit.

    Decoders have nothing to say about a progressive JPEG that was cut between two scans and closed with an end marker.
    """
    scans, sequential = 0, False
    left: dict[int, list[int]] = {}  # component -> bits that each coefficient lacks
    for kind, _, content in _segments(data):
        scans += kind == _SCAN
        sequential = sequential or kind in _SEQUENTIAL
        if kind in _PROGRESSIVE:
            left = {content[i]: [1] * 64 for i in range(6, len(content) - 2, 3)}
        elif kind == _SCAN and content and len(content) >= 4 + 2 * content[0]:
            count = content[0]
            first, last, precision = content[1 + 2 * count : 4 + 2 * count]
            for component in content[1 : 1 + 2 * count : 2]:
                if component in left:
                    left[component][first : last + 1] = [precision & 15] * (min(last, 63) + 1 - first)
    return scans, sequential or not any(bits for component in left.values() for bits in component)


def _segments(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(kind, place of the content, content) of the segments of the first picture in a file, up to its end: what
    follows there (a preview, a film) is none of it.

    Every byte is looked at by C: a hostile file of 100 MB takes a fraction of a second.
    """
    at, scanned = 2, False
    for _ in range(_MOST_SEGMENTS):
        match = _AFTER_SCAN.search(data, at) if scanned else _HEADER.match(data, at)
        if match is None:
            return
        at = match.end() - 1
        if at + 3 > len(data) or data[at] == _END[1]:
            return
        kind = data[at]
        if kind in (0, 1) or 0xD0 <= kind <= 0xD8:  # without a length
            at += 1
            continue
        (length,) = struct.unpack_from(">H", data, at + 1)
        yield kind, at + 3, data[at + 3 : at + 1 + length]
        at += 1 + length
        scanned = scanned or kind == _SCAN


def write(sink: Sink, bands: Bands, picture: Picture, quality: int, lossless: bool, notice: Notice) -> None:
    """Stream a JPEG without chroma subsampling. Optimised Huffman tables would hold the whole picture in memory."""
    own = _segments_of(picture, notice)
    image = bands.image()
    with sink.target(lambda head: head[:2] + own + head[2:]) as target:
        image.jpegsave_target(target, Q=quality, subsample_mode="off", keep="none")


def _segments_of(picture: Picture, notice: Notice) -> bytes:
    unit, density = (1, [min(max(round(d), 1), 65535) for d in picture.dpi]) if picture.dpi else (0, [1, 1])
    out = [_segment(0xE0, b"JFIF\0\1\2" + struct.pack(">BHHBB", unit, *density, 0, 0))]

    def add(marker: int, content: bytes, name: str) -> None:
        if len(content) <= _SEGMENT:
            out.append(_segment(marker, content))
        else:
            notice(f"{name} left out: {len(content)} bytes, a JPEG holds {_SEGMENT}")

    if picture.exif:
        add(0xE1, b"Exif\0\0" + picture.exif, "EXIF")
    if picture.xmp:
        add(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + picture.xmp, "XMP")
    if picture.icc:
        size = _SEGMENT - 14
        parts = [picture.icc[i : i + size] for i in range(0, len(picture.icc), size)]
        if len(parts) > 255:
            raise ImageError("its colour profile is larger than a JPEG holds; write png or tiff")
        out += [_segment(0xE2, b"ICC_PROFILE\0" + bytes([i, len(parts)]) + part) for i, part in enumerate(parts, 1)]
    if picture.iptc:
        add(0xED, b"Photoshop 3.0\0" + metadata.iptc_to_resource(picture.iptc), "IPTC")
    if comment := picture.text.get("Comment"):
        add(0xFE, comment.encode("utf-8", "replace"), "comment")
    return b"".join(out)


def _segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
