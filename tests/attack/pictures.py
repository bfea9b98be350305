"""Mutated pictures of every format, and bombs: files that promise or unpack to far more than they are."""

from __future__ import annotations

import functools
import gzip
import io
import json
import random
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from engine.io.images import SUFFIXES, ImageError, read_image
from engine.runtime import manifest as manifests
from tests.attack.harness import Quiet, Section, Trial
from tests.support.folders import model, write_folder
from tests.support.pictures import check_foreign, gradient, installed, mutated, write_seeds


def mutants(work: Path) -> Trial:
    """Each is a picture or one typed error; its header tells its size; what was read can be written and read again."""
    folder = work / "seeds"
    seeds = [(s.suffix, s.read_bytes()) for s in (sorted(folder.iterdir()) if folder.exists() else write_seeds(folder))]
    writable = sorted(suffix for suffix, kind in SUFFIXES.items() if installed(kind))
    for seed in folder.iterdir():  # libraries and their tables are in memory
        read_image(seed)

    def trial(number: int) -> None:
        rng, path = random.Random(number), work / "mutant"
        _, data = rng.choice(seeds)
        path.write_bytes(mutated(data, rng))
        with Quiet(work):
            check_foreign(path, work / f"out{rng.choice(writable)}")

    return trial


# ---- bombs


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, depth: int = 8, color: int = 2, more: bytes = b"", packed: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    data = chunk(b"IDAT", packed or zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + header + more + data + chunk(b"IEND", b"")


@functools.cache
def zeros(size: int) -> bytes:
    """A zlib stream of so many zeros."""
    packer, out = zlib.compressobj(9), bytearray()
    for _ in range(size >> 20):
        out += packer.compress(bytes(1 << 20))
    return bytes(out + packer.flush())


def tiff(width: int, height: int, *, compression: int = 1, data: bytes = b"", bits: int = 8, rows: int = 0) -> bytes:
    """Little-endian, one strip, three samples."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, compression), (262, 3, 2), (273, 4, 8),
            (277, 3, 3), (278, 4, rows or height), (279, 4, len(data))]  # fmt: skip
    body = data + b"\0" * (len(data) % 2)
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(tags)) + entries + bytes(4)


def encoded(kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(gradient()).save(file, kind, **options)
    return file.getvalue()


def patched(data: bytes, at: int, format: str, *values: int) -> bytes:
    return data[:at] + struct.pack(format, *values) + data[at + struct.calcsize(format) :]


def jpeg(width: int, height: int) -> bytes:
    data = encoded("JPEG")
    return patched(data, data.index(b"\xff\xc0") + 5, ">HH", height, width)


def box(data: bytes, name: bytes, *size: int) -> bytes:
    """An ISO file (AVIF, HEIC) whose image is said to have another size."""
    return patched(data, data.index(name) + 8, ">II", *size)


def gif(width: int, height: int) -> bytes:
    data = patched(encoded("GIF"), 6, "<HH", width, height)
    return patched(data, data.index(b"\x2c", 13) + 5, "<HH", width, height) if b"\x2c" in data[13:] else data


BIG = 200 << 20
LOOP = b"II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0\x08\0\0\0"
PICTURES: dict[str, Callable[[], bytes]] = {
    "PNG 2^31-1 squared": lambda: png(2**31 - 1, 2**31 - 1),
    "PNG 1 x 100,000,000": lambda: png(1, 100_000_000),
    "PNG 100,000,000 x 1": lambda: png(100_000_000, 1),
    "PNG 65,501 x 1": lambda: png(65_501, 1),
    "PNG 1 x 1,048,576": lambda: png(1, 1 << 20),
    "PNG 16 bit of 20,000,000 rows": lambda: png(1, 20_000_000, depth=16),
    "PNG 30,000 squared": lambda: png(30_000, 30_000, packed=zeros(BIG)),
    "PNG with far more data than pixels": lambda: png(8, 8, packed=zeros(BIG)),
    "PNG with a profile of 200 MB": lambda: png(8, 8, more=chunk(b"iCCP", b"x\0\0" + zeros(BIG))),
    "PNG with text of 200 MB": lambda: png(8, 8, more=chunk(b"zTXt", b"x\0\0" + zeros(BIG))),
    "PNG with EXIF that points at itself": lambda: png(8, 8, more=chunk(b"eXIf", LOOP)),
    "PNG of 100,000 chunks": lambda: png(8, 8, more=chunk(b"tEXt", b"k\0v") * 100_000),
    "PNG whose chunk is 2^31 long": lambda: png(8, 8)[:33] + struct.pack(">I", 2**31 - 1) + b"IDAT",
    "TIFF 1 x 99,000,000": lambda: tiff(1, 99_000_000),
    "TIFF 99,000,000 x 1": lambda: tiff(99_000_000, 1),
    "TIFF 2^32-1 squared": lambda: tiff(2**32 - 1, 2**32 - 1),
    "TIFF 65,500 squared": lambda: tiff(65_500, 65_500),
    "TIFF 30,000 squared, deflated": lambda: tiff(30_000, 30_000, compression=8, data=zeros(BIG)),
    "TIFF a row a strip": lambda: tiff(1, 60_000_000, rows=1),
    "TIFF of 16 bit, 40,000 squared": lambda: tiff(40_000, 40_000, bits=16),
    "TIFF whose directory points at itself": lambda: tiff(8, 8, data=bytes(192))[:-4] + struct.pack("<I", 200),
    "JPEG 65,535 squared": lambda: jpeg(65_535, 65_535),
    "JPEG 1 x 65,535": lambda: jpeg(1, 65_535),
    "JPEG of 100,000 comments": lambda: encoded("JPEG")[:2] + b"\xff\xfe\0\4xx" * 100_000 + encoded("JPEG")[2:],
    "JPEG of 0 x 0": lambda: jpeg(0, 0),
    "WebP 16,383 squared": lambda: patched(encoded("WEBP"), 26, "<HH", 16_383, 16_383),
    "BMP 2^31-1 squared": lambda: patched(encoded("BMP"), 18, "<ii", 2**31 - 1, 2**31 - 1),
    "BMP of minus 2^31 rows": lambda: patched(encoded("BMP"), 18, "<ii", 1, -(2**31)),
    "GIF 65,535 squared": lambda: gif(65_535, 65_535),
    "PPM 1,000,000,000 squared": lambda: b"P6 1000000000 1000000000 255\n",
    "PGM of a number without end": lambda: b"P5 " + b"9" * 1_000_000 + b" 1 255\n",
    "PPM of a comment without end": lambda: b"P6 #" + b" " * 10_000_000,
    "AVIF 2^32-1 squared": lambda: box(encoded("AVIF"), b"ispe", 2**32 - 1, 2**32 - 1),
    "AVIF 60,000 squared": lambda: box(encoded("AVIF"), b"ispe", 60_000, 60_000),
    "gzip of 200 MB": lambda: gzip.compress(bytes(BIG), 1),
}  # fmt: skip

MANIFESTS: dict[str, Callable[[], bytes]] = {
    "manifest nested 100,000 deep": lambda: b"[" * 100_000,
    "manifest of 100,000 names": lambda: json.dumps({str(i): 0 for i in range(100_000)}).encode(),
    "manifest with a number of 1,000,000 digits": lambda: b'{"format": ' + b"9" * 1_000_000 + b"}",
    "manifest of 1 MB of spaces": lambda: b"{}" + b" " * (1 << 20),
    "manifest of one long text": lambda: b'{"backend": "' + b"x" * 1_000_000 + b'"}',
}


def bombs(work: Path) -> Trial:
    """Refused within a second, or a picture of a sane size within two; in little memory."""
    good = write_folder(work / "folder", model())
    names = [*PICTURES, *MANIFESTS]
    for number, make in enumerate([*PICTURES.values(), *MANIFESTS.values()]):
        (work / str(number)).write_bytes(make())
    zeros.cache_clear()

    def trial(number: int) -> None:
        name = names[number]
        if name in MANIFESTS:
            content = (work / str(number)).read_bytes()
            (good / "manifest.json").write_bytes(content)
            (good / "manifest.sha256").write_bytes(manifests._checksum(content))
            try:
                manifests.load(good)
            except manifests.FolderError as error:
                assert "\n" not in str(error) and len(str(error)) < 600, name
                return
            raise AssertionError(f"{name}: accepted")
        began = time.process_time()
        with Quiet(work):
            try:
                picture = read_image(work / str(number), notice=lambda _: None)
            except ImageError as error:
                assert "\n" not in str(error), name
                assert time.process_time() - began < 1, name
                return
        assert picture.pixels.size < 10_000_000, name

    return trial


SECTIONS = [
    Section("pictures", "mutated pictures, every format", 20_000, mutants, chunk=250, inside=True, seconds=2, mib=500),
    Section("bombs", "bombs", len(PICTURES) + len(MANIFESTS), bombs, chunk=4, seconds=2, mib=200),
]
