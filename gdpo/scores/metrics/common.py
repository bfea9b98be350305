"""What the metrics share: the check of their input, 8-bit rounding, and local averages."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def check_images(smallest: int = 1, **images: Tensor) -> None:
    """Every argument must be a float [N,3,H,W] of one shape and at least `smallest` pixels a side.

    Raises:
        TypeError: not a float tensor. ValueError: another shape, or too small.
    """
    shape = None
    for name, x in images.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a float tensor [N,3,H,W] in [0,1]; got {kind}")
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < smallest:
            least = f" with sides of at least {smallest}" if smallest > 1 else ""
            raise ValueError(f"{name} must be [N,3,H,W]{least}; got {tuple(x.shape)}")
        if shape is not None and x.shape != shape:
            raise ValueError(f"{' and '.join(images)} must have one shape; {name} is {tuple(x.shape)}, not {shape}")
        shape = tuple(x.shape)


def to_8bit(x: Tensor) -> Tensor:
    """[0,1] -> whole numbers 0..255 of the same dtype, as a PNG would hold them (half to even, like numpy)."""
    return (x.clamp(0, 1) * 255).round()


def gaussian(sigma: float, radius: int) -> Tensor:
    """A normalised 1-D Gaussian of 2 radius + 1 taps, fp64."""
    t = torch.arange(-radius, radius + 1, dtype=torch.float64)
    k = torch.exp(-0.5 * (t / sigma) ** 2)
    return k / k.sum()


SCENE_WINDOW = gaussian(7 / 6, 3)  # of the scene statistics of BRISQUE, NIQE and PIQE: 7x7, as their authors have it


def convolve(x: Tensor, taps: Tensor) -> Tensor:
    """[N,H,W] with a symmetric 1-D filter along both axes, "valid": sides shrink by len(taps) - 1.

    Shifted sums: on a CPU faster than conv2d with one channel, and exact in fp64.
    """
    w = taps.tolist()
    n = x.shape[2] - len(w) + 1
    x = sum((w[i] * x[:, :, i : i + n] for i in range(1, len(w))), start=w[0] * x[:, :, :n])
    n = x.shape[1] - len(w) + 1
    return sum((w[i] * x[:, i : i + n] for i in range(1, len(w))), start=w[0] * x[:, :n])


def smooth(x: Tensor, taps: Tensor, mode: str = "replicate") -> Tensor:
    """Like `convolve`, with the border extended first: the size stays. `mode` as in torch.nn.functional.pad."""
    r = len(taps) // 2
    return convolve(F.pad(x[:, None], (r, r, r, r), mode=mode)[:, 0], taps)


def halve(x: Tensor) -> Tensor:
    """[N,H,W] -> [N,H//2,W//2] by area averaging."""
    return F.avg_pool2d(x[:, None], 2)[:, 0]


def in_slices(metric: Callable[[Tensor], Tensor], x: Tensor, budget: int = 1 << 20) -> Tensor:
    """metric(x) -> [N], computed for so many pictures at a time that their intermediate maps stay small."""
    step = max(1, budget // (x.shape[2] * x.shape[3]))
    return torch.cat([metric(part) for part in x.split(step)])
