"""Boxes of AVIF and HEIC files: what the decoders do not tell about the picture's depth and colours."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

_CONTAINERS = {b"meta": 4, b"iprp": 0, b"ipco": 0}  # box -> bytes before the boxes in it
_MOST = 10_000  # boxes looked at


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, content) of the properties of a file's items, in their order."""
    ranges, seen = [(0, min(len(data), 1 << 22))], 0
    while ranges:
        at, end = ranges.pop()
        while at + 8 <= end and (seen := seen + 1) < _MOST:
            length, kind = struct.unpack_from(">I4s", data, at)
            stop = end if length == 0 else at + length
            if (length != 0 and length < 8) or stop > end:
                break
            if kind in _CONTAINERS:
                ranges.append((at + 8 + _CONTAINERS[kind], stop))
            elif kind in (b"colr", b"pixi", b"av1C"):
                yield kind, data[at + 8 : stop]
            at = stop


def depth(data: bytes) -> int:
    """Bits a sample, the most of any item."""
    found = 8
    for kind, content in boxes(data):
        if kind == b"pixi" and len(content) > 5:
            found = max(found, *content[5 : 5 + content[4]])
        elif kind == b"av1C" and len(content) > 2:
            high, twelve = content[2] >> 6 & 1, content[2] >> 5 & 1
            found = max(found, 8 + 2 * high + 2 * (high and twelve))
    return found


def color_tags(data: bytes) -> dict[str, bytes]:
    """The colours that the first nclx property names, as PNG's cICP chunk; none where they are sRGB.

    Decoded samples are RGB in full range, whatever the file holds.
    """
    for kind, content in boxes(data):
        if kind == b"colr" and content.startswith(b"nclx") and len(content) >= 10:
            return cicp(*struct.unpack_from(">HH", content, 4))
    return {}


def cicp(primaries: int, transfer: int) -> dict[str, bytes]:
    """A cICP chunk of RGB in full range; none where it says sRGB or nothing."""
    if (primaries in (1, 2) and transfer in (1, 2, 6, 13)) or max(primaries, transfer) > 255:
        return {}
    return {"cICP": bytes([primaries, transfer, 0, 1])}


def full_range(samples: np.ndarray, bits: int) -> np.ndarray:
    """Samples of some bits, shifted to the top of 16, as the full range of 16 bit."""
    if not 8 < bits < 16:
        return samples
    table = np.arange(1 << 16, dtype=np.uint32) >> (16 - bits)
    return np.rint(table * (65535 / ((1 << bits) - 1))).astype(np.uint16)[samples]
