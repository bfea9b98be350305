"""TIFF, through libvips; Pillow reads the directory, and the colours that libvips takes for RGB."""

from __future__ import annotations

import io
from typing import Any, BinaryIO

import numpy as np
from PIL import TiffImagePlugin

from engine.io import metadata
from engine.io.bands import Bands
from engine.io.codecs import jpeg
from engine.io.libraries import (
    common_metadata,
    open_pillow,
    samples_of,
    sensible_dpi,
    split,
    vips,
)
from engine.io.picture import Header, ImageError, Notice, Picture
from engine.io.profiles import cmyk_to_rgb, lab_to_rgb, space_of
from engine.io.sink import Sink
from engine.io.tiff_exif import add_to_tiff, clear_resolution, iptc_of_tiff, tiff_exif

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION = 256, 257, 258, 259, 262, 274
_SAMPLES, _EXTRA, _WEIGHTS, _SUBSAMPLING, _REFERENCE = 277, 338, 529, 530, 532
_KIND, _PLANES, _TILE_WIDTH, _SUB_DIRECTORIES = 254, 284, 322, 330
_REDUCED, _MASK = 1, 4  # bits of a page's kind: a smaller copy of another page, a mask of one
_MOST_PAGES = 100  # looked at
_FULL_RANGE = (0, 255, 128, 255, 128, 255)
_PALETTE, _CMYK, _YCBCR, _LAB = 3, 5, 6, 8
_NAMES = {9: "ICC L*a*b*", 10: "ITU L*a*b*", 32803: "a colour filter array", 32844: "LogL", 32845: "LogLuv",
          34892: "linear raw"}  # fmt: skip
_COMPRESSIONS = {34887: "LERC", 34925: "LZMA", 34933: "PNG", 50000: "Zstandard", 50001: "WebP", 50002: "JPEG XL",
                 52546: "JPEG XL"}  # fmt: skip
_COLORS = {0: 1, 1: 1, 2: 3, 3: 1, 4: 1, 5: 4, 6: 3, 8: 3}  # photometric interpretation -> samples of a pixel
_JPEG = (6, 7)
_STRIPS, _STRIP_ROWS, _COUNTS, _TILE_ROWS, _TILES, _TABLES = 273, 278, 279, 323, 324, 347
_MOST_JPEGS = 10_000  # strips or tiles that are looked at: each takes a tenth of a millisecond
_TRANSPARENCY = (1, 2)  # premultiplied, which libvips divides, and not
_BIG = 3_500_000_000  # bytes of samples from which on offsets of 32 bits may not do


def header(file: BinaryIO) -> Header:
    tags = _tags(file)
    width, height, orientation = (_whole(tags, tag, 1) for tag in (_WIDTH, _HEIGHT, _ORIENTATION))
    return Header(width, height, orientation if 1 <= orientation <= 8 else 1)


