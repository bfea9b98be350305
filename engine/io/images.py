"""Pictures in and out, read as if every file were hostile.

A file is judged by its content, never by its name: the first bytes choose one decoder of the table in `formats`. Sizes
are checked before pixels are decoded, multi-page files are refused (of an animation the first frame is taken, which is
said), and whatever a decoder raises becomes an `ImageError` that names the file.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from engine.io import metadata, profiles
from engine.io.bands import Bands
from engine.io.formats import BY_SUFFIX, LONGEST_HEAD, READABLE, SUFFIXES, Format, format_of
from engine.io.notices import warn_once
from engine.io.picture import Header, ImageError, Notice, Picture, to_8_bit, upright
from engine.io.sink import atomic_file

__all__ = ["MAX_BYTES", "MAX_PIXELS", "MAX_SIDE", "READABLE", "SUFFIXES", "ImageError", "Picture", "Put",
           "check_writable", "image_writer", "picture_size", "read_image", "read_srgb", "write_image"]  # fmt: skip

MAX_PIXELS = 100_000_000  # of an input picture
MAX_SIDE = 65_500  # decoders take seconds for pictures of a few columns and millions of rows
MAX_BYTES = 1 << 30  # of an input file
_ROWS = 256  # converted at a time

Put = Callable[[np.ndarray, np.ndarray | None], object]  # takes the next rows [n,W,3] and their mask [n,W]


def _warn(message: str) -> None:
    warn_once(message, message)


def read_image(
    path: str | os.PathLike[str],
    *,
    data: bytes | None = None,
    max_pixels: int = MAX_PIXELS,
    max_side: int = MAX_SIDE,
    notice: Notice = _warn,
) -> Picture:
    """Read one picture.

    Args:
        path: a file of any format in `formats.FORMATS`. Palettes are expanded, one-bit pictures become gray, CMYK and
            8-bit L*a*b* become sRGB; a transparency that is opaque in every pixel is none.
        data: what the file would hold, where it is no file of its own; `path` is then what messages call it.
        max_pixels, max_side: larger pictures are an error, before their pixels are decoded.
        notice: told what the file lacks although it could be read.

    Raises:
        ImageError: no such file, not a picture, truncated or damaged, too large, of several frames, in a pixel format
            (floating point, 32 bit) that this project does not read, or of a format whose decoder is not installed.
    """
    path = Path(path)

    def about(message: str) -> None:
        notice(f"{path}: {message}")

    try:
        if data is None:
            with _open(path) as file:
                data = file.read()
        row = format_of(data[:LONGEST_HEAD])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about odd metadata and large sizes; both are handled here
            known = row.header(io.BytesIO(data))
            _check_size(known, max_pixels, max_side)
            picture = row.read(data, known, about)
        if picture.pixels.shape[:2] != (known.height, known.width):
            raise ImageError(f"damaged {row.name}: its header and its pixels disagree about the size")
        return _tidy(upright(picture, known.orientation), about)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except PermissionError:
        raise ImageError(f"{path}: not readable (permission denied)") from None
    except Exception as error:  # decoders raise nearly everything on damaged files: SyntaxError, struct.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path}: damaged or truncated picture ({reason[:200]})") from error


def read_srgb(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The pixels of one picture as sRGB, for what computes with them. Transparency is dropped.

    Returns:
        [H,W,3] uint8 or uint16; uint8 where a profile or colour tags said that the numbers are not sRGB.

    Raises:
        ImageError: as `read_image`, or its colours cannot become sRGB.
    """
    picture = read_image(path, max_pixels=max_pixels)
    try:
        convert = profiles.to_srgb_unless_it_is(picture)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    return picture.pixels if convert is None else convert(picture.pixels)


def picture_size(file: str | os.PathLike[str] | BinaryIO) -> tuple[int, int] | None:
    """Height and width of a picture once it is upright, from its header alone; None where that cannot be read.

    It is the same header that `read_image` goes by.
    """
    try:
        with _open(Path(file)) if isinstance(file, (str, os.PathLike)) else file as opened, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = format_of(opened.read(LONGEST_HEAD))
            opened.seek(0)
            return row.header(opened).size
    except Exception:  # whatever a decoder raises: see read_image
        return None


