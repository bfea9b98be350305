"""Pictures as files: of every kind that is read, and mutations of them."""

from __future__ import annotations

import importlib.util
import random
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
import pyvips
from PIL import Image, ImageCms

from engine.io.images import ImageError, Picture, picture_size, read_image, write_image

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PACKAGES = {"JXL": "pillow_jxl", "HEIC": "pillow_heif"}  # format -> what reads it, an extra


def installed(kind: str) -> bool:
    """Whether what reads a format is installed."""
    return kind not in PACKAGES or importlib.util.find_spec(PACKAGES[kind]) is not None


def needs(kind: str) -> None:
    """Skip the test where a format's codec is not installed."""
    if not installed(kind):
        pytest.skip(f"{kind} needs the extra `formats`")


def gradient(height: int = 24, width: int = 37, dtype: type = np.uint8) -> np.ndarray:
    """A smooth picture whose channels, rows and columns all differ."""
    y, x = np.mgrid[0:height, 0:width]
    planes = np.stack([x / width, y / height, (x + y) / (height + width)], axis=2)
    return np.rint(planes * np.iinfo(dtype).max).astype(dtype)


def exif_block(orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[271] = orientation, "Maker"
    exif[0x8769] = {0x9003: "2020:01:01 00:00:00", 0xA002: 37, 0xA003: 24}
    return exif.tobytes()


def resident() -> float:
    """This process's peak memory in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def save(path: Path, pixels: np.ndarray, **more) -> Path:
    """Write [H,W,3] pixels, with what else a Picture has, and make the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, Picture(np.ascontiguousarray(pixels), **more))
    return path


def write_seeds(folder: Path) -> list[Path]:
    """A good file of every kind that is decoded differently, as far as what reads it is installed."""
    folder.mkdir()
    for i, (dtype, suffix) in enumerate([(np.uint8, "png"), (np.uint16, "png"), (np.uint8, "tif"), (np.uint16, "tif")]):
        tags = {"gAMA": struct.pack(">I", 45455)} if suffix == "png" else {}
        picture = Picture(
            gradient(dtype=dtype), icc=SRGB, exif=exif_block()[6:], iptc=b"\x1c\2\5\0\1x", color_tags=tags
        )
        write_image(folder / f"{i}.{suffix}", picture, notice=lambda _: None)
    image = Image.fromarray(gradient())
    image.save(folder / "a.jpg", exif=exif_block(6), icc_profile=SRGB, dpi=(72, 72), comment="words")
    image.save(folder / "b.jpg", progressive=True)
    image.convert("CMYK").save(folder / "c.jpg")
    image.save(folder / "d.webp", exif=exif_block(3))
    image.save(folder / "e.webp", lossless=True)
    image.convert("P").save(folder / "f.png", transparency=3)
    for compression in ("tiff_lzw", "packbits", "jpeg", "group4"):
        page = image.convert("1") if compression == "group4" else image
        page.save(folder / f"{compression}.tif", compression=compression)
    image.convert("CMYK").save(folder / "cmyk.tif")
    image.save(folder / "g.avif", exif=exif_block(6))
    deep = pyvips.Image.new_from_array(gradient(dtype=np.uint16)).copy(interpretation="rgb16")
    deep.heifsave(str(folder / "h.avif"), compression="av1", bitdepth=10)
    image.save(folder / "i.bmp")
    image.save(folder / "j.gif")
    image.save(folder / "k.ppm")
    (folder / "l.pgm").write_bytes(b"P5 37 24 65535\n" + gradient(dtype=np.uint16)[..., 0].astype(">u2").tobytes())
    alpha = Image.fromarray(gradient()[..., 2])
    image.save(folder / "o.tga")
    Image.merge("RGBA", (*image.split(), alpha)).save(folder / "p.tga", compression="tga_rle")
    head = b"P7\nWIDTH 37\nHEIGHT 24\nDEPTH 4\nMAXVAL 255\nTUPLTYPE RGB_ALPHA\nENDHDR\n"
    (folder / "q.pam").write_bytes(head + np.dstack([gradient(), gradient()[..., :1]]).tobytes())
    for name in ("r.png", "s.webp"):
        image.save(folder / name, save_all=True, append_images=[image.rotate(180)])
    if installed("JXL"):
        write_image(folder / "m.jxl", Picture(gradient(), exif=exif_block()[6:]))
    if installed("HEIC"):
        import pillow_heif

        pillow_heif.from_pillow(image).save(folder / "n.heic")
    return sorted(folder.iterdir())


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A file with some bytes changed, cut out, repeated, or replaced by numbers that matter."""
    out = bytearray(data)
    kind = rng.randrange(5)
    if kind == 0:
        return bytes(out[: rng.randrange(len(out))])
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        at = rng.randrange(len(out))
        if kind == 1:
            out[at] = rng.randrange(256)
        elif kind == 2:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            number = rng.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 65535, 70000))
            out[at : at + 4] = struct.pack(rng.choice("<>") + "I", number)
        else:
            end = at + rng.randrange(200)
            out[at:end] = out[at:end] * 2 if rng.random() < 0.5 else b""
            out = out or bytearray(1)
    return bytes(out)


def check_foreign(path: Path, target: Path) -> Picture | None:
    """A foreign file is refused in one line (None), or is a picture of its header's size that survives `target`."""
    try:
        picture = read_image(path, max_pixels=4_000_000, notice=lambda _: None)
    except ImageError as error:
        assert "\n" not in str(error), str(error)
        return None
    assert picture.pixels.dtype in (np.uint8, np.uint16) and picture.pixels.shape[2] == 3
    assert picture_size(path) == picture.pixels.shape[:2]
    if picture.pixels.size <= 100_000:
        try:
            write_image(target, picture, notice=lambda _: None)
        except ImageError:  # transparency in a JPEG, colour tags of no colours
            return picture
        assert read_image(target, notice=lambda _: None).pixels.shape == picture.pixels.shape
    return picture