def _tags(file: BinaryIO) -> Any:
    """The first page's directory.

    Raises:
        ImageError: it is damaged, there are more pages that are pictures of their own, or it is but the preview of a
            camera's raw file.
    """
    file.seek(0)
    head = file.read(8)
    if head[2:3] == b"+" or head[3:4] == b"+":
        head += file.read(8)
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(head)
        file.seek(tags.next)
        tags.load(file)
        kinds: list[int] = []
        more = tags.next
        while more and len(kinds) < _MOST_PAGES:
            page = TiffImagePlugin.ImageFileDirectory_v2(head)
            file.seek(more)
            page.load(file)
            kinds.append(_whole(page, _KIND, 0))
            more = page.next
    except Exception:  # Pillow's reader raises nearly everything on damaged directories
        raise ImageError("damaged or truncated TIFF header") from None
    if _WIDTH not in tags or _HEIGHT not in tags:
        raise ImageError("damaged or truncated TIFF header")
    if _whole(tags, _KIND, 0) & _REDUCED and (kinds or _SUB_DIRECTORIES in tags):
        raise ImageError("only a preview can be read of this file, a camera's raw file as it seems; develop it first")
    if more or not all(kind & (_REDUCED | _MASK) for kind in kinds):
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
    meaning = _whole(tags, _PHOTOMETRIC, -1)
    _refuse(tags, meaning)
    if meaning == _LAB:
        lab = open_pillow(TiffImagePlugin.TiffImageFile, io.BytesIO(data))
        found = _metadata(data, None)
        lab.load()
        return Picture(lab_to_rgb(lab), False, None, "TIFF", **(found | {"icc": None}))
    image = vips().Image.tiffload_buffer(data, fail_on="error", access="sequential")
    if (image.height, image.width) != (known.height, known.width):
        raise ImageError("damaged TIFF header")
    if image.format not in ("uchar", "ushort"):
        what = f"{image.bands} x {image.format} ({image.interpretation})"
        raise ImageError(f"pixels of the kind {what} are not read; convert the picture to RGB of 8 or 16 bit")
    found = _metadata(data, image)
    compression = _whole(tags, _COMPRESSION, 1)
    try:
        samples = samples_of(image)
    except vips().Error as error:
        if "not configured" not in str(error) and "not implemented" not in str(error):
            raise
        how = _COMPRESSIONS.get(compression, f"of kind {compression}")
        raise ImageError(f"its compression ({how}) is not read here; save it with Deflate or LZW") from None
    if compression == _JPEG[1] and _whole(tags, _BITS, 1) == 8:
        _check_jpegs(data, tags)
    extra = _value(tags, _EXTRA) or ()
    extra = extra if isinstance(extra, tuple) else (extra,)
    # A palette is expanded already, to gray or to RGB.
    colors = _COLORS[meaning] if meaning != _PALETTE else 3 if samples.shape[2] >= 3 else 1
    if samples.shape[2] < colors:
        raise ImageError("damaged TIFF header")
    alpha = None
    if samples.shape[2] > colors:
        if extra and extra[0] in _TRANSPARENCY:
            alpha = np.ascontiguousarray(samples[..., colors])
        else:
            left_out = samples.shape[2] - colors
            notice(f"{left_out} extra sample(s) a pixel left out: the file does not say what they mean")
    samples = samples[..., :colors]
    if meaning == _CMYK:
        pixels, gray = cmyk_to_rgb(np.ascontiguousarray(samples), found["icc"]), False
        found["icc"] = None
    elif meaning == _YCBCR and compression not in _JPEG:
        pixels, gray = _from_ycbcr(samples, _luma_weights(tags)), False
    else:
        pixels, gray, _ = split(samples)
    return Picture(pixels, gray, alpha, "TIFF", **found)


