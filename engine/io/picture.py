"""What a decoded picture is, and what is known of one from its header."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

Notice = Callable[[str], None]  # told, in words, what a file lost or lacked although it could be read or written


class ImageError(ValueError):
    """A picture that cannot be read or written; the message names the file and says what to do."""


@dataclass(frozen=True)
class Header:
    """What is known before any pixel is decoded.

    Attributes:
        width, height: as stored.
        orientation: EXIF's, 1 to 8; 1 where the decoder itself turns the picture upright.
        work: pixels that the decoder has to visit; more than width * height in a progressive JPEG.
    """

    width: int
    height: int
    orientation: int = 1
    work: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the upright picture."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


@dataclass(frozen=True)
class Picture:
    """A decoded picture, upright, in the colour space of its `icc` profile or its `color_tags` (else sRGB).

    Attributes:
        pixels: [H,W,3] uint8 or uint16. A gray picture has three equal channels.
        gray: the file had one colour channel; `write_image` writes one.
        alpha: [H,W] like pixels, not premultiplied; None where every pixel is opaque.
        format: the name of its row in `formats.FORMATS`.
        icc, exif, xmp, iptc: raw blocks. The EXIF orientation is already applied and reset. exif starts at the TIFF
            header, iptc at its first data set.
        color_tags: PNG's cICP, sRGB, gAMA and cHRM chunks, which say what the numbers mean where there is no profile.
        dpi: horizontal and vertical resolution.
        text: PNG text entries; "Comment" and "Description" are those of other formats too.
    """

    pixels: np.ndarray
    gray: bool = False
    alpha: np.ndarray | None = None
    format: str = "PNG"
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    iptc: bytes | None = None
    color_tags: dict[str, bytes] = field(default_factory=dict)
    dpi: tuple[float, float] | None = None
    text: dict[str, str] = field(default_factory=dict)

    def without_metadata(self) -> Picture:
        """The same picture with what its colours mean but no other metadata."""
        return replace(self, exif=None, xmp=None, iptc=None, dpi=None, text={})


# EXIF orientation -> whether to swap rows and columns first, then which axes to flip.
_TURNS = {
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}


def upright(picture: Picture, orientation: int) -> Picture:
    """Turn and mirror the pixels as an EXIF orientation asks."""
    if orientation not in _TURNS:
        return picture
    swap, flips = _TURNS[orientation]

    def turn(a: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.flip(a.swapaxes(0, 1) if swap else a, flips))

    dpi = picture.dpi[::-1] if picture.dpi and swap else picture.dpi
    alpha = None if picture.alpha is None else turn(picture.alpha)
    return replace(picture, pixels=turn(picture.pixels), alpha=alpha, dpi=dpi)


def to_8_bit(samples: np.ndarray) -> np.ndarray:
    """uint16 -> uint8, rounded; uint8 as it is."""
    if samples.dtype == np.uint8:
        return samples
    out = np.empty(samples.shape, np.uint8)
    for top in range(0, len(samples), 256):
        out[top : top + 256] = (samples[top : top + 256].astype(np.uint32) * 255 + 32767) // 65535
    return out


def first_frame(kind: str, frames: int) -> str:
    """What to say of an animation, or of a file of several pictures, of which one is read."""
    return f"this {kind} has {frames} frames; the first is read"
