"""What the numbers of a picture mean: profiles, PNG's colour tags, CMYK and Lab.

Where a container cannot say what another one said, the meaning becomes an ICC profile, or the numbers become sRGB.
"""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from PIL import Image, ImageCms

from engine.io.picture import ImageError, Picture, to_8_bit

TAGS = ("cICP", "sRGB", "gAMA", "cHRM")  # PNG's, the first that is there counts; cICP before and the others after iCCP
Convert = Callable[[np.ndarray], np.ndarray]
_D65 = (0.3127, 0.3290)
_D50 = (0.9642, 1.0, 0.8249)  # XYZ
_BT709 = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
_P3 = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
# ITU-T H.273: colour primaries with their white, and transfer functions as a gamma, or the name of a curve.
_PRIMARIES = {
    1: (_BT709, _D65),
    4: (((0.67, 0.33), (0.21, 0.71), (0.14, 0.08)), (0.310, 0.316)),
    5: (((0.64, 0.33), (0.29, 0.60), (0.15, 0.06)), _D65),
    6: (((0.63, 0.34), (0.31, 0.595), (0.155, 0.07)), _D65),
    7: (((0.63, 0.34), (0.31, 0.595), (0.155, 0.07)), _D65),
    9: (((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)), _D65),
    11: (_P3, (0.314, 0.351)),
    12: (_P3, _D65),
}
_TRANSFERS: dict[int, float | str] = {1: "bt709", 4: 2.2, 5: 2.8, 6: "bt709", 8: 1.0, 13: "srgb", 14: "bt709",
                                      15: "bt709"}  # fmt: skip
_HDR = {16: "PQ", 18: "HLG"}
_UNSPECIFIED = 2


def profile_of(tags: Mapping[str, bytes], gray: bool = False) -> bytes | None:
    """An ICC profile that says what PNG's colour tags say; None where they say sRGB, or nothing.

    Args:
        tags: chunks by name.
        gray: a profile for one channel; then primaries mean nothing.

    Raises:
        ImageError: they describe HDR or a colour space that a profile of three curves and a matrix cannot.
    """
    if "cICP" in tags:
        primaries, transfer, matrix, full_range = tags["cICP"][:4].ljust(4, b"\xff")
        if transfer in _HDR:
            raise ImageError(
                f"its colours are HDR ({_HDR[transfer]}), which only PNG keeps here; write png, or convert it to SDR"
            )
        primaries = 1 if primaries == _UNSPECIFIED else primaries
        transfer = 13 if transfer == _UNSPECIFIED else transfer
        if primaries not in _PRIMARIES or transfer not in _TRANSFERS or matrix != 0 or full_range != 1:
            raise ImageError(f"its colour space (cICP {tags['cICP'].hex(' ')}) is kept in PNG only; write png")
        if transfer == 13 and (gray or primaries == 1):
            return None
        curve = _TRANSFERS[transfer]
        return gray_profile(curve) if gray else matrix_profile(*_PRIMARIES[primaries], curve)
    if "sRGB" in tags or not tags:
        return None
    curve = "srgb"
    points, white = _PRIMARIES[1]
    if len(tags.get("gAMA", b"")) == 4 and (gamma := struct.unpack(">I", tags["gAMA"])[0]):
        curve = "srgb" if gamma == 45455 and (gray or "cHRM" not in tags) else 100_000 / gamma
    if gray:
        return None if curve == "srgb" else gray_profile(curve)
    if len(tags.get("cHRM", b"")) == 32:
        x = [value / 100_000 for value in struct.unpack(">8I", tags["cHRM"])]
        white, points = (x[0], x[1]), ((x[2], x[3]), (x[4], x[5]), (x[6], x[7]))
    if curve == "srgb" and (points, white) == _PRIMARIES[1]:
        return None
    return matrix_profile(points, white, curve)


