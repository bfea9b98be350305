"""PNG, 8 and 16 bit. Pillow decodes 8 bit, libvips 16 (Pillow opens 16-bit RGB silently as 8 bit); libvips encodes.

All chunks but the pixels are read and written here, so that both depths keep the same things.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np
from PIL import PngImagePlugin

from engine.io import metadata
from engine.io.bands import Bands
from engine.io.libraries import open_pillow, pixels_of, samples_of, split, vips
from engine.io.picture import Header, ImageError, Notice, Picture, first_frame
from engine.io.profiles import TAGS
from engine.io.sink import Sink

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_XMP, _IPTC, _EXIF = "XML:com.adobe.xmp", "Raw profile type iptc", ("Raw profile type exif", "Raw profile type APP1")
_PROFILES = tuple(name.encode() + b"\0" for name in _EXIF)
_METRE = 0.0254  # inches
_MOST_CHUNKS = 5000  # beside the pixels; real files have a few dozen
# Interlaced: the first column and row of each pass, and the steps from one to the next.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_KEPT = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}  # of what the encoder writes


def chunks(file: BinaryIO, *, contents: set[bytes] | None = None) -> Iterator[tuple[bytes, bytes]]:
    """(kind, content) of every chunk to the end; b"" for those not in `contents`, which are skipped in the file.

    Raises:
        ImageError: the file does not begin like a PNG, or has thousands of chunks beside its pixels.
    """
    file.seek(0)
    others = 0
    if file.read(8) != SIGNATURE:
        raise ImageError("damaged or truncated PNG header")
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        others += kind != b"IDAT"
        if others > _MOST_CHUNKS:
            raise ImageError(f"a PNG of more than {_MOST_CHUNKS} chunks beside its pixels; they are not read")
        if contents is None or kind in contents:
            content = file.read(min(length, metadata.MAX_METADATA))
            file.seek(length - len(content) + 4, io.SEEK_CUR)
            if len(content) < min(length, metadata.MAX_METADATA):
                return
            yield kind, content
        else:
            file.seek(length + 4, io.SEEK_CUR)
            yield kind, b""
        if kind == b"IEND":
            return


def header(file: BinaryIO) -> Header:
    """Size and orientation; pixels are skipped, since EXIF may stand behind them."""
    size, exif, xmp, profiles = None, None, None, 0
    for kind, content in chunks(file, contents={b"IHDR", b"eXIf", b"zTXt", b"tEXt", b"iTXt"}):
        if kind == b"IHDR" and size is None and len(content) == 13:
            size = Header(*struct.unpack_from(">II", content))
        elif size is None:
            break
        elif kind == b"eXIf":
            exif = content
        elif kind in (b"zTXt", b"tEXt") and exif is None and content.startswith(_PROFILES) and profiles < 4:
            profiles += 1
            with contextlib.suppress(ValueError, IndexError):
                exif = _raw_profile(_text_of(kind, content)[1])
        elif kind == b"iTXt" and xmp is None and content.startswith(_XMP.encode() + b"\0"):
            with contextlib.suppress(ValueError, IndexError):
                xmp = _text_of(kind, content)[1].encode()
    if size is None:
        raise ImageError("damaged or truncated PNG header")
    return replace(size, orientation=metadata.orientation_of(_bare_exif(exif), xmp))


def read(data: bytes, known: Header, notice: Notice) -> Picture:
    found = _metadata(data)
    if (frames := _frames(data)) > 1:
        notice(first_frame("PNG", frames))
    bare = _critical(data)
    if data[24:25] == b"\x10":
        image = vips().Image.pngload_buffer(bare, fail_on="error", access="sequential")
        pixels, gray, alpha = split(samples_of(image))
        if pixels.dtype != np.uint16:
            raise ImageError("damaged PNG header")
    else:
        image = open_pillow(PngImagePlugin.PngImageFile, io.BytesIO(bare))
        image.load()
        last = image.crop((0, image.height - 1, *image.size)).getbbox(alpha_only=False)
        if (last is None or data[28]) and not _has_all_rows(data):  # Pillow leaves what is missing at 0
            raise ImageError("truncated PNG: a part of its pixels is missing")
        clear = image.info.get("transparency")
        if isinstance(clear, int) and data[25:26] == b"\0" and (bits := data[24]) in (2, 4):
            image.info["transparency"] = clear * 255 // ((1 << bits) - 1)  # Pillow scales the samples but not this one
        pixels, gray, alpha = pixels_of(image)
    return Picture(pixels, gray, alpha, "PNG", **found)


def _frames(data: bytes) -> int:
    """How many an animation has; 1 of others."""
    for kind, content in chunks(io.BytesIO(data), contents={b"acTL"}):
        if kind == b"acTL" and len(content) >= 4:
            return int.from_bytes(content[:4])
        if kind == b"IDAT":
            break
    return 1


def _critical(data: bytes) -> bytes:
    """A file of those chunks alone on which pixels depend.

    Decoders refuse a picture for others: for texts and profiles of megabytes, for a wrong checksum of a comment.
    """
    at = start = len(SIGNATURE)
    parts, view = [memoryview(SIGNATURE)], memoryview(data)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if kind[0] & 0x20 and kind != b"tRNS":  # a small first letter: ancillary
            parts.append(view[start:at])
            start = end
        at = end
    return b"".join([*parts, view[start:]])


def _has_all_rows(data: bytes) -> bool:
    """Whether the pixels unpack to as many bytes as the header asks for; decoders pass over an end that comes early."""
    width, height, depth, color, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(color, 1)
    left = 0
    for x, y, every_x, every_y in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -((x - width) // every_x), -((y - height) // every_y)
        left += rows * (1 + (columns * bits + 7) // 8) if columns > 0 else 0
    unpacker, at, view = zlib.decompressobj(), len(SIGNATURE), memoryview(data)
    with contextlib.suppress(zlib.error):  # damage is for the decoder to tell
        while left > 0 and at + 8 <= len(data):
            length, kind = struct.unpack_from(">I4s", data, at)
            part: bytes | memoryview = view[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
            while len(part) and left > 0:
                left -= len(unpacker.decompress(part, 1 << 20))
                part = unpacker.unconsumed_tail
            at += length + 12
        left -= len(unpacker.decompress(b"", 1 << 20)) if left > 0 else 0
    return left <= 0


def write(sink: Sink, bands: Bands, picture: Picture, quality: int, lossless: bool, notice: Notice) -> None:
    """Stream a PNG: the encoder's pixels between our chunks."""
    own = _chunks_of(picture)

    def edit(head: bytes) -> bytes:
        """The encoder's chunks before the pixels, and ours behind its first."""
        at, kept = len(SIGNATURE), [SIGNATURE]
        while (kind := head[at + 4 : at + 8]) != b"IDAT":
            end = at + 12 + int.from_bytes(head[at : at + 4])
            if kind in _KEPT:
                kept.append(head[at:end])
            if kind == b"IHDR":
                kept.append(own)
            at = end
        return b"".join(kept) + head[at:]

    depth, image = 8 * bands.dtype.itemsize, bands.image()
    with sink.target(edit) as target:
        # As small as with a filter chosen for each row at level 6 (print: 6 % larger), in a third of the time.
        image.pngsave_target(target, bitdepth=depth, filter="avg", compression=4, keep="none")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _chunks_of(picture: Picture) -> bytes:
    """Everything but the pixels, in an order that the specification allows."""
    out = [_chunk(name.encode(), picture.color_tags[name]) for name in TAGS if name in picture.color_tags]
    if picture.icc:
        out.append(_chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(picture.icc)))
    if picture.dpi:
        out.append(_chunk(b"pHYs", struct.pack(">IIB", *(round(d / _METRE) for d in picture.dpi), 1)))
    if picture.exif:
        out.append(_chunk(b"eXIf", picture.exif))
    texts = dict(picture.text)
    if picture.xmp:
        texts[_XMP] = picture.xmp.decode("utf-8", "replace")
    if picture.iptc:
        block = metadata.iptc_to_resource(picture.iptc)
        lines = "\n".join(re.findall(".{1,72}", block.hex()))
        out.append(
            _chunk(b"zTXt", _IPTC.encode() + b"\0\0" + zlib.compress(f"\niptc\n{len(block):8}\n{lines}\n".encode()))
        )
    for key, value in texts.items():
        if name := key.encode("latin1", "replace")[:79].replace(b"\0", b""):
            out.append(_chunk(b"iTXt", name + b"\0\0\0\0\0" + value.encode("utf-8", "replace")))
    return b"".join(out)