def write_image(
    path: str | os.PathLike[str],
    picture: Picture,
    *,
    quality: int = 95,
    lossless: bool = False,
    notice: Notice = _warn,
    sealed: Callable[[Path], None] | None = None,
) -> None:
    """Write a picture, atomically, in the format of the path's suffix. Arguments and errors: see `image_writer`."""
    size = picture.pixels.shape[:2]
    with image_writer(path, picture, size, quality=quality, lossless=lossless, notice=notice, sealed=sealed) as put:
        put(picture.pixels, picture.alpha)


@contextmanager
def image_writer(
    path: str | os.PathLike[str],
    like: Picture,
    size: tuple[int, int],
    *,
    quality: int = 95,
    lossless: bool = False,
    notice: Notice = _warn,
    sealed: Callable[[Path], None] | None = None,
) -> Iterator[Put]:
    """Write a picture whose rows come one after another, atomically, in the format of the path's suffix.

    Yields a function that takes the next rows, [n,W,3], and, where `like` has transparency, their mask [n,W]. PNG, JPEG
    and TIFF are encoded as rows come, in little memory; the encoders of WebP, AVIF and JPEG XL hold the whole picture.

    uint16 pixels become 8 bit where the format holds no more. A gray picture is written with one channel (BT.601 luma)
    where the format has that. JPEG and AVIF are written without chroma subsampling. What the picture's numbers mean is
    kept: as PNG's own tags, as a profile, or by converting them to sRGB.

    Args:
        path: ends in one of `SUFFIXES`.
        like: what to write but for its pixels, which only say of what dtype the rows are: metadata as far as the format
            holds it, whether it is gray, whether it has transparency.
        size: (height, width).
        quality: of lossy formats, 1 to 100.
        lossless: of WebP and JPEG XL; PNG and TIFF always are.
        notice: told which metadata was left out.
        sealed: called with the finished file before it gets its name (see `atomic_path`).

    Raises:
        ImageError: an unknown suffix, or a format that cannot hold the picture (see `check_writable`) or what its
            numbers mean; before any row is asked for.
        OSError: the file cannot be written, or was not written whole.
    """
    path = Path(path)
    check_writable(path, size[1], size[0], alpha=like.alpha is not None, lossless=lossless)
    row = BY_SUFFIX[path.suffix.lower()]

    def about(message: str) -> None:
        notice(f"{path}: {message}")

    try:
        held, convert = _as_held(like, row, size, about)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from None
    sample = _samples(held, row)
    bands = Bands((*size, sample.shape[2]), sample.dtype)

    def put(pixels: np.ndarray, alpha: np.ndarray | None = None) -> None:
        for top in range(0, len(pixels), _ROWS):
            rows = slice(top, top + _ROWS)
            part = replace(held, pixels=convert(pixels[rows]), alpha=None if alpha is None else alpha[rows])
            bands.put(_samples(part, row))

    def encode() -> None:
        try:
            row.write(sink, bands, held, quality, lossless, about)  # type: ignore[misc]
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from None
        except OSError as error:
            if error.errno is None:
                raise OSError(f"{path}: {error}") from None
            raise OSError(error.errno, error.strerror, str(path)) from None

    with atomic_file(path, sealed=sealed) as sink, bands.encoding(encode):
        yield put


def check_writable(
    path: str | os.PathLike[str], width: int, height: int, *, alpha: bool, lossless: bool = False
) -> str:
    """The format that the suffix names, or ImageError where it cannot hold such a picture. Cheap: ask before work."""
    path = Path(path)
    row = BY_SUFFIX.get(path.suffix.lower())
    if row is None or row.write is None:
        raise ImageError(
            f"{path}: cannot write {path.suffix or 'a file without suffix'}; use one of {' '.join(SUFFIXES)}"
        )
    if alpha and not row.alpha:
        raise ImageError(
            f"{path}: {row.name} cannot hold the picture's transparency; write png, webp or tiff, or name a background"
        )
    if max(width, height) > row.longest:
        raise ImageError(
            f"{path}: {row.name} holds at most {row.longest} pixels a side, got {width}x{height}; write png or tiff"
        )
    if lossless and row.lossless == "never":
        raise ImageError(f"{path}: {row.name} is not written lossless; write png, tiff, webp or jxl")
    return row.name