def matrix_profile(primaries: tuple[tuple[float, float], ...], white: tuple[float, float], curve: float | str) -> bytes:
    """An ICC v4 display profile of three primaries (CIE xy), a white point and a tone curve.

    Args:
        primaries: of red, green and blue.
        white: their white, adapted to D50 (Bradford).
        curve: a gamma, "srgb" or "bt709".

    Raises:
        ImageError: the primaries span no colours.
    """
    if not all(y > 0 and 0 <= x <= 1 and y <= 1 for x, y in (*primaries, white)):
        raise ImageError("its colour primaries are not colours; write png, which keeps them")
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    source = np.array([white[0] / white[1], 1, (1 - white[0] - white[1]) / white[1]])
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    try:
        matrix = columns * np.linalg.solve(columns, source)
        cone = np.diag((bradford @ np.array(_D50)) / (bradford @ source))
        adaptation = np.linalg.solve(bradford, cone @ bradford)
    except np.linalg.LinAlgError:
        raise ImageError("its colour primaries are not colours; write png, which keeps them") from None
    adapted = adaptation @ matrix
    if not np.isfinite(adapted).all() or np.abs(adapted).max() > 30:
        raise ImageError("its colour primaries are not colours; write png, which keeps them")

    content = {b"chad": b"sf32\0\0\0\0" + _fixed(*adaptation.ravel())}
    for name, column in zip((b"r", b"g", b"b"), adapted.T):
        content[name + b"XYZ"] = b"XYZ \0\0\0\0" + _fixed(*column)
        content[name + b"TRC"] = _tone(curve)
    return _profile(b"RGB ", content)


def gray_profile(curve: float | str) -> bytes:
    """An ICC v4 display profile of one channel with a tone curve: a gamma, "srgb" or "bt709"."""
    return _profile(b"GRAY", {b"kTRC": _tone(curve)})


def _fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _tone(curve: float | str) -> bytes:
    if curve == "srgb":
        return b"para\0\0\0\0\0\3\0\0" + _fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    if curve == "bt709":
        return b"para\0\0\0\0\0\3\0\0" + _fixed(1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081)
    return b"para\0\0\0\0\0\0\0\0" + _fixed(min(float(curve), 30.0))


def _profile(space: bytes, content: dict[bytes, bytes]) -> bytes:
    """An ICC v4 display profile: the tags that all have, and `content`."""

    def text(words: str) -> bytes:
        return (
            b"mluc" + struct.pack(">IIIHHII", 0, 1, 12, 0x656E, 0x5553, 2 * len(words), 28) + words.encode("utf-16-be")
        )

    content = {
        b"desc": text(f"{'Gray' if space == b'GRAY' else 'RGB'}, as tagged in the picture"),
        b"cprt": text("No copyright, use freely"),
        b"wtpt": b"XYZ \0\0\0\0" + _fixed(*_D50),
        **content,
    }
    table, body = b"", b""
    start = 128 + 4 + 12 * len(content)
    for name, block in content.items():
        table += name + struct.pack(">II", start + len(body), len(block))
        body += block + bytes(-len(block) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), bytes(4), 0x04300000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(24) + struct.pack(">I", 0) + _fixed(*_D50)
    return head.ljust(128, b"\0") + struct.pack(">I", len(content)) + table + body


def space_of(icc: bytes) -> str:
    """The colour space that a profile is for: "RGB", "GRAY", "CMYK", ...; "" where it is damaged."""
    return icc[16:20].decode("latin1").strip() if len(icc) >= 128 and icc[36:40] == b"acsp" else ""


def unusable(picture: Picture) -> str | None:
    """Why the profile of a picture cannot say what its numbers mean, in words; None where it can.

    One for gray can where red, green and blue are equal in every pixel.
    """
    assert picture.icc is not None
    space = space_of(picture.icc)
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(picture.icc))
        if space in ("RGB", "GRAY"):
            mode = "L" if space == "GRAY" else "RGB"
            ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return "it is damaged"
    if space not in ("RGB", "GRAY"):
        return f"it is for other colours ({space})"
    if space == "GRAY" and not picture.gray:
        red = picture.pixels[..., 0]
        if not all(np.array_equal(red, picture.pixels[..., c]) for c in (1, 2)):
            return "it is for gray pictures"
    return None


def as_tagged_by_profile(picture: Picture) -> Picture:
    """The same numbers with a profile in place of PNG's colour tags.

    Raises:
        ImageError: no profile can say the same.
    """
    if not picture.color_tags:
        return picture
    if picture.icc and "cICP" not in picture.color_tags:
        return replace(picture, color_tags={})
    return replace(picture, icc=profile_of(picture.color_tags, picture.gray), color_tags={})