def _metadata(data: bytes) -> dict[str, Any]:
    """Profile, tags, text and blocks. Oversized ones are left behind, not an error: the pixels are fine."""
    found: dict[str, Any] = {"color_tags": {}, "text": {}}
    total, exif = 0, None
    wanted = {b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"pHYs", *(tag.encode() for tag in TAGS)}
    for kind, content in chunks(io.BytesIO(data), contents=wanted):
        with contextlib.suppress(ValueError, IndexError, struct.error, zlib.error):  # a damaged one is left out
            if kind in (b"tEXt", b"zTXt", b"iTXt"):
                if total > metadata.MAX_METADATA:
                    continue
                key, value = _text_of(kind, content)
                total += len(value)
                if total <= metadata.MAX_METADATA:
                    found["text"][key] = value
            elif kind == b"eXIf":
                exif = content
            elif kind == b"iCCP":
                found["icc"] = _inflate(content[content.index(b"\0") + 2 :]) or None
            elif kind == b"pHYs":
                x, y, unit = struct.unpack(">IIB", content)
                found["dpi"] = (x * _METRE, y * _METRE) if unit == 1 and x and y else None
            elif kind.decode() in TAGS:
                found["color_tags"].setdefault(kind.decode(), content)
    text = found["text"]
    if xmp := text.pop(_XMP, None):
        found["xmp"] = xmp.encode("utf-8", "replace")
    if iptc := text.pop(_IPTC, None):
        found["iptc"] = metadata.iptc_from_resources(_raw_profile(iptc) or b"")
    for key in _EXIF:
        exif = exif or _raw_profile(text.pop(key, ""))
    found["exif"] = _bare_exif(exif)
    return found


