"""TIFF, through libvips; Pillow reads the directory, and the colours that libvips takes for RGB."""

from __future__ import annotations

import io
from typing import Any, BinaryIO

import numpy as np
from PIL import TiffImagePlugin

from engine.io import metadata
from engine.io.codecs.libraries import (
    common_metadata,
    open_pillow,
    samples_of,
    sensible_dpi,
    split,
    unpremultiply,
    vips,
    vips_image,
)
from engine.io.picture import Header, ImageError, Notice, Picture
from engine.io.profiles import cmyk_to_rgb, lab_to_rgb
from engine.io.sink import Sink
from engine.io.tiff_exif import add_exif_to_tiff, clear_resolution, tiff_exif

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION = 256, 257, 258, 259, 262, 274
_SAMPLES, _EXTRA, _FORMAT, _SUBSAMPLING, _DESCRIPTION = 277, 338, 339, 530, 270
_RGB, _CMYK, _YCBCR, _LAB = 2, 5, 6, 8
_NAMES = {9: "ICC L*a*b*", 10: "ITU L*a*b*", 32803: "a colour filter array", 32844: "LogL", 32845: "LogLuv",
          34892: "linear raw"}  # fmt: skip
_COLORS = {0: 1, 1: 1, 2: 3, 3: 1, 4: 1, 5: 4, 6: 3, 8: 3}  # photometric interpretation -> samples of a pixel
_JPEG = (6, 7)
_ASSOCIATED, _UNASSOCIATED = 1, 2
_BIG = 3_500_000_000  # bytes of samples from which on offsets of 32 bits may not do


def header(file: BinaryIO) -> Header:
    tags = _tags(file)
    width, height, orientation = (_whole(tags, tag, 1) for tag in (_WIDTH, _HEIGHT, _ORIENTATION))
    return Header(width, height, orientation if 1 <= orientation <= 8 else 1)


def _tags(file: BinaryIO) -> Any:
    """The first page's directory.

    Raises:
        ImageError: it is damaged, or there are more pages.
    """
    file.seek(0)
    head = file.read(8)
    if head[2:3] == b"+" or head[3:4] == b"+":
        head += file.read(8)
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(head)
        file.seek(tags.next)
        tags.load(file)
        more = tags.next
    except Exception:  # Pillow's reader raises nearly everything on damaged directories
        raise ImageError("damaged or truncated TIFF header") from None
    if _WIDTH not in tags or _HEIGHT not in tags:
        raise ImageError("damaged or truncated TIFF header")
    if more:
        raise ImageError("a TIFF of several pages; multi-page files are not read (extract the pages first)")
    return tags


def _whole(tags: Any, tag: int, default: int) -> int:
    """A tag's first value as a whole number."""
    value = _value(tags, tag)
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int) else default


def _value(tags: Any, tag: int) -> Any:
    try:
        return tags.get(tag)
    except Exception:  # as above
        raise ImageError("damaged or truncated TIFF header") from None


def read(data: bytes, known: Header, notice: Notice) -> Picture:
    tags = _tags(io.BytesIO(data))
    image = vips().Image.tiffload_buffer(data, fail_on="error", access="sequential")
    if (image.height, image.width) != (known.height, known.width):
        raise ImageError("damaged TIFF header")
    found = _metadata(data, image)
    meaning, samples = _whole(tags, _PHOTOMETRIC, -1), _samples(data, tags, image)
    extra = _value(tags, _EXTRA) or ()
    extra = extra if isinstance(extra, tuple) else (extra,)
    colors = 3 if samples.shape[2] >= 3 and meaning in (_YCBCR, _LAB, 3) else _COLORS.get(meaning, samples.shape[2])
    if samples.shape[2] < colors:
        raise ImageError("damaged TIFF header")
    alpha = None
    if samples.shape[2] > colors:
        if extra and extra[0] in (_ASSOCIATED, _UNASSOCIATED):
            alpha = np.ascontiguousarray(samples[..., colors])
        else:
            notice(
                f"{samples.shape[2] - colors} extra sample(s) a pixel left out: the file does not say what they mean"
            )
    samples = samples[..., :colors]
    if colors == 4:
        pixels, gray = cmyk_to_rgb(np.ascontiguousarray(samples), found["icc"]), False
        found["icc"] = None
    else:
        pixels, gray, _ = split(samples)
    if alpha is not None and extra[0] == _ASSOCIATED:
        pixels = unpremultiply(pixels, alpha)
    return Picture(pixels, gray, alpha, "TIFF", **found)


