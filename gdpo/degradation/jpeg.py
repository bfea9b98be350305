"""JPEG compression, there and back: libjpeg through Pillow on the CPU, and the same steps in torch on any device.

The torch form follows the defaults of libjpeg(-turbo) step by step, in whole numbers that its floats hold exactly:
colour conversion in 16-bit fixed point, 4:2:0 by 2x2 means, the 13-bit DCT of 8x8 blocks with its rounding between rows
and columns, the standard tables scaled by quality, and back with the triangle ("fancy") chroma filter. No pixel that
differs from Pillow's is known.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

SMALLEST = 5  # up to 4 pixels wide, libjpeg doubles the chroma by repetition: not worth a second way here

# ITU-T T.81, tables K.1 and K.2.
_LUMA_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA_TABLE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *[(99,) * 8] * 4,
)


def jpeg(images: Sequence[torch.Tensor], qualities: Sequence[int], method: str) -> list[torch.Tensor]:
    """Compress and decompress each image at its quality (4:2:0).

    Args:
        images: fp32 [1,3,h,w] each, sizes may differ, w at least SMALLEST; clipped to [0,1] and rounded to 8 bit first.
        qualities: 1..100, as many.
        method: "pillow", "torch", or "auto": pillow for images on the CPU.

    Returns:
        Images of the same sizes, exact 8-bit values.
    """
    if not images:
        return []
    if method == "auto":
        method = "pillow" if images[0].device.type == "cpu" else "torch"
    if method == "pillow":
        return [_through_pillow(image, quality) for image, quality in zip(images, qualities)]
    return _through_torch(images, qualities)


def _through_pillow(image: torch.Tensor, quality: int) -> torch.Tensor:
    levels = (image[0] * 255).round_().clamp_(0, 255).to(torch.uint8).cpu()
    pixels = torch.stack(levels.unbind(0), -1).numpy()  # faster than a permuted copy
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality, subsampling="4:2:0")
    decoded = np.array(Image.open(stream, formats=("JPEG",)))
    planes = torch.from_numpy(decoded).to(image.device).permute(2, 0, 1).contiguous()
    return planes[None].float().div_(255)


def _through_torch(images: Sequence[torch.Tensor], qualities: Sequence[int]) -> list[torch.Tensor]:
    """All images at once, on a canvas of the largest size in whole 16x16 units, their last pixels repeated."""
    device = images[0].device
    sizes = [tuple(image.shape[2:]) for image in images]
    assert min(w for _, w in sizes) >= SMALLEST
    height, width = (-(-max(size[axis] for size in sizes) // 16) * 16 for axis in (0, 1))
    canvas = torch.cat([F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]), mode="replicate") for x in images])
    luma, chroma = _to_ycc((canvas * 255).round().clamp(0, 255))

    means = chroma.reshape(len(images), 2, height // 2, 2, width // 2, 2).sum((3, 5))
    # libjpeg rounds the mean of four up and down in turn along a row.
    bias = 1 + torch.arange(width // 2, device=device) % 2
    chroma = ((means + bias) / 4).floor()
    # Below a picture it repeats rows of the halved chroma, not of the picture.
    chroma = _repeat_edges(chroma, [(-(-h // 2), width // 2) for h, _ in sizes])

    luma = _quantised(luma, _tables(_LUMA_TABLE, qualities, device))
    chroma = _quantised(chroma, _tables(_CHROMA_TABLE, qualities, device))
    chroma = _repeat_edges(chroma, [(-(-h // 2), -(-w // 2)) for h, w in sizes])
    decoded = _to_rgb(luma, _doubled(chroma)) / 255
    return [decoded[i : i + 1, :, :h, :w] for i, (h, w) in enumerate(sizes)]


# libjpeg's colour conversion in 16-bit fixed point. Every product and sum below is a whole number under 2^24, so fp32
# holds it exactly and the result is libjpeg's to the bit.
def _to_ycc(rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    red, green, blue = rgb.unbind(1)
    y = 19595 * red + 38470 * green + 7471 * blue + 32768
    offset = 128 * 65536 + 32767
    cb = -11059 * red - 21709 * green + 32768 * blue + offset
    cr = 32768 * red - 27439 * green - 5329 * blue + offset
    return (y / 65536).floor()[:, None], (torch.stack((cb, cr), 1) / 65536).floor()


def _to_rgb(luma: torch.Tensor, chroma: torch.Tensor) -> torch.Tensor:
    y, (cb, cr) = luma[:, 0], (chroma - 128).unbind(1)
    red = y + ((91881 * cr + 32768) / 65536).floor()
    green = y + ((-22554 * cb - 46802 * cr + 32768) / 65536).floor()
    blue = y + ((116130 * cb + 32768) / 65536).floor()
    return torch.stack((red, green, blue), 1).clamp(0, 255)


def _repeat_edges(planes: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> torch.Tensor:
    """[B,C,H,W] with every pixel beyond a picture's own size replaced by the nearest one inside."""
    for axis in (2, 3):
        length = planes.shape[axis]
        last = torch.tensor([size[axis - 2] - 1 for size in sizes], device=planes.device)
        index = torch.minimum(torch.arange(length, device=planes.device), last[:, None])  # [B, length]
        shape = [len(sizes), 1, 1, 1]
        shape[axis] = length
        planes = planes.gather(axis, index.reshape(shape).expand(planes.shape))
    return planes