def as_srgb(picture: Picture) -> Picture:
    """The same colours as sRGB numbers, without a profile; of 8 bit where there was one.

    Raises:
        ImageError: the profile cannot be used.
    """
    picture = as_tagged_by_profile(picture)
    if picture.icc is None:
        return picture
    alpha = None if picture.alpha is None else to_8_bit(picture.alpha)
    return replace(picture, pixels=to_srgb(picture)(picture.pixels), icc=None, alpha=alpha)


def to_srgb(picture: Picture) -> Convert:
    """What turns [n,W,3] in the colours of a picture's profile into sRGB, uint8.

    lcms through Pillow takes 8 bit; where the numbers change anyway, and the target has 8 bit, nothing is lost.

    Raises:
        ImageError: the profile cannot be used.
    """
    assert picture.icc is not None
    return _from_profile(picture.icc)


def to_srgb_unless_it_is(picture: Picture) -> Convert | None:
    """`to_srgb` by a picture's profile or colour tags; None where its numbers are sRGB as they stand.

    Raises:
        ImageError: the profile cannot be used, or the tags say what no profile can.
    """
    try:
        icc = as_tagged_by_profile(picture).icc
    except ImageError as error:
        raise ImageError("its tags name HDR, or colours that no profile has; convert the picture to sRGB") from error
    return None if icc is None else _unless_srgb(icc)


@functools.lru_cache(maxsize=16)  # asking takes as long as decoding a small photo, and those of a folder share a few
def _unless_srgb(icc: bytes) -> Convert | None:
    """What converts from a profile; None where that moves no colour by more than one level, so that it only rounds.

    Asked of all grays and of a lattice of colours: the profile's name may be wrong either way.
    """
    convert = _from_profile(icc)
    samples = np.arange(256).repeat(3).reshape(-1, 1, 3)
    if space_of(icc) != "GRAY":
        lattice = np.stack(np.meshgrid(*[np.arange(0, 256, 17)] * 3), axis=-1)
        samples = np.concatenate([samples, lattice.reshape(-1, 1, 3)])
    moved = np.abs(convert(samples.astype(np.uint8)) - samples)
    return convert if moved.max() > 1 else None


def _from_profile(icc: bytes) -> Convert:
    gray = space_of(icc) == "GRAY"
    try:
        source, target = ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, "L" if gray else "RGB", "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        raise ImageError(f"its colour profile cannot be used ({error}); convert the picture to sRGB") from error

    def convert(pixels: np.ndarray) -> np.ndarray:
        samples = to_8_bit(pixels)
        image = Image.fromarray(np.ascontiguousarray(samples[..., 0] if gray else samples))
        converted = ImageCms.applyTransform(image, transform)
        assert converted is not None  # inPlace is off
        return np.asarray(converted)

    return convert


def cmyk_to_rgb(samples: np.ndarray, icc: bytes | None) -> np.ndarray:
    """CMYK of any container -> sRGB: through its profile, or libvips' general one for print where it has none.

    Args:
        samples: [H,W,4] uint8 or uint16, 0 is no ink.
        icc: the file's profile.

    Returns:
        [H,W,3], dtype as samples.

    Raises:
        ImageError: the profile is damaged, or not for CMYK.
    """
    from engine.io.libraries import vips, vips_image

    if icc is not None and space_of(icc) != "CMYK":
        raise ImageError("its CMYK colour profile cannot be used (it is for other colours); convert the picture to RGB")
    image = vips_image(samples).copy(interpretation="cmyk")
    depth = 16 if samples.dtype == np.uint16 else 8
    try:
        if icc is not None:
            image = image.copy()
            image.set_type(vips().GValue.blob_type, "icc-profile-data", icc)
            ImageCms.ImageCmsProfile(io.BytesIO(icc))  # libvips would take its own where this one is damaged
        return image.icc_transform("srgb", embedded=icc is not None, input_profile="cmyk", depth=depth).numpy()
    except (vips().Error, ImageCms.PyCMSError, OSError) as error:
        reason = " ".join(str(error).split())[:100]
        raise ImageError(f"its CMYK colour profile cannot be used ({reason}); convert the picture to RGB") from error


def lab_to_rgb(image: Image.Image) -> np.ndarray:
    """An 8-bit CIE L*a*b* picture (D50) -> sRGB [H,W,3] uint8."""
    lab = ImageCms.createProfile("LAB", 5000)
    converted = ImageCms.profileToProfile(image, lab, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None  # inPlace is off
    return np.asarray(converted)