def _samples(data: bytes, tags: Any, image: Any) -> np.ndarray:
    """[H,W,bands] uint8 or uint16: gray, RGB or CMYK with what comes behind.

    Raises:
        ImageError: pixels of another kind, by name.
    """
    meaning, kind = _whole(tags, _PHOTOMETRIC, -1), image.format
    bits = _whole(tags, _BITS, 1)
    if meaning in _NAMES or (meaning == _LAB and (bits != 8 or image.bands != 3)):
        what = _NAMES.get(meaning, f"L*a*b* of {bits} bits and {image.bands} samples")
        raise ImageError(f"pixels of the kind {what} are not read; convert the picture to RGB of 8 or 16 bit")
    if meaning == _LAB:
        lab = open_pillow(TiffImagePlugin.TiffImageFile, io.BytesIO(data))
        lab.load()
        if lab.mode != "LAB":
            raise ImageError(f"pixels of the kind L*a*b* ({lab.mode}) are not read; convert the picture to RGB")
        return lab_to_rgb(lab)
    if meaning == _YCBCR and _whole(tags, _COMPRESSION, 1) not in _JPEG:
        return _from_ycbcr(tags, image)
    if image.format not in ("uchar", "ushort") or meaning not in _COLORS:
        what = f"{image.bands} x {kind} ({image.interpretation})"
        raise ImageError(f"pixels of the kind {what} are not read; convert the picture to RGB of 8 or 16 bit")
    return samples_of(image)


def _from_ycbcr(tags: Any, image: Any) -> np.ndarray:
    """Full-range YCbCr that libvips hands on as it is stored (TIFF 6.0, section 21).

    Raises:
        ImageError: its chroma is subsampled, or it is in reference ranges of video.
    """
    subsampling = _value(tags, _SUBSAMPLING) or (2, 2)
    reference = _value(tags, 532) or (0, 255, 128, 255, 128, 255)
    weights = tuple(round(float(w), 3) for w in (_value(tags, 529) or (0.299, 0.587, 0.114)))
    usual = tuple(round(float(value)) for value in reference) == (0, 255, 128, 255, 128, 255)
    if tuple(subsampling) != (1, 1) or not usual or image.format != "uchar" or image.bands != 3 or len(weights) != 3:
        raise ImageError("pixels of the kind YCbCr with subsampled chroma or reduced range are not read; "
                         "convert the picture to RGB")  # fmt: skip
    red, green, blue = weights
    if min(weights) <= 0:
        raise ImageError("damaged TIFF header")
    stored = samples_of(image)
    out = np.empty_like(stored)
    for top in range(0, len(stored), 256):
        y, cb, cr = np.moveaxis(stored[top : top + 256] - np.array([0, 128, 128], np.float32), 2, 0)
        r, b = y + cr * (2 - 2 * red), y + cb * (2 - 2 * blue)
        planes = np.stack([r, (y - red * r - blue * b) / green, b], axis=2)
        out[top : top + 256] = np.clip(np.rint(planes), 0, 255)
    return out


def _metadata(data: bytes, image: Any) -> dict[str, Any]:
    """What libvips and Pillow find; Pillow does not know every layout of TIFF that libvips reads."""

    def field(name: str) -> Any:
        return image.get(name) if image.get_typeof(name) else None

    found: dict[str, Any] = {"icc": field("icc-profile-data") or None, "iptc": field("iptc-data") or None}
    found["xmp"] = field("xmp-data") or None
    for key in ("icc", "iptc", "xmp"):
        if found[key] is not None and len(found[key]) > metadata.MAX_METADATA:
            found[key] = None
    description = field("image-description")
    found["text"] = {"Description": description} if isinstance(description, str) and description else {}
    try:
        opened = open_pillow(TiffImagePlugin.TiffImageFile, io.BytesIO(data))
        found["exif"] = tiff_exif(opened)
        unit = opened.tag_v2.get(296, 2)
        found["dpi"] = sensible_dpi(common_metadata(opened.info)["dpi"]) if unit in (2, 3) else None
    except Exception:
        pass
    return found


def write(sink: Sink, samples: np.ndarray, picture: Picture, quality: int, lossless: bool, notice: Notice) -> None:
    """Write a TIFF through a target that can go back, then put EXIF into its directory."""
    image = vips_image(samples)
    types = vips().GValue
    for name, block in {"icc-profile-data": picture.icc, "xmp-data": picture.xmp, "iptc-data": picture.iptc}.items():
        if block:
            image.set_type(types.blob_type, name, block)
    if description := picture.text.get("Description"):
        image.set_type(types.gstr_type, "image-description", description)
    if picture.dpi:
        image = image.copy(xres=picture.dpi[0] / 25.4, yres=picture.dpi[1] / 25.4)
    with sink.target(seekable=True) as target:
        image.tiffsave_target(target, compression="deflate", predictor="horizontal", resunit="inch",
                              bigtiff=samples.nbytes > _BIG)  # fmt: skip
    if not picture.dpi:
        clear_resolution(sink)
    if picture.exif and not add_exif_to_tiff(sink, picture.exif):
        notice("EXIF left out: it is damaged")
