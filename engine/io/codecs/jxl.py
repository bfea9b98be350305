"""JPEG XL, through pillow-jxl-plugin (an extra). It decodes whatever it opens, so the header is read here first."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from engine.io import metadata
from engine.io.bands import Bands
from engine.io.codecs import jpeg
from engine.io.libraries import common_metadata, pixels_of, split, unpremultiply
from engine.io.picture import Header, ImageError, Notice, Picture, upright
from engine.io.sink import Sink

CONTAINER, CODESTREAM = b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\x0a"
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
_SIZE = ((9, 1), (13, 1), (18, 1), (30, 1))


class _Bits:
    """Numbers of some bits, least significant first."""

    def __init__(self, data: bytes):
        self._value, self._left = int.from_bytes(data, "little"), 8 * len(data)

    def take(self, count: int) -> int:
        if count > self._left:
            raise ImageError("damaged or truncated JPEG XL header")
        value = self._value & ((1 << count) - 1)
        self._value >>= count
        self._left -= count
        return value

    def choose(self, *choices: tuple[int, int]) -> int:
        """One of four (bits, offset), chosen by two bits."""
        bits, offset = choices[self.take(2)]
        return self.take(bits) + offset


@dataclass(frozen=True)
class _Info:
    width: int
    height: int
    orientation: int = 1
    bits: int = 8
    premultiplied: bool = False
    animated: bool = False


def _size(bits: _Bits) -> tuple[int, int]:
    """Width and height."""
    small = bits.take(1)
    height = 8 * (bits.take(5) + 1) if small else bits.choose(*_SIZE)
    ratio = bits.take(3)
    if ratio:
        numerator, denominator = _RATIOS[ratio - 1]
        return height * numerator // denominator, height
    return 8 * (bits.take(5) + 1) if small else bits.choose(*_SIZE), height


def _depth(bits: _Bits) -> int:
    if bits.take(1):  # floating point
        depth = bits.choose((0, 32), (0, 16), (0, 24), (6, 1))
        bits.take(4)
        return depth
    return bits.choose((0, 8), (0, 10), (0, 12), (6, 1))


def _info(codestream: bytes) -> _Info:
    """SizeHeader and the beginning of ImageMetadata (ISO/IEC 18181-1, 9.2 and D.3)."""
    bits = _Bits(codestream[2:])
    info = _Info(*_size(bits))
    if bits.take(1):
        return info
    if bits.take(1):
        info = replace(info, orientation=bits.take(3) + 1)
        if bits.take(1):
            _size(bits)
        if bits.take(1):
            raise ImageError("a JPEG XL with a preview; save it without")
        if bits.take(1):
            return replace(info, animated=True)
    depth = _depth(bits)
    bits.take(1)
    premultiplied = False
    for _ in range(bits.choose((0, 0), (0, 1), (4, 2), (12, 1))):
        if bits.take(1):
            continue
        kind = bits.choose((0, 0), (0, 1), (4, 2), (6, 18))
        _depth(bits)
        bits.choose((0, 0), (0, 3), (0, 4), (3, 1))
        bits.take(8 * bits.choose((0, 0), (4, 0), (5, 16), (10, 48)))
        if kind != 0:
            break
        premultiplied = bool(bits.take(1))
    return replace(info, bits=depth, premultiplied=premultiplied)


def _codestream(file: BinaryIO) -> bytes:
    """The first bytes of the picture itself."""
    file.seek(0)
    if (head := file.read(12)) != CONTAINER:
        return head + file.read(500)
    for _ in range(1000):
        head = file.read(8)
        if len(head) < 8:
            break
        length, kind = struct.unpack(">I4s", head)
        skip = 8
        if length == 1:
            length, skip = int.from_bytes(file.read(8)), 16
        if kind in (b"jxlc", b"jxlp"):
            file.read(4 if kind == b"jxlp" else 0)
            return file.read(512)
        if length < skip:
            break
        file.seek(length - skip, io.SEEK_CUR)
    raise ImageError("damaged or truncated JPEG XL header")


def header(file: BinaryIO) -> Header:
    info = _info(_codestream(file))
    if info.animated:
        raise ImageError("an animated JPEG XL; animations are not read (extract the frames first)")
    turned = info.orientation >= 5  # the decoder turns the picture upright
    return Header(info.height, info.width) if turned else Header(info.width, info.height)


def read(data: bytes, known: Header, notice: Notice) -> Picture:
    decoder, _ = _plugin()
    info = _info(_codestream(io.BytesIO(data)))
    is_jpeg, decoded, raw, icc, boxes = decoder(num_threads=1)(data)
    if is_jpeg:
        inner = jpeg.header(io.BytesIO(raw))
        if (inner.width, inner.height) != (info.width, info.height):
            raise ImageError("damaged JPEG XL header")
        # The codestream says how the picture is turned, whatever EXIF says.
        return upright(replace(jpeg.read(raw, inner, notice), format="JXL"), info.orientation)
    if decoded.mode == "I;16":
        samples = np.frombuffer(raw, "<u2").reshape(decoded.height, decoded.width, 1).astype(np.uint16)
        pixels, gray, alpha = split(samples)
    elif decoded.mode in ("L", "LA", "RGB", "RGBA"):
        if info.bits > 8:
            notice(f"{info.bits} bit a sample; read as 8")
        pixels, gray, alpha = pixels_of(Image.frombytes(decoded.mode, (decoded.width, decoded.height), raw))
    else:
        raise ImageError(f"pixels of the kind {decoded.mode!r} are not read; convert the picture to 8-bit RGB")
    if alpha is not None and info.premultiplied:
        pixels = unpremultiply(pixels, alpha)
    blocks = {box.box_type: bytes(box.data) for box in boxes}
    exif = blocks.get(b"Exif", b"")
    exif = exif[4:] if exif[4:8] in (b"II*\0", b"MM\0*") else exif
    found = common_metadata({"exif": exif, "xmp": blocks.get(b"xml "), "icc_profile": bytes(icc) if icc else None})
    found["exif"] = metadata.upright_exif(found["exif"])
    return Picture(np.ascontiguousarray(pixels), gray, alpha, "JXL", **found)


def write(sink: Sink, bands: Bands, picture: Picture, quality: int, lossless: bool, notice: Notice) -> None:
    _, encoder = _plugin()
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[bands.shape[2]]
    own = encoder(mode=mode, lossless=lossless, quality=100 if lossless else quality, decoding_speed=0, effort=5,
                  use_container=False, use_original_profile=False, num_threads=1)  # fmt: skip
    height, width = bands.shape[:2]
    blocks = {"exif": picture.exif, "jumb": None, "xmp": picture.xmp, "compress": False}
    sink.write(own(bands.array().tobytes(), width, height, jpeg_encode=False, **blocks))


def _plugin() -> tuple[Any, Any]:
    try:
        from pillow_jxl import Decoder, Encoder
    except ImportError:
        raise ImageError("JPEG XL needs pillow-jxl-plugin; pip install 'gdpo-sr[formats]'") from None
    return Decoder, Encoder
