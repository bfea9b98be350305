"""Colour alignment: give a restored picture the colours of its input.

Samples are 16-bit integers throughout, and so are the sums: they do not depend on the order of addition, so that bands,
threads and languages agree to the bit.
- wavelet (the default): the low frequencies (below a five-level a-trous [1 2 1]/4 wavelet) become those of the
  upsampled input. Beside a fine pattern that the model draws too bright or too dark this reaches into what is flat, by
  up to 7 levels; so where the input is flat, its own value limits the result (`keep_flat`). Only a band of rows is
  needed at a time.
- AdaIN (the paper's): mean and deviation of each channel become those of the upsampled input; one table of 2^16
  entries a channel. It recolours flat areas: by 40 levels beside fine lines.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

METHODS = ("adain", "wavelet", "none")
DEFAULT = "wavelet"
FULL = 65535
_EPSILON = 1e-5  # added to a variance of samples in [0,1], as the released code does
_DILATIONS = (1, 2, 4, 8, 16)
_ROWS = 128  # handled at a time
HALO = sum(_DILATIONS)  # how many rows away the low-pass of a row reaches
FLAT = 2 * 257  # of 3x3 samples: the most they differ by, and the most their result is off; two levels of 8 bit


@dataclass
class Moments:
    """Exact running sums of 16-bit samples, per channel."""

    count: int = 0
    total: np.ndarray = field(default_factory=lambda: np.zeros(3, np.uint64))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(3, np.uint64))

    def add(self, samples: np.ndarray) -> None:
        """samples [3,h,w] uint16."""
        self.count += samples.shape[1] * samples.shape[2]
        for channel, plane in enumerate(samples):
            flat = plane.ravel().astype(np.uint64)
            self.total[channel] += flat.sum()
            self.squares[channel] += (flat * flat).sum()

    def mean_and_deviation(self) -> tuple[np.ndarray, np.ndarray]:
        """float64 [3] each, of samples scaled to [0,1]."""
        mean = self.total.astype(np.float64) / self.count
        variance = np.maximum(self.squares.astype(np.float64) / self.count - mean * mean, 0.0)
        return mean / FULL, np.sqrt(variance / FULL**2 + _EPSILON)


def adain_tables(result: Moments, target: Moments) -> np.ndarray:
    """uint16 [3, 65536]: what each sample of the result becomes, given the moments of the result and of the target."""
    (mean, deviation), (target_mean, target_deviation) = result.mean_and_deviation(), target.mean_and_deviation()
    samples = np.arange(FULL + 1) / FULL
    aligned = (samples - mean[:, None]) / deviation[:, None] * target_deviation[:, None] + target_mean[:, None]
    return np.floor(np.clip(aligned, 0.0, 1.0) * FULL + 0.5).astype(np.uint16)


def lowpass(planes: np.ndarray) -> np.ndarray:
    """Five a-trous passes of [1 2 1]/4 along rows and columns, edges replicated. [C,H,W] int32 -> float32."""
    out = planes.astype(np.float32)
    for dilation in _DILATIONS:
        for axis in (1, 2):
            index = np.arange(out.shape[axis])
            around = np.take(out, np.maximum(index - dilation, 0), axis=axis)
            around += np.take(out, np.minimum(index + dilation, len(index) - 1), axis=axis)
            around *= np.float32(0.25)
            out *= np.float32(0.5)
            out += around
    return out


def wavelet_band(result: np.ndarray, target: np.ndarray, inner: tuple[int, int]) -> np.ndarray:
    """Rows of the result with the low frequencies of the target.

    Args:
        result: [N,W,3] uint16, rows of the restored picture: those to return, and HALO more at either side where the
            picture has them.
        target: [3,N,W] uint16, the same rows of the upsampled input.
        inner: which of them to return, a half-open range.

    Returns:
        uint16 [n,W,3].
    """
    rows = slice(*inner)
    out = np.empty((inner[1] - inner[0], *result.shape[1:]), np.uint16)
    for c, plane in enumerate(target):  # one by one: a third of the memory
        low = lowpass((plane.astype(np.int32) - result[..., c])[None])[0, rows]
        aligned = np.floor(result[rows, :, c] + low + np.float32(0.5))
        out[..., c] = np.clip(aligned, 0, FULL, out=aligned)
    return out


def keep_flat(rows: np.ndarray, first: int, rgb: np.ndarray) -> None:
    """Where the input is flat, keep its result within FLAT of it, in place.

    A sample is flat if those of the 3x3 pixels around it, in its channel, differ by no more than FLAT; its result then
    stays within FLAT of each of them.

    Args:
        rows: [n,W,3] uint16, of the aligned picture from row `first` on.
        rgb: [H,W,3] uint8 or uint16, the input; W of the result is a multiple of its W.
    """
    scale, last = rows.shape[1] // rgb.shape[1], first + len(rows)
    top, bottom = first // scale, -(-last // scale)
    padding = (int(top == 0), int(bottom == len(rgb))), (1, 1), (0, 0)
    pixels = np.pad(rgb[max(top - 1, 0) : bottom + 1], padding, "edge")
    least, most = (f(f(pixels[:-2], pixels[1:-1]), pixels[2:]) for f in (np.minimum, np.maximum))
    least, most = (
        f(f(p[:, :-2], p[:, 1:-1]), p[:, 2:]).astype(np.int32) * (FULL // np.iinfo(rgb.dtype).max)
        for f, p in ((np.minimum, least), (np.maximum, most))
    )
    flat = most - least <= FLAT
    for y in np.flatnonzero(flat.any((1, 2))):
        low = np.where(flat[y], np.maximum(most[y] - FLAT, 0), 0).astype(np.uint16)[:, None]
        high = np.where(flat[y], np.minimum(least[y] + FLAT, FULL), FULL).astype(np.uint16)[:, None]
        part = rows[max((top + y) * scale - first, 0) : (top + y + 1) * scale - first]
        blocks = part.reshape(len(part), rgb.shape[1], scale, 3)
        np.clip(blocks, low, high, out=blocks)


def is_neutral(rgb: np.ndarray) -> bool:
    """Whether R = G = B in every pixel of [H,W,3]."""
    return all(
        np.array_equal(rows[..., 0], rows[..., c])
        for rows in (rgb[top : top + _ROWS] for top in range(0, len(rgb), _ROWS))
        for c in (1, 2)
    )


def make_neutral(rows: np.ndarray) -> np.ndarray:
    """Give every pixel of [N,W,3], uint8 or uint16, its luma (ITU-R BT.601), in place. Gray pixels stay as they are."""
    for top in range(0, len(rows), _ROWS):
        part = rows[top : top + _ROWS].astype(np.uint32)
        luma = part[..., 0] * np.uint32(299) + part[..., 1] * np.uint32(587) + part[..., 2] * np.uint32(114)
        rows[top : top + _ROWS] = ((luma + np.uint32(500)) // np.uint32(1000))[..., None]
    return rows