def _open(path: Path) -> BinaryIO:
    """A regular file of a size that is read, open.

    Raises:
        ImageError: it is something else, or larger.
    """
    file = open(path, "rb", opener=lambda p, flags: os.open(p, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
        file.close()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("not a regular file")
        raise ImageError(f"{status.st_size / 2**20:.0f} MiB; files of at most {MAX_BYTES >> 20} MiB are read")
    return file


def _check_size(known: Header, max_pixels: int, max_side: int) -> None:
    width, height = known.width, known.height
    if width < 1 or height < 1:
        raise ImageError(f"a picture of {width}x{height} pixels")
    if width * height > max_pixels:
        raise ImageError(
            f"{width}x{height} is {width * height / 1e6:.6g} megapixels; at most {max_pixels / 1e6:.6g} are read"
        )
    if max(width, height) > max_side:
        raise ImageError(f"a picture of {width}x{height} pixels; at most {max_side} a side are read")


def _tidy(picture: Picture, notice: Notice) -> Picture:
    """Nothing of the metadata speaks of how the pixels were stored; an opaque mask is none, nor is a profile that
    cannot say what the numbers mean.
    """
    alpha = picture.alpha
    if alpha is not None and alpha.min() == np.iinfo(alpha.dtype).max:
        alpha = None
    if picture.icc and (reason := profiles.unusable(picture)):
        notice(f"its colour profile is left out: {reason}")
        picture = replace(picture, icc=None)
    xmp = metadata.xmp_of_pixels_alone(metadata.upright_xmp(picture.xmp)) if picture.xmp else None
    return replace(picture, alpha=alpha, xmp=xmp, exif=metadata.upright_exif(picture.exif))


def _as_held(picture: Picture, row: Format, size: tuple[int, int], notice: Notice) -> tuple[Picture, profiles.Convert]:
    """How a format holds a picture of this size, and what its pixels become: metadata that is true, the rest named.

    Returns:
        One pixel with the metadata, and the function for [n,W,3] of all others.
    """
    corner = None if picture.alpha is None else picture.alpha[:1, :1]
    picture = replace(picture, pixels=picture.pixels[:1, :1], alpha=corner)
    if row.name != "PNG":
        picture = profiles.as_tagged_by_profile(picture)
    gray_profile = picture.icc is not None and profiles.space_of(picture.icc) == "GRAY"
    convert: profiles.Convert = lambda pixels: pixels  # noqa: E731
    if (picture.icc and not row.icc) or (gray_profile and not (picture.gray and row.gray)):
        convert = profiles.to_srgb(picture)
        picture = profiles.as_srgb(picture)
    text, iptc = picture.text, picture.iptc
    if row.texts is not None and (left_out := sorted(set(text) - row.texts)):
        text = {key: value for key, value in text.items() if key in row.texts}
        notice(f"text left out, which {row.name} does not hold: {', '.join(left_out)[:200]}")
    if iptc and not row.iptc:
        iptc = None
        notice(f"IPTC left out, which {row.name} does not hold")
    exif = metadata.upright_exif(picture.exif)
    if picture.exif and not exif:
        notice("EXIF left out: it is damaged")
    exif = metadata.sized_exif(exif, size) if exif else None
    xmp = metadata.sized_xmp(picture.xmp, size) if picture.xmp else None
    return replace(picture, exif=exif, xmp=xmp, text=text, iptc=iptc), convert


def _samples(picture: Picture, row: Format) -> np.ndarray:
    """[H,W,1..4] as the format holds them."""
    shallow = picture.pixels.dtype == np.uint8 or not row.deep
    samples = to_8_bit(picture.pixels) if shallow else picture.pixels
    alpha = to_8_bit(picture.alpha) if shallow and picture.alpha is not None else picture.alpha
    if picture.gray and row.gray:
        luma = samples.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
        samples = np.rint(luma).astype(samples.dtype)[..., None]
    return samples if alpha is None else np.concatenate([samples, alpha[..., None]], axis=2)
