"""What travels with a picture besides its pixels: EXIF, XMP, colour profile, resolution, text.

Blocks are carried over as they are, except for the orientation, which is reset because the pixels are turned upright.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from pathlib import Path
from typing import Any

from PIL import Image, TiffImagePlugin

MAX_METADATA = 16 << 20  # bytes of EXIF, XMP or text that are carried over


def read_metadata(image: Image.Image) -> dict[str, Any]:
    """Metadata blocks of an opened file. Oversized ones are left behind, not an error: the pixels are fine."""
    info = image.info
    exif, xmp, icc, dpi = (info.get(key) for key in ("exif", "xmp", "icc_profile", "dpi"))
    exif = exif.removeprefix(b"Exif\0\0") if isinstance(exif, bytes) else None
    xmp = xmp or info.get("XML:com.adobe.xmp")  # where libvips wrote it
    xmp = xmp.encode() if isinstance(xmp, str) else xmp
    text = {k: str(v) for k, v in getattr(image, "text", {}).items() if k != "XML:com.adobe.xmp"}
    return {
        "exif": exif if exif and len(exif) <= MAX_METADATA else None,
        "xmp": xmp if xmp and len(xmp) <= MAX_METADATA else None,
        "icc": icc or None,
        "dpi": (float(dpi[0]), float(dpi[1])) if dpi and all(0 < float(d) < 1e6 for d in dpi) else None,
        "text": text if sum(map(len, text.values())) <= MAX_METADATA else {},
    }


def reset_orientation(exif: bytes) -> tuple[bytes | None, int]:
    """Set the orientation of an EXIF block to upright, in place so that maker notes keep their offsets.

    The link to the second directory (the thumbnail, which would show the picture as it was) is cut.

    Returns:
        The new block (None where it is damaged) and the orientation that it had (1 where it had none).
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return None, 1
    block, orientation = bytearray(exif), 1
    try:
        (start,) = struct.unpack_from(order + "I", block, 4)
        (count,) = struct.unpack_from(order + "H", block, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, number = struct.unpack_from(order + "HHI", block, entry)
            if tag == 0x0112 and kind == 3 and number == 1:
                (orientation,) = struct.unpack_from(order + "H", block, entry + 8)
                struct.pack_into(order + "H", block, entry + 8, 1)
        struct.pack_into(order + "I", block, start + 2 + 12 * count, 0)
    except struct.error:
        return None, orientation
    return bytes(block), orientation


# What a TIFF's own directory says about the photo, not about its storage: description, make, model, software, date,
# artist, copyright; and the pointers to its EXIF and GPS directories.
_TIFF_TAGS = (270, 271, 272, 305, 306, 315, 33432)
_TIFF_POINTERS = (0x8769, 0x8825)
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


def add_exif_to_tiff(path: Path, exif: bytes) -> None:
    """Append an EXIF block to a TIFF of one page that libvips wrote, which itself keeps none.

    A damaged block is left out: the file is the old one until the last write.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _append_directory(path, exif)
        except (ValueError, TypeError, KeyError, LookupError, ArithmeticError, SyntaxError, struct.error):
            return  # what Pillow raises on the entries of a hostile block


def _append_directory(path: Path, exif: bytes) -> None:
    """A new first directory behind the file's end: the old one's entries and what the block says about the photo."""
    said = Image.Exif()
    said.load(exif)
    with open(path, "r+b") as file:
        magic, start = struct.unpack("<4sI", file.read(8))
        end = file.seek(0, io.SEEK_END)
        if magic != b"II*\0" or end + len(exif) > 0xFFFF0000:
            return  # BigTIFF, or no room for another offset of 32 bits
        file.seek(start)
        (count,) = struct.unpack("<H", file.read(2))
        old = [file.read(12) for _ in range(count)]
        entries = {struct.unpack_from("<H", entry)[0]: entry for entry in old}
        end = file.seek(end + end % 2)

        def append(block: bytes) -> int:
            nonlocal end
            at = end
            end += file.write(block + bytes(len(block) % 2))
            return at

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


def upright_xmp(xmp: bytes) -> bytes:
    """Reset the orientation that an XMP block may repeat."""
    return re.sub(rb"(tiff:Orientation(?:>|=[\"']))\d", rb"\g<1>1", xmp)
