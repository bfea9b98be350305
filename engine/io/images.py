"""Pictures in and out: PNG, JPEG, WebP and TIFF, 8 and 16 bit, read as if every file were hostile.

A file is judged by its content, never by its name: the first bytes choose one decoder from an explicit list. Sizes are
checked before pixels are decoded, animations and multi-page files are refused, and whatever a decoder raises becomes
an `ImageError` that names the file. Pillow decodes 8-bit PNG, JPEG and WebP; libvips decodes TIFF and 16-bit PNG
(Pillow opens 16-bit RGB silently as 8 bit).
"""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from engine.io.files import atomic_path
from engine.io.metadata import add_exif_to_tiff, read_metadata, reset_orientation, tiff_exif, upright_xmp

MAX_PIXELS = 100_000_000  # of an input picture
MAX_BYTES = 1 << 30  # of an input file
MAX_SCANS = 500  # of a progressive JPEG: a small file with thousands of scans keeps a decoder busy for minutes
_JPEG_SEGMENT = 65_000  # bytes of EXIF or XMP that fit into a JPEG

# Importing the plug-ins registers them, so that Pillow need not import all of its forty formats to find one.
_PLUGINS = (JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin)
SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
_LARGEST_SIDE = {"JPEG": 65_500, "WEBP": 16_383}  # what the formats can hold


class ImageError(ValueError):
    """A picture that cannot be read or written; the message names the file and says what to do."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture, upright, in the colour space of its `icc` profile (sRGB where that is None).

    Attributes:
        pixels: [H,W,3] uint8 or uint16. A gray picture has three equal channels.
        gray: the file had one colour channel; `write_image` writes one.
        alpha: [H,W] like pixels, or None where the file has no transparency.
        format: "PNG", "JPEG", "WEBP" or "TIFF".
        icc, exif, xmp: raw blocks; the EXIF orientation is already applied and reset. exif starts at the TIFF header.
        dpi: horizontal and vertical resolution.
        text: PNG text entries.
    """

    pixels: np.ndarray
    gray: bool = False
    alpha: np.ndarray | None = None
    format: str = "PNG"
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    text: dict[str, str] = field(default_factory=dict)

    def without_metadata(self) -> Picture:
        """The same picture with its colour profile (a part of its colours) but no other metadata."""
        return replace(self, exif=None, xmp=None, dpi=None, text={})