def _bare_exif(exif: bytes | None) -> bytes | None:
    return exif.removeprefix(b"Exif\0\0") if exif else None


def _text_of(kind: bytes, content: bytes) -> tuple[str, str]:
    """Key and value of a text chunk.

    Raises:
        ValueError, IndexError: it is damaged.
    """
    key, rest = content.split(b"\0", 1)
    if kind == b"tEXt":
        return key.decode("latin1"), rest.decode("latin1")
    if kind == b"zTXt":
        return key.decode("latin1"), _inflate(rest[1:]).decode("latin1")
    packed, (_language, _translated, value) = rest[0], rest[2:].split(b"\0", 2)
    return key.decode("latin1"), (_inflate(value) if packed else value).decode("utf-8", "replace")


def _inflate(packed: bytes) -> bytes:
    """Decompressed, if that is no more than metadata may take; else nothing."""
    stream = zlib.decompressobj()
    try:
        out = stream.decompress(packed, metadata.MAX_METADATA)
    except zlib.error:
        return b""
    return out if stream.eof else b""


def _raw_profile(text: str) -> bytes | None:
    """A block in ImageMagick's form: its kind, its length and hexadecimal digits in lines."""
    try:
        return bytes.fromhex("".join(text.split("\n")[3:])) or None
    except ValueError:
        return None
