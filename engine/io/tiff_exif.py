"""EXIF in a TIFF, whose own directories hold what other formats keep in a block. Pixels: `codecs/tiff.py`."""

from __future__ import annotations

import io
import struct
import warnings
from typing import Any

from PIL import Image, TiffImagePlugin

from engine.io.sink import Sink, read_back

# What a TIFF's own directory says about the photo, not about its storage: description, make, model, software, date,
# artist, copyright; and the pointers to its EXIF and GPS directories.
_TIFF_TAGS = (270, 271, 272, 305, 306, 315, 33432)
_TIFF_POINTERS = (0x8769, 0x8825)
_RESOLUTION_UNIT, _IPTC, _ICC = 296, 33723, 34675
_INTEROP = 0xA005  # in the EXIF directory: a pointer to another one


def _text(value: object) -> bytes:
    """The bytes of a text tag, whatever their encoding: Pillow reads them as Latin-1."""
    return str(value).encode("latin1", "replace")


def _entries(exif: Image.Exif, pointer: int) -> dict[int, Any]:
    """What a directory holds, with the one inside it in place of its offset, which means nothing in another file."""
    entries = dict(exif.get_ifd(pointer))
    if _INTEROP in entries:
        entries[_INTEROP] = exif.get_ifd(_INTEROP)
    return {tag: value for tag, value in entries.items() if value != {}}


def tiff_exif(image: Image.Image) -> bytes | None:
    """An EXIF block of what a TIFF says about the photo, or None where it says nothing."""
    found, kept = image.getexif(), Image.Exif()
    for tag in _TIFF_TAGS:
        if tag in found:
            kept[tag] = _text(found[tag])
    for pointer in _TIFF_POINTERS:
        if entries := _entries(found, pointer):
            kept[pointer] = entries
    return kept.tobytes().removeprefix(b"Exif\0\0") if len(kept) else None


def clear_resolution(file: Sink) -> None:
    """Say in a TIFF's first directory that its resolution has no unit: libvips always writes one."""
    at = _find(file, _RESOLUTION_UNIT)
    if at is not None:
        file.seek(at + 8)
        file.write(struct.pack("<HH", 1, 0))


def _find(file: Sink, wanted: int) -> int | None:
    """Where a tag stands in the first directory of a TIFF that libvips wrote; None in a BigTIFF, or if it lacks it."""
    file.seek(0)
    magic, start = struct.unpack("<4sI", read_back(file, 8))
    if magic != b"II*\0":
        return None
    file.seek(start)
    (count,) = struct.unpack("<H", read_back(file, 2))
    block = read_back(file, 12 * count)
    places = (at for at in range(0, len(block), 12) if struct.unpack_from("<H", block, at)[0] == wanted)
    return next((start + 2 + at for at in places), None)


def iptc_of_tiff(tags: Any) -> bytes | None:
    """The IPTC data sets in a TIFF's directory, which many programs declare as numbers of 32 bits."""
    value = tags.get(_IPTC)
    if isinstance(value, tuple) and all(isinstance(v, int) and 0 <= v < 1 << 32 for v in value):
        value = struct.pack(("<" if tags.prefix.startswith(b"II") else ">") + f"{len(value)}I", *value).rstrip(b"\0")
    return value if isinstance(value, bytes) and value.startswith(b"\x1c") else None


def add_to_tiff(file: Sink, *, exif: bytes | None = None, iptc: bytes | None = None, icc: bytes | None = None) -> bool:
    """Append what libvips does not write to a TIFF of one page that it wrote.

    Args:
        file: readable, writable, and open for nobody else.
        exif: starts at the TIFF header; libvips keeps none.
        iptc: starts at the first data set; libvips cuts it.
        icc: a profile; libvips drops one that is for other colours, such as an RGB profile of a gray picture.

    Returns:
        Whether it was written. A damaged block is left out: the file is the old one until the last write.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _append_directory(file, exif, {_IPTC: iptc, _ICC: icc})
        except OSError:
            raise
        except (ValueError, TypeError, KeyError, LookupError, ArithmeticError, SyntaxError, struct.error):
            return False  # what Pillow raises on the entries of a hostile block


def _append_directory(file: Sink, exif: bytes | None, blocks: dict[int, bytes | None]) -> bool:
    """A new first directory behind the file's end: the old one's entries, blocks by tag, what EXIF says."""
    said = Image.Exif()
    if exif:
        said.load(exif)
    file.seek(0)
    magic, start = struct.unpack("<4sI", read_back(file, 8))
    end = file.seek(0, io.SEEK_END)
    if magic != b"II*\0" or end + sum(len(block or b"") for block in (exif, *blocks.values())) > 0xFFFF0000:
        return False  # BigTIFF, or no room for another offset of 32 bits
    file.seek(start)
    (count,) = struct.unpack("<H", read_back(file, 2))
    old = [read_back(file, 12) for _ in range(count)]
    entries = {struct.unpack_from("<H", entry)[0]: entry for entry in old}
    end = file.seek(end + end % 2)

    def append(block: bytes) -> int:
        nonlocal end
        at = end
        end += file.write(block + bytes(len(block) % 2))
        return at

    for tag, block in blocks.items():
        if block:
            value = struct.pack("<I", append(block)) if len(block) > 4 else block.ljust(4, b"\0")
            entries[tag] = struct.pack("<HHI", tag, 7, len(block)) + value
    for tag in _TIFF_TAGS:
        if tag in said:
            text = _text(said[tag]) + b"\0"
            value = struct.pack("<I", append(text)) if len(text) > 4 else text.ljust(4, b"\0")
            entries[tag] = struct.pack("<HHI", tag, 2, len(text)) + value
    for pointer in _TIFF_POINTERS:
        if values := _entries(said, pointer):
            directory = TiffImagePlugin.ImageFileDirectory_v2(b"II*\0\0\0\0\0", group=pointer)
            for tag, value in values.items():
                directory[tag] = value
            entries[pointer] = struct.pack("<HHII", pointer, 4, 1, append(directory.tobytes(end)))
    directories = struct.pack("<H", len(entries)) + b"".join(entries[tag] for tag in sorted(entries)) + bytes(4)
    first = append(directories)
    file.seek(4)
    file.write(struct.pack("<I", first))
    return True