def read_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Read one picture.

    Args:
        path: a PNG, JPEG, WebP or TIFF file. Palettes are expanded, CMYK becomes sRGB (through the file's profile where
            it has one), one-bit pictures become gray.
        max_pixels: larger pictures are an error, before their pixels are decoded.

    Raises:
        ImageError: no such file, not a picture, truncated or damaged, too large, of several frames, or in a pixel
            format (floating point, 32 bit, Lab) that this project does not read.
    """
    path = Path(path)
    try:
        data = _read_bytes(path)
        kind = _sniff(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about odd metadata and large sizes; both are handled here
            picture = _READERS[kind](data, max_pixels)
        return picture
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except PermissionError:
        raise ImageError(f"{path}: not readable (permission denied)") from None
    except Exception as error:  # decoders raise nearly everything on damaged files: SyntaxError, struct.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path}: damaged or truncated picture ({reason[:200]})") from error


def picture_size(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Height and width of a picture once it is upright, from its header alone; None where that cannot be read."""
    try:
        data = _read_bytes(Path(path))
        kind = _sniff(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind in ("PNG16", "TIFF"):
                image = _load_vips(data, kind)
                orientation = image.get("orientation") if image.get_typeof("orientation") else 1
            else:
                image = _open_pillow(data, kind, MAX_BYTES)
                orientation = image.getexif().get(0x0112, 1)
    except Exception:  # whatever a decoder raises: see read_image
        return None
    swap, _ = _ORIENTATIONS.get(orientation, (False, ()))
    return (image.width, image.height) if swap else (image.height, image.width)


def write_image(
    path: str | os.PathLike[str],
    picture: Picture,
    *,
    quality: int = 95,
    sealed: Callable[[Path], None] | None = None,
) -> None:
    """Write a picture, atomically, in the format of the path's suffix.

    uint16 pixels stay 16 bit in PNG and TIFF and become 8 bit in JPEG and WebP. A gray picture is written with one
    channel (BT.601 luma). JPEG is written without chroma subsampling.

    Args:
        path: ends in .png, .jpg, .jpeg, .webp, .tif or .tiff.
        picture: what to write; metadata included as far as the format holds it.
        quality: of JPEG and WebP, 1 to 100.
        sealed: called with the finished file before it gets its name (see `atomic_path`).

    Raises:
        ImageError: an unknown suffix, or a format that cannot hold the picture (see `check_writable`).
        OSError: the file cannot be written.
    """
    path = Path(path)
    height, width = picture.pixels.shape[:2]
    kind = check_writable(path, width, height, alpha=picture.alpha is not None)
    samples = picture.pixels
    if picture.gray:
        luma = samples.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
        samples = np.rint(luma).astype(samples.dtype)[..., None]
    if picture.alpha is not None:
        samples = np.concatenate([samples, picture.alpha[..., None]], axis=2)
    if samples.dtype == np.uint16 and kind in ("JPEG", "WEBP"):
        samples = ((samples.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    with atomic_path(path, sealed=sealed) as staged:
        if samples.dtype == np.uint16 or kind == "TIFF":
            _write_vips(staged, kind, samples, picture)
        else:
            _write_pillow(staged, kind, samples, picture, quality)


def check_writable(path: str | os.PathLike[str], width: int, height: int, *, alpha: bool) -> str:
    """The format that the suffix names, or ImageError where it cannot hold such a picture. Cheap: ask before work."""
    path = Path(path)
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise ImageError(
            f"{path}: cannot write {path.suffix or 'a file without suffix'}; use one of {' '.join(SUFFIXES)}"
        )
    if alpha and kind == "JPEG":
        raise ImageError(f"{path}: JPEG cannot hold the picture's transparency; write png, webp or tiff")
    if max(width, height) > (limit := _LARGEST_SIDE.get(kind, 1 << 30)):
        raise ImageError(f"{path}: {kind} holds at most {limit} pixels a side, got {width}x{height}; write png or tiff")
    return kind


def _read_bytes(path: Path) -> bytes:
    with open(path, "rb", opener=lambda p, flags: os.open(p, flags | getattr(os, "O_NONBLOCK", 0))) as f:
        status = os.fstat(f.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("not a regular file")
        if status.st_size > MAX_BYTES:
            raise ImageError(f"{status.st_size / 2**20:.0f} MiB; files of at most {MAX_BYTES >> 20} MiB are read")
        return f.read()


def _sniff(data: bytes) -> str:
    """The decoder for a file, by its first bytes."""
    if not data:
        raise ImageError("the file is empty")
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG16" if data[24:25] == b"\x10" else "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    raise ImageError("not a PNG, JPEG, WebP or TIFF picture")


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"a picture of {width}x{height} pixels")
    if width * height > max_pixels:
        raise ImageError(
            f"{width}x{height} is {width * height / 1e6:.0f} megapixels; at most {max_pixels / 1e6:.0f} are read"
        )


def _open_pillow(data: bytes, kind: str, max_pixels: int) -> Image.Image:
    """Open by Pillow's decoder itself: Image.open has a limit of pixels of its own, which is not the caller's."""
    factory, _ = Image.OPEN[kind]
    try:
        image: Any = factory(io.BytesIO(data), "")
    except (SyntaxError, IndexError, TypeError, struct.error):
        raise ImageError(f"damaged or truncated {kind} header") from None
    _check_size(image.width, image.height, max_pixels)
    return image


def _read_pillow(kind: str) -> Callable[[bytes, int], Picture]:
    def read(data: bytes, max_pixels: int) -> Picture:
        if kind == "JPEG" and data.count(b"\xff\xda") > MAX_SCANS:
            raise ImageError(f"a JPEG of more than {MAX_SCANS} scans")
        image = _open_pillow(data, kind, max_pixels)
        # A JPEG may carry a preview or a gain map behind its picture (MPO); that is no animation.
        if kind != "JPEG" and (frames := getattr(image, "n_frames", 1)) > 1:
            raise ImageError(f"a {kind} of {frames} frames; animations are not read (extract the frames first)")
        image.load()
        metadata = read_metadata(image)
        if image.mode == "CMYK":
            image, metadata["icc"] = _cmyk_to_rgb(image, metadata["icc"]), None
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr"):
            raise ImageError(f"pixels of the kind {image.mode!r} are not read; convert the picture to 8-bit RGB")
        gray = image.mode in ("1", "L", "LA")
        alpha = None
        if image.has_transparency_data:
            image = image.convert("RGBA")
            alpha = np.asarray(image.getchannel("A"))
        return _upright(Picture(np.asarray(image.convert("RGB")), gray, alpha, kind, **metadata))

    return read


def _cmyk_to_rgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    if icc is None:
        return image.convert("RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        raise ImageError(f"its CMYK colour profile cannot be used ({error}); convert the picture to RGB") from error
    assert converted is not None  # inPlace is off
    return converted


def _vips() -> Any:
    """libvips, on first use: it takes 60 ms to load and few pictures need it."""
    import pyvips

    pyvips.cache_set_max(0)  # a cache of operations would grow over a long folder
    return pyvips


def _load_vips(data: bytes, kind: str) -> Any:
    image = _vips().Image
    load = image.tiffload_buffer if kind == "TIFF" else image.pngload_buffer
    return load(data, fail_on="error", access="sequential")


def _read_vips(kind: str) -> Callable[[bytes, int], Picture]:
    def read(data: bytes, max_pixels: int) -> Picture:
        metadata: dict[str, Any] = {}
        orientation = 1
        try:
            header = _open_pillow(data, kind, max_pixels)
            metadata = read_metadata(header)
            if kind == "TIFF":
                metadata["exif"] = tiff_exif(header)
                orientation = header.getexif().get(0x0112, 1)
        except ImageError:
            if kind != "TIFF":
                raise
        except Exception:  # Pillow does not know every layout of TIFF that libvips reads
            metadata = {}
        image = _load_vips(data, kind)
        _check_size(image.width, image.height, max_pixels)
        pages = image.get("n-pages") if image.get_typeof("n-pages") else 1
        if pages > 1:
            raise ImageError(f"a {kind} of {pages} pages; multi-page files are not read (extract the pages first)")
        if image.get_typeof("icc-profile-data"):
            metadata.setdefault("icc", image.get("icc-profile-data"))
        if image.get_typeof("image-description"):
            metadata.setdefault("text", {})["Description"] = image.get("image-description")
        if image.interpretation == "cmyk":
            image, metadata["icc"] = image.icc_transform("srgb", embedded=True, input_profile="cmyk"), None
        if image.interpretation == "b-w" and image.format == "ushort":
            image = image.copy(interpretation="grey16")
        kinds = ("srgb", "b-w", "rgb16", "grey16", "rgb")
        if image.format not in ("uchar", "ushort") or image.interpretation not in kinds or image.bands > 4:
            what = f"{image.bands} x {image.format} ({image.interpretation})"
            raise ImageError(f"pixels of the kind {what} are not read; convert the picture to RGB of 8 or 16 bit")
        samples = image.numpy()
        samples = samples[..., None] if samples.ndim == 2 else samples
        gray = samples.shape[2] <= 2
        alpha = samples[..., -1] if samples.shape[2] in (2, 4) else None
        pixels = np.repeat(samples[..., :1], 3, axis=2) if gray else samples[..., :3]
        picture = Picture(np.ascontiguousarray(pixels), gray, alpha, kind, **metadata)
        return _upright(picture, orientation if isinstance(orientation, int) else 1)

    return read


_READERS: dict[str, Callable[[bytes, int], Picture]] = {
    "PNG": _read_pillow("PNG"),
    "JPEG": _read_pillow("JPEG"),
    "WEBP": _read_pillow("WEBP"),
    "PNG16": _read_vips("PNG"),
    "TIFF": _read_vips("TIFF"),
}

# EXIF orientation -> whether to swap rows and columns first, then which axes to flip.
_ORIENTATIONS = {
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}


def _upright(picture: Picture, orientation: int = 1) -> Picture:
    """Apply the orientation of the EXIF block (or the given one, of a TIFF's own tag) and reset it in the metadata."""
    if picture.exif:
        exif, found = reset_orientation(picture.exif)
        picture = replace(picture, exif=exif)
        orientation = found if orientation == 1 else orientation
    if picture.xmp:
        picture = replace(picture, xmp=upright_xmp(picture.xmp))
    if orientation not in _ORIENTATIONS:
        return picture
    swap, flips = _ORIENTATIONS[orientation]

    def turn(a: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.flip(a.swapaxes(0, 1) if swap else a, flips))

    dpi = picture.dpi[::-1] if picture.dpi and swap else picture.dpi
    alpha = None if picture.alpha is None else turn(picture.alpha)
    return replace(picture, pixels=turn(picture.pixels), alpha=alpha, dpi=dpi)


def _write_pillow(path: Path, kind: str, samples: np.ndarray, picture: Picture, quality: int) -> None:
    """8-bit PNG, JPEG and WebP."""
    image = Image.fromarray(samples[..., 0] if samples.shape[2] == 1 else samples)
    options: dict[str, Any] = {"icc_profile": picture.icc}
    if picture.exif and (kind != "JPEG" or len(picture.exif) < _JPEG_SEGMENT):
        options["exif"] = b"Exif\0\0" + picture.exif
    if picture.dpi:
        options["dpi"] = picture.dpi
    if kind == "PNG":
        options["pnginfo"] = info = PngImagePlugin.PngInfo()
        for key, value in picture.text.items():
            info.add_itxt(key, value)
        if picture.xmp:
            info.add_itxt("XML:com.adobe.xmp", picture.xmp.decode("utf-8", "replace"))
    elif picture.xmp and (kind != "JPEG" or len(picture.xmp) < _JPEG_SEGMENT):
        options["xmp"] = picture.xmp
    if kind == "JPEG":
        options |= {"quality": quality, "subsampling": 0, "optimize": True}
    elif kind == "WEBP":
        options |= {"quality": quality, "method": 4, "exact": picture.alpha is not None}
    image.save(path, kind, **options)


def _write_vips(path: Path, kind: str, samples: np.ndarray, picture: Picture) -> None:
    """16-bit PNG and every TIFF."""
    vips = _vips()
    image = vips.Image.new_from_array(np.ascontiguousarray(samples))
    color, gray = ("srgb", "b-w") if samples.dtype == np.uint8 else ("rgb16", "grey16")
    image = image.copy(interpretation=gray if samples.shape[2] <= 2 else color)
    blobs = {"icc-profile-data": picture.icc, "xmp-data": picture.xmp}
    if picture.exif:
        blobs["exif-data"] = b"Exif\0\0" + picture.exif
    for name, blob in blobs.items():
        if blob:
            image.set_type(vips.GValue.blob_type, name, blob)
    if description := picture.text.get("Description"):
        image.set_type(vips.GValue.gstr_type, "image-description", description)
    if picture.dpi:
        image = image.copy(xres=picture.dpi[0] / 25.4, yres=picture.dpi[1] / 25.4)
    if kind == "PNG":
        for i, (key, value) in enumerate(picture.text.items()):
            image.set_type(vips.GValue.gstr_type, f"png-comment-{i}-{key}", value)
        flags = vips.enums.ForeignKeep  # without this libvips would make an EXIF block up
        keep = flags.ALL if picture.exif else flags.XMP | flags.ICC | flags.OTHER
        image.pngsave(str(path), bitdepth=16, keep=keep)
    else:
        image.tiffsave(str(path), compression="deflate", predictor="horizontal")
        if picture.exif:
            add_exif_to_tiff(path, picture.exif)
