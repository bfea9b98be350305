"""The table of picture formats: what reads and writes each, and what it can hold.

To add a format, write a module in `codecs/` and a row here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from engine.io.bands import Bands
from engine.io.codecs import heif, jpeg, jxl, plain, png, tiff, webp
from engine.io.codecs.unread import what_to_do
from engine.io.picture import Header, ImageError, Notice, Picture
from engine.io.sink import Sink


@dataclass(frozen=True)
class Format:
    """A row.

    Attributes:
        name: in messages, and in `Picture.format`.
        suffixes: of file names, the usual one first.
        begins: a regular expression of the first bytes.
        header: reads what is known before pixels are decoded.
        read: decodes a file; what it returns is not yet turned upright.
        write: encodes rows of 1 to 4 samples to a sink; None where the format is only read.
        deep, gray, alpha: it holds 16 bit, one channel, transparency.
        icc: it holds a profile; else colours are converted to sRGB.
        iptc: it holds IPTC.
        texts: keys of `Picture.text` that it holds; None: all.
        lossless: "always", "option" or "never".
        longest: side of the largest picture.
    """

    name: str
    suffixes: tuple[str, ...]
    begins: bytes
    header: Callable[[BinaryIO], Header]
    read: Callable[[bytes, Header, Notice], Picture]
    write: Callable[[Sink, Bands, Picture, int, bool, Notice], None] | None = None
    deep: bool = False
    gray: bool = True
    alpha: bool = True
    icc: bool = True
    iptc: bool = False
    texts: frozenset[str] | None = frozenset()
    lossless: str = "never"
    longest: int = 1 << 30

    @property
    def media(self) -> str:
        """Its media type, as HTTP names it."""
        return f"image/{self.name.lower()}"


_HEIC_BRANDS = rb"hei[cxms]|hev[cxms]"
_FTYP = rb".{4}ftyp"
# Nothing marks a TGA but its own fields: colours without or with a palette, and the depths that there are.
_TGA = rb".(?:\0[\x02\x03\n\v]\0{5}|\x01[\x01\t].{4}[\x0f\x10\x18\x20]).{8}[\x08\x0f\x10\x18\x20]"

FORMATS = (
    Format("PNG", (".png",), rb"\x89PNG\r\n\x1a\n", png.header, png.read, png.write,
           deep=True, iptc=True, texts=None, lossless="always"),
    Format("JPEG", (".jpg", ".jpeg", ".jfif", ".jpe", ".jif"), rb"\xff\xd8\xff", jpeg.header, jpeg.read, jpeg.write,
           alpha=False, iptc=True, texts=frozenset({"Comment"}), longest=65_500),
    Format("WEBP", (".webp",), rb"RIFF.{4}WEBP", webp.header("WEBP"), webp.read("WEBP"), webp.write("WEBP"),
           gray=False, lossless="option", longest=16_383),
    Format("TIFF", (".tif", ".tiff"), rb"II[*+]\0|MM\0[*+]", tiff.header, tiff.read, tiff.write,
           deep=True, iptc=True, texts=frozenset({"Description"}), lossless="always"),
    Format("AVIF", (".avif",), _FTYP + rb"(?:avi[fs]|mif1.{4,40}?avif)", webp.header("AVIF"), webp.read("AVIF"),
           webp.write("AVIF"), gray=False, longest=16_384),
    Format("JXL", (".jxl",), re.escape(jxl.CONTAINER) + rb"|\xff\x0a", jxl.header, jxl.read, jxl.write,
           icc=False, lossless="option"),
    Format("HEIC", (".heic", ".heif"), _FTYP + rb"(?:" + _HEIC_BRANDS + rb"|m[is]f1.{4,60}?(?:" + _HEIC_BRANDS + rb"))",
           heif.header, heif.read),
    Format("BMP", (".bmp",), rb"BM", plain.header("BMP"), plain.read("BMP")),
    Format("GIF", (".gif",), rb"GIF8[79]a", plain.header("GIF"), plain.read("GIF")),
    Format("PNM", (".pnm", ".ppm", ".pgm", ".pbm"), rb"P[1-6][\s#]", plain.header("PNM"), plain.read("PNM")),
    Format("PAM", (".pam",), rb"P7\s", plain.pam_header, plain.read_pam),
    Format("TGA", (".tga",), _TGA, plain.header("TGA"), plain.read("TGA")),
)  # fmt: skip
LONGEST_HEAD = 96  # bytes that decide the format
BY_SUFFIX = {suffix: row for row in FORMATS for suffix in row.suffixes}
SUFFIXES = {suffix: row.name for suffix, row in BY_SUFFIX.items() if row.write}  # that are written
READABLE = frozenset(BY_SUFFIX)
KINDS = tuple(suffix[1:] for suffix in SUFFIXES)  # the same as options name them


def kind_of(text: str) -> str:
    """What an option that takes one of `KINDS` means: capitals and a dot in front make no difference."""
    return text.lower().removeprefix(".")


def format_of(head: bytes) -> Format:
    """The format of a file by its first bytes; its name decides nothing.

    Raises:
        ImageError: it is of none, and is named with what to do where it is of a kind that is known.
    """
    if not head:
        raise ImageError("the file is empty")
    if words := what_to_do(head):
        raise ImageError(words)
    for row in FORMATS:
        if re.match(row.begins, head, re.S):
            return row
    raise ImageError(f"not a picture of a kind that is read ({', '.join(row.name for row in FORMATS)})")
