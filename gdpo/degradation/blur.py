"""Blur kernels of Real-ESRGAN (arXiv 2107.10833, section 3.2), and the convolutions that apply them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import special

from gdpo.degradation.draw import KernelDraw

SIDE = 21  # the largest kernel
RADIUS = SIDE // 2
# The CPU's depthwise convolution works on blocks of 16 channels (8 without AVX-512): three channels alone cost as much
# as sixteen. So an image is cut into this many strips of rows, which go as channels.
_STRIPS = 16


def make_kernel(draw: KernelDraw) -> np.ndarray:
    """A kernel of sum 1, float64 [size,size].

    With q = x^T S^-1 x and S the covariance (axes sigma_x, sigma_y turned by the angle, counter-clockwise in (x, y)):
    Gaussian exp(-q/2), generalised Gaussian exp(-q^beta/2), plateau 1/(1 + q^beta). The sinc filter is the circular
    low-pass w J1(w r) / (2 pi r) of cut-off w.
    """
    offsets = np.arange(draw.size, dtype=np.float64) - draw.size // 2
    x, y = np.meshgrid(offsets, offsets)
    if draw.kind == "sinc":
        r = np.hypot(x, y)
        r[r == 0] = 1e-6  # the limit at the centre, w^2 / (4 pi), to twelve digits
        kernel = draw.cutoff * special.j1(draw.cutoff * r) / (2 * np.pi * r)
    else:
        cos, sin = np.cos(draw.angle), np.sin(draw.angle)
        q = ((cos * x + sin * y) / draw.sigma_x) ** 2 + ((cos * y - sin * x) / draw.sigma_y) ** 2
        kernel = 1 / (1 + q**draw.beta) if draw.kind.startswith("plateau") else np.exp(-(q**draw.beta) / 2)
    return kernel / kernel.sum()


def blur(images: Sequence[torch.Tensor], draws: Sequence[KernelDraw | None]) -> list[torch.Tensor]:
    """Blur each image with its own kernel, borders reflected; images without a kernel stay as they are.

    Args:
        images: fp32 [1,3,h,w] each, sizes may differ, sides over RADIUS.
        draws: as many kernels, or None.

    Returns:
        Images of the same sizes. On the CPU each is blurred alone, elsewhere all by one convolution.
    """
    result = list(images)
    chosen = [(i, make_kernel(draw)) for i, draw in enumerate(draws) if draw is not None]
    if chosen:
        blur_all = _blur_each if images[0].device.type == "cpu" else _blur_together
        blurred = blur_all([images[i] for i, _ in chosen], [kernel for _, kernel in chosen])
        for (i, _), image in zip(chosen, blurred):
            result[i] = image
    return result


# The kernels are even functions, so correlation is convolution. Depthwise in fp32: no TF32 on any GPU.
def _blur_each(images: Sequence[torch.Tensor], kernels: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Each image as strips of its rows, with its kernel's own size."""
    return [_blur_strips(image, torch.from_numpy(kernel).float()) for image, kernel in zip(images, kernels)]


def _blur_strips(image: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    height, width = image.shape[2:]
    side = len(kernel)
    rows = -(-height // _STRIPS)
    padded = F.pad(image, [side // 2] * 4, mode="reflect")
    padded = F.pad(padded, (0, 0, 0, rows * _STRIPS - height))
    strips = padded.unfold(2, rows + side - 1, rows).transpose(3, 4).flatten(1, 2)
    blurred = F.conv2d(strips, kernel.expand(3 * _STRIPS, 1, side, side), groups=3 * _STRIPS)
    return blurred.reshape(1, 3, rows * _STRIPS, width)[:, :, :height]


def _blur_together(images: Sequence[torch.Tensor], kernels: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """All images as channels of one canvas of the largest size, the kernels padded to SIDE."""
    height, width = (max(image.shape[axis] for image in images) + 2 * RADIUS for axis in (2, 3))
    canvas = torch.zeros(1, 3 * len(images), height, width, device=images[0].device)
    weights = np.zeros((3 * len(images), 1, SIDE, SIDE), dtype=np.float32)
    for n, (image, kernel) in enumerate(zip(images, kernels)):
        channels = slice(3 * n, 3 * n + 3)
        padded = F.pad(image, [RADIUS] * 4, mode="reflect")
        canvas[:, channels, : padded.shape[2], : padded.shape[3]] = padded
        inner = slice(RADIUS - len(kernel) // 2, RADIUS + len(kernel) // 2 + 1)
        weights[channels, 0, inner, inner] = kernel
    blurred = F.conv2d(canvas, torch.from_numpy(weights).to(canvas.device), groups=3 * len(images))
    return [blurred[:, 3 * n : 3 * n + 3, : x.shape[2], : x.shape[3]] for n, x in enumerate(images)]
