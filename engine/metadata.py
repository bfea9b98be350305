"""What travels with a picture besides its pixels: EXIF, XMP, colour profile, resolution, text.

Blocks are carried over as they are, except for the orientation, which is reset because the pixels are turned upright.
"""

from __future__ import annotations

import re
import struct
from typing import Any

from PIL import Image

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


def tiff_exif(image: Image.Image) -> bytes | None:
    """An EXIF block of what a TIFF says about the photo, or None where it says nothing."""
    found, kept = image.getexif(), Image.Exif()
    for tag in _TIFF_TAGS:
        if tag in found:
            kept[tag] = found[tag]
    for pointer in _TIFF_POINTERS:
        if entries := found.get_ifd(pointer):
            kept[pointer] = dict(entries)
    return kept.tobytes().removeprefix(b"Exif\0\0") if len(kept) else None


def upright_xmp(xmp: bytes) -> bytes:
    """Reset the orientation that an XMP block may repeat."""
    return re.sub(rb"(tiff:Orientation(?:>|=[\"']))\d", rb"\g<1>1", xmp)
