"""What travels with a picture besides its pixels, and what of it would no longer be true.

Blocks are carried over as they are, except where they speak of the pixels: the orientation is reset because the pixels
are turned upright, sizes become those of the result, and data that stood beside the pixels (a gain map, a thumbnail, a
film) is no longer promised. EXIF is edited in place, so that maker notes keep their offsets.
"""

from __future__ import annotations

import re
import struct

MAX_METADATA = 16 << 20  # bytes of EXIF, XMP or text that are carried over

_ORIENTATION, _EXIF_POINTER = 0x0112, 0x8769
_SIZES = {0x0100: 1, 0x0101: 0, 0xA002: 1, 0xA003: 0}  # tag -> axis of (height, width)
_SHORT, _LONG = 3, 4
_NUMBERS = {_SHORT: "H", _LONG: "I"}


def orientation_of(exif: bytes | None, xmp: bytes | None = None) -> int:
    """The orientation in an EXIF block or, where that has none or is damaged, in an XMP block; else 1."""
    if exif:
        order = _byte_order(exif)
        try:
            for entry in _entries(exif, order):
                tag, kind, number = struct.unpack_from(order + "HHI", exif, entry)
                if tag == _ORIENTATION and kind in _NUMBERS and number == 1:
                    (value,) = struct.unpack_from(order + _NUMBERS[kind], exif, entry + 8)
                    return value if 1 <= value <= 8 else 1
        except struct.error:
            pass
    found = _XMP_ORIENTATION.search(xmp) if xmp else None
    return int(found[2]) if found else 1


def upright_exif(exif: bytes | None) -> bytes | None:
    """An EXIF block without orientation, and without the link to its thumbnail, which shows the picture as it was.

    Returns:
        The new block; None where it is damaged.
    """
    if not exif:
        return None
    block, order = bytearray(exif), _byte_order(exif)
    try:
        entries = _entries(exif, order)
        for entry in entries:
            tag, kind, number = struct.unpack_from(order + "HHI", block, entry)
            if tag == _ORIENTATION and kind in _NUMBERS and number == 1:
                struct.pack_into(order + _NUMBERS[kind], block, entry + 8, 1)
        struct.pack_into(order + "I", block, entries.stop, 0)
    except struct.error:
        return None
    return bytes(block)


def sized_exif(exif: bytes, size: tuple[int, int]) -> bytes:
    """An EXIF block whose entries for the picture's size, where it has them, say (height, width)."""
    block, order = bytearray(exif), _byte_order(exif)
    try:
        start: int | None = None
        while True:
            pointer = None
            for entry in _entries(exif, order, start):
                tag, kind, number = struct.unpack_from(order + "HHI", block, entry)
                if tag in _SIZES and kind in (_SHORT, _LONG) and number == 1:
                    struct.pack_into(order + "HHII", block, entry, tag, _LONG, 1, size[_SIZES[tag]])
                elif tag == _EXIF_POINTER and start is None:
                    (pointer,) = struct.unpack_from(order + "I", block, entry + 8)
            if pointer is None:
                return bytes(block)
            start = pointer
    except struct.error:
        return exif


def _byte_order(exif: bytes) -> str:
    return ">" if exif.startswith(b"MM") else "<"


def _entries(exif: bytes, order: str, start: int | None = None) -> range:
    """Where the entries of a directory stand: of the first one, or of the one at `start`.

    Raises:
        struct.error: the block is damaged.
    """
    if exif[:4] not in (b"II*\0", b"MM\0*"):
        raise struct.error("not an EXIF block")
    if start is None:
        (start,) = struct.unpack_from(order + "I", exif, 4)
    (count,) = struct.unpack_from(order + "H", exif, start)
    if start + 2 + 12 * count > len(exif):
        raise struct.error("a directory beyond the end")
    return range(start + 2, start + 2 + 12 * count, 12)