def _quantised(planes: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """What is left of [B,C,H,W] (0..255) after quantising the DCT of its 8x8 blocks by tables [B,8,8]."""
    b, c, h, w = planes.shape
    dct = _dct(planes.device)  # float64: exact, and no TF32 or autocast, whatever the caller has switched on
    blocks = (planes - 128).reshape(b, c, h // 8, 8, w // 8, 8).transpose(3, 4).double()
    steps = tables[:, None, None, None]
    rows = _descaled(blocks @ dct.T, 11)  # 13 fractional bits in the matrix, 2 kept between the two directions
    coefficients = _descaled(dct @ rows, 15)  # 8 times the orthonormal ones
    levels = ((coefficients.abs() / (8 * steps)) + 0.5).floor().copysign(coefficients)  # halves away from zero
    columns = _descaled(dct.T @ (levels * steps), 11)
    pixels = (_descaled(columns @ dct, 18) + 128).clamp(0, 255)
    return pixels.float().transpose(3, 4).reshape(b, c, h, w)


def _descaled(values: torch.Tensor, bits: int) -> torch.Tensor:
    """values / 2^bits, rounded, halves up."""
    return (values / 2**bits + 0.5).floor()


def _doubled(planes: torch.Tensor) -> torch.Tensor:
    """Twice the height and width: each sample 3/4 of the nearer and 1/4 of the farther neighbour, per axis."""
    b, c, h, w = planes.shape
    rows = F.pad(planes, (0, 0, 1, 1), mode="replicate")
    near = 3 * planes
    rows = torch.stack((near + rows[:, :, :-2], near + rows[:, :, 2:]), 3).reshape(b, c, 2 * h, w)
    columns = F.pad(rows, (1, 1, 0, 0), mode="replicate")
    near = 3 * rows
    left, right = near + columns[..., :-2] + 8, near + columns[..., 2:] + 7
    return (torch.stack((left, right), 4) / 16).floor().reshape(b, c, 2 * h, 2 * w)


@functools.lru_cache(maxsize=4)
def _dct(device: torch.device) -> torch.Tensor:
    """libjpeg's DCT-II of 8 points, float64 [8,8]: sqrt(8) * 2^13 times the orthonormal one, in whole numbers.

    Some differ by one from the nearest: libjpeg adds each up from constants that are rounded on their own.
    """
    half = (  # the left half of each row; even rows are even functions, odd rows odd ones
        (8192, 8192, 8192, 8192),
        (11363, 9633, 6437, 2260),
        (10703, 4433, -4433, -10703),
        (9633, -2259, -11362, -6436),
        (8192, -8192, -8192, 8192),
        (6437, -11362, 2261, 9633),
        (4433, -10704, 10704, -4433),
        (2260, -6436, 9633, -11363),
    )
    rows = [[*row, *(value * (-1) ** k for value in reversed(row))] for k, row in enumerate(half)]
    return torch.tensor(rows, dtype=torch.float64).to(device)


def _tables(base: tuple[tuple[int, ...], ...], qualities: Sequence[int], device: torch.device) -> torch.Tensor:
    """libjpeg's quantisation tables, float64 [B,8,8]."""
    scales = [5000 // q if q < 50 else 200 - 2 * q for q in qualities]
    tables = [[[min(max((v * s + 50) // 100, 1), 255) for v in row] for row in base] for s in scales]
    return torch.tensor(tables, dtype=torch.float64).to(device)
