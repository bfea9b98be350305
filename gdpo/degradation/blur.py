"""Blur kernels of Real-ESRGAN (arXiv 2107.10833, section 3.2), and one convolution that blurs a whole batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import special

from gdpo.degradation.draw import KernelDraw

SIDE = (
    21  # every kernel is padded to this side: one convolution for all, and the same sums whoever else is in the batch
)
RADIUS = SIDE // 2
# The CPU's depthwise convolution works on blocks of 16 channels (8 without AVX-512) and is six times slower otherwise.
_CHANNEL_BLOCK = 16

_OFFSETS = np.arange(-RADIUS, RADIUS + 1, dtype=np.float64)
_X, _Y = np.meshgrid(_OFFSETS, _OFFSETS)
_DISTANCE = np.hypot(_X, _Y)


def make_kernel(draw: KernelDraw) -> np.ndarray:
    """A kernel of sum 1, float64 [SIDE, SIDE], zero outside its own central [size, size].

    With q = x^T S^-1 x and S the covariance (axes sigma_x, sigma_y turned by the angle, counter-clockwise in (x, y)):
    Gaussian exp(-q/2), generalised Gaussian exp(-q^beta/2), plateau 1/(1 + q^beta). The sinc filter is the circular
    low-pass w J1(w r) / (2 pi r) of cut-off w.
    """
    if draw.kind == "sinc":
        kernel = _sinc(draw.cutoff)
    else:
        cos, sin = np.cos(draw.angle), np.sin(draw.angle)
        along, across = (cos * _X + sin * _Y) / draw.sigma_x, (cos * _Y - sin * _X) / draw.sigma_y
        q = (along**2 + across**2) ** draw.beta
        kernel = 1 / (1 + q) if draw.kind.startswith("plateau") else np.exp(-q / 2)
    inner = slice(RADIUS - draw.size // 2, RADIUS + draw.size // 2 + 1)
    padded = np.zeros((SIDE, SIDE))
    padded[inner, inner] = kernel[inner, inner] / kernel[inner, inner].sum()
    return padded


def _sinc(cutoff: float) -> np.ndarray:
    radius = _DISTANCE.copy()
    radius[RADIUS, RADIUS] = 1  # any value but 0; the limit at the centre is put in below
    kernel = cutoff * special.j1(cutoff * radius) / (2 * np.pi * radius)
    kernel[RADIUS, RADIUS] = cutoff**2 / (4 * np.pi)
    return kernel


def blur(images: Sequence[torch.Tensor], draws: Sequence[KernelDraw | None]) -> list[torch.Tensor]:
    """Blur each image with its own kernel, borders reflected; images without a kernel stay as they are.

    Args:
        images: fp32 [1,3,h,w] each, sizes may differ, sides over RADIUS.
        draws: as many kernels, or None.

    Returns:
        Images of the same sizes (views of one tensor).
    """
    result = list(images)
    chosen = [i for i, draw in enumerate(draws) if draw is not None]
    if not chosen:
        return result
    height = max(images[i].shape[2] for i in chosen) + 2 * RADIUS
    width = max(images[i].shape[3] for i in chosen) + 2 * RADIUS
    channels = -(-3 * len(chosen) // _CHANNEL_BLOCK) * _CHANNEL_BLOCK
    device = images[0].device
    planes = torch.zeros(1, channels, height, width, device=device)
    for n, i in enumerate(chosen):
        padded = F.pad(images[i], [RADIUS] * 4, mode="reflect")
        planes[:, 3 * n : 3 * n + 3, : padded.shape[2], : padded.shape[3]] = padded
    weights = np.zeros((channels, 1, SIDE, SIDE), dtype=np.float32)
    for n, i in enumerate(chosen):
        draw = draws[i]
        assert draw is not None
        weights[3 * n : 3 * n + 3, 0] = make_kernel(draw)
    # The kernels are even functions, so correlation is convolution. Depthwise in fp32: no TF32 on any GPU.
    blurred = F.conv2d(planes, torch.from_numpy(weights).to(device), groups=channels)
    for n, i in enumerate(chosen):
        result[i] = blurred[:, 3 * n : 3 * n + 3, : images[i].shape[2], : images[i].shape[3]]
    return result