# XMP is edited as text: its namespaces have customary prefixes, and a parser of XML would be one more thing to attack.
_VALUE = rb"""(?:="[^"]*"|='[^']*')"""
_BESIDE = rb"(?:hdrgm|HDRGainMap|apdi|GDepth|GImage|GAudio|Container|Item|xmpNote|GCamera:M(?:otion|icro))"
_ATTRIBUTE = re.compile(rb"\s(?:xmlns:)?" + _BESIDE + rb"[\w:]*" + _VALUE)
_ELEMENT = re.compile(rb"<(" + _BESIDE + rb"[\w:]*)\b[^>]*?(?:/>|>.*?</\1\s*>)", re.S)
_MANY_ELEMENTS, _LONG_XMP = 100, 1 << 20  # where taking elements out would take long
_PANORAMA = (
    (re.compile(rb"(GPano:(?:FullPanoWidth|CroppedAreaImageWidth|CroppedAreaLeft)Pixels(?:>|=[\"']))(\d{1,9})"), 1),
    (re.compile(rb"(GPano:(?:FullPanoHeight|CroppedAreaImageHeight|CroppedAreaTop)Pixels(?:>|=[\"']))(\d{1,9})"), 0),
    (re.compile(rb"(GPano:LargestValidInteriorRect(?:Left|Width)(?:>|=[\"']))(\d{1,9})"), 1),
    (re.compile(rb"(GPano:LargestValidInteriorRect(?:Top|Height)(?:>|=[\"']))(\d{1,9})"), 0),
)
_XMP_ORIENTATION = re.compile(rb"(tiff:Orientation(?:>|=[\"']))([1-8])")
_XMP_SIZES = (
    (re.compile(rb"((?:tiff:ImageWidth|exif:PixelXDimension)(?:>|=[\"']))\d+"), 1),
    (re.compile(rb"((?:tiff:ImageLength|exif:PixelYDimension)(?:>|=[\"']))\d+"), 0),
)


def upright_xmp(xmp: bytes) -> bytes:
    """Reset the orientation that an XMP block may repeat."""
    return _XMP_ORIENTATION.sub(rb"\g<1>1", xmp)


def xmp_of_pixels_alone(xmp: bytes) -> bytes | None:
    """An XMP block that does not promise a gain map, depth map, film or second block beside the pixels.

    Returns:
        The new block; None where the promise cannot be taken out.
    """
    if not re.search(_BESIDE, xmp):
        return xmp
    if len(xmp) > _LONG_XMP or len(re.findall(rb"<" + _BESIDE, xmp)) > _MANY_ELEMENTS:
        return None
    alone = _ATTRIBUTE.sub(b"", _ELEMENT.sub(b"", xmp))
    return None if re.search(rb"GainMap|hdrgm|MotionPhoto|MicroVideo", alone) else alone


def sized_xmp(xmp: bytes, size: tuple[int, int]) -> bytes:
    """An XMP block whose entries for the picture's size, where it has them, say (height, width)."""
    for pattern, axis in _XMP_SIZES:
        xmp = pattern.sub(rb"\g<1>%d" % size[axis], xmp)
    return xmp


def scaled_panorama(xmp: bytes, before: tuple[int, int], after: tuple[int, int]) -> bytes:
    """An XMP block whose measures of a panorama, in pixels, are those of the picture at its new size."""
    for pattern, axis in _PANORAMA:
        factor = after[axis] / before[axis]
        xmp = pattern.sub(lambda m, f=factor: m[1] + b"%d" % round(int(m[2]) * f), xmp)  # type: ignore[misc]
    return xmp


_RESOURCE = b"8BIM\x04\x04\0\0"  # Photoshop's image resource that holds IPTC


def iptc_to_resource(iptc: bytes) -> bytes:
    """IPTC data sets as an image resource of Photoshop, the form in which JPEG and PNG keep them."""
    return _RESOURCE + struct.pack(">I", len(iptc)) + iptc + bytes(len(iptc) % 2)


def iptc_from_resources(block: bytes) -> bytes | None:
    """The IPTC data sets among image resources of Photoshop, or the block itself where it is bare IPTC."""
    block = block.removeprefix(b"Photoshop 3.0\0")
    if block.startswith(b"\x1c"):
        return block
    at = 0
    while block[at : at + 4] == b"8BIM" and at + 8 <= len(block):
        name = block[at + 6] + 1
        start = at + 6 + name + name % 2 + 4
        if start > len(block):
            return None
        (length,) = struct.unpack_from(">I", block, start - 4)
        if block[at + 4 : at + 6] == b"\x04\x04":
            return block[start : start + length] or None
        at = start + length + length % 2
    return None