def _check_jpegs(data: bytes, tags: Any) -> None:
    """Look at the JPEGs of a TIFF: its decoder leaves gray or black what they lack.

    Raises:
        ImageError: pixels are missing.
    """
    places, sizes = (_value(tags, _TILES) or _value(tags, _STRIPS), _value(tags, _TILES + 1) or _value(tags, _COUNTS))
    height = _whole(tags, _HEIGHT, 1)
    tiled = _TILES in tags
    rows = _whole(tags, _TILE_ROWS if tiled else _STRIP_ROWS, height)
    if not isinstance(places, tuple) or not isinstance(sizes, tuple) or len(places) > _MOST_JPEGS or rows < 1:
        return
    tables = _value(tags, _TABLES)
    for number, (at, size) in enumerate(zip(places, sizes)):
        part = data[at : at + size]
        if isinstance(tables, bytes) and len(tables) > 4:
            part = tables[:-2] + part[2:]
        strips = -(-height // rows)  # of one plane
        expected = rows if tiled else min(rows, height - number % strips * rows)
        if jpeg.lacks_pixels(part, expected):
            raise ImageError("truncated TIFF: a part of its pixels is missing")


def _refuse(tags: Any, meaning: int) -> None:
    """Raise an ImageError for pixels of a kind that is not read, by its name."""
    bits, samples = _whole(tags, _BITS, 1), _whole(tags, _SAMPLES, 1)
    what = _NAMES.get(meaning, f"photometric interpretation {meaning}") if meaning not in _COLORS else ""
    if bits not in (1, 2, 4, 8, 16, 32):
        what = f"{bits} bits a sample"
    elif _whole(tags, _PLANES, 1) == 2 and _TILE_WIDTH in tags and samples > 1:
        what = "tiles with one plane for each colour"
    if meaning == _LAB and (bits != 8 or samples != 3):
        what = f"L*a*b* of {bits} bits and {samples} samples"
    if meaning == _YCBCR and _whole(tags, _COMPRESSION, 1) not in _JPEG:
        subsampling, reference = _value(tags, _SUBSAMPLING) or (2, 2), _value(tags, _REFERENCE) or _FULL_RANGE
        if tuple(subsampling) != (1, 1):
            what = "YCbCr with subsampled chroma"
        elif tuple(round(float(value)) for value in reference) != _FULL_RANGE or (bits, samples) != (8, 3):
            what = "YCbCr of reduced range or other depth"
        elif min(_luma_weights(tags)) <= 0:
            raise ImageError("damaged TIFF header")
    if what:
        raise ImageError(f"pixels of the kind {what} are not read; convert the picture to RGB of 8 or 16 bit")


def _luma_weights(tags: Any) -> tuple[float, ...]:
    weights = _value(tags, _WEIGHTS)
    return tuple(float(w) for w in weights) if weights and len(weights) == 3 else (0.299, 0.587, 0.114)


def _from_ycbcr(stored: np.ndarray, weights: tuple[float, ...]) -> np.ndarray:
    """Full-range YCbCr, uint8, that libvips hands on as it is stored -> RGB (TIFF 6.0, section 21)."""
    red, green, blue = weights
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
        return image.get(name) if image is not None and image.get_typeof(name) else None

    found: dict[str, Any] = {"icc": field("icc-profile-data") or None}
    found["xmp"] = field("xmp-data") or None
    for key in ("icc", "xmp"):
        if found[key] is not None and len(found[key]) > metadata.MAX_METADATA:
            found[key] = None
    description = field("image-description")
    found["text"] = {"Description": description} if isinstance(description, str) and description else {}
    try:
        opened = open_pillow(TiffImagePlugin.TiffImageFile, io.BytesIO(data))
        found["exif"] = tiff_exif(opened)
        found["iptc"] = iptc_of_tiff(opened.tag_v2)
        unit = opened.tag_v2.get(296, 2)
        found["dpi"] = sensible_dpi(common_metadata(opened.info)["dpi"]) if unit in (2, 3) else None
    except Exception:
        pass
    return found


def write(sink: Sink, bands: Bands, picture: Picture, quality: int, lossless: bool, notice: Notice) -> None:
    """Write a TIFF through a target that can go back, then put EXIF into its directory."""
    image = bands.image()
    types = vips().GValue
    for name, block in {"icc-profile-data": picture.icc, "xmp-data": picture.xmp}.items():
        if block:
            image.set_type(types.blob_type, name, block)
    if description := picture.text.get("Description"):
        image.set_type(types.gstr_type, "image-description", description)
    if picture.dpi:
        image = image.copy(xres=picture.dpi[0] / 25.4, yres=picture.dpi[1] / 25.4)
    with sink.target(seekable=True) as target:
        image.tiffsave_target(target, compression="deflate", predictor="horizontal", resunit="inch",
                              bigtiff=bands.nbytes > _BIG)  # fmt: skip
    if not picture.dpi:
        clear_resolution(sink)
    added = {"EXIF": {"exif": picture.exif}, "IPTC": {"iptc": picture.iptc}}
    if picture.icc and space_of(picture.icc) != ("RGB" if bands.shape[2] >= 3 else "GRAY"):  # libvips drops it
        added["colour profile"] = {"icc": picture.icc}
    for name, more in added.items():
        if any(more.values()) and not add_to_tiff(sink, **more):
            notice(f"{name} left out: it is damaged, or the file has no room for it")
