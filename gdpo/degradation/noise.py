"""Gaussian and Poisson noise from fields drawn on the CPU: the same numbers on every device."""

from __future__ import annotations

import functools

import torch

from gdpo.degradation.draw import NoiseDraw
from gdpo.randomness import generator_for
from gdpo.scores.luma import GRAYSCALE, weighted

_COUNTS = 512  # more than any Poisson count here: the mean is at most 256, so that P(count >= 512) < 1e-40
_EXPONENTS = 9  # a picture of 8 bits has 1..256 distinct values, rounded up to a power of two: 2^0..2^8


def draw_field(draw: NoiseDraw, height: int, width: int, *key: int | str) -> torch.Tensor:
    """What `add_noise` needs, fp32 [1,C,height,width] on the CPU, C = 1 for gray noise.

    Standard normals for Gaussian noise, uniform numbers in (0, 1) for Poisson noise.
    """
    shape, generator = (1, 1 if draw.gray else 3, height, width), generator_for(*key)
    if draw.kind == "gaussian":
        return torch.randn(shape, generator=generator)
    # rand() has multiples of 2^-24. A zero would be the quantile of probability 0: half a step instead.
    return torch.rand(shape, generator=generator).clamp_(min=2**-25)


def add_noise(image: torch.Tensor, draw: NoiseDraw, field: torch.Tensor) -> torch.Tensor:
    """image + noise, clipped to [0,1].

    Gaussian: sigma/255 * field. Poisson, as Real-ESRGAN: with u the image (its luma, for gray noise) rounded to 8 bit
    and v the number of its distinct values rounded up to a power of two, strength * (Poisson(u v)/v - u).

    Args:
        image: fp32 [1,3,h,w].
        field: of `draw_field`, on the image's device.
    """
    if draw.kind == "gaussian":
        noise = field * (draw.strength / 255)
    else:
        levels = weighted(image, GRAYSCALE).unsqueeze(1) if draw.gray else image
        levels = (levels * 255).round().clamp(0, 255)
        noise = _poisson_noise(levels, field) * draw.strength
    return (image + noise).clamp(0, 1)


def _poisson_noise(levels: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Poisson(levels/255 * v)/v - levels/255 by inversion: the count k is the first with u < P(X <= k).

    One uniform number a pixel decides, on every device alike, and nothing waits for the device.
    """
    table = _poisson_table(levels.device)
    index = levels.long()
    present = torch.zeros(256, device=levels.device).index_fill_(0, index.flatten(), 1)
    powers = 1 << torch.arange(_EXPONENTS - 1, device=levels.device)
    exponent = (powers < present.sum()).sum()  # log2 of the number of distinct values, rounded up exactly
    # The place before the row's first entry; a bisection moves it to the last count that is too small.
    start = ((exponent * 256 + index) * _COUNTS - 1).flatten().int()
    position, uniforms = start.clone(), uniforms.flatten()
    for power in range(_COUNTS.bit_length() - 2, -1, -1):
        step = 1 << power
        position.add_(table.index_select(0, position + step) <= uniforms, alpha=step)
    counts = (position - start).reshape(levels.shape)
    return counts / (1 << exponent) - levels / 255


@functools.lru_cache(maxsize=4)
def _poisson_table(device: torch.device) -> torch.Tensor:
    """P(X <= k) for mean level/255 * 2^e, fp32, flattened from [e, level, k]."""
    mean = torch.arange(256, dtype=torch.float64)[None, :, None] / 255
    mean = mean * 2.0 ** torch.arange(_EXPONENTS, dtype=torch.float64)[:, None, None]
    count = torch.arange(_COUNTS, dtype=torch.float64)
    log_mass = torch.xlogy(count, mean) - mean - torch.lgamma(count + 1)
    return log_mass.exp().cumsum(-1).float().flatten().to(device)
