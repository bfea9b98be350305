"""PSNR and SSIM on the Y channel, as pyiqa (and so the papers of one-step super-resolution) compute them.

Both round the pictures to 8 bits first. Y is studio range (16..235) of 255; PSNR takes it unrounded, SSIM rounds it
too. Both reproduce published values to 4 decimals.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdpo.scores.luma import luma_255
from gdpo.scores.metrics.common import check_images, convolve, gaussian, to_8bit


def psnr_y(x: Tensor, y: Tensor) -> Tensor:
    """10 log10(255^2 / mean (Y_x - Y_y)^2) in dB.

    Args:
        x, y: [N,3,H,W] in [0,1].

    Returns: [N], fp64; 80 dB for equal pictures (pyiqa adds 1e-8 to the error of luma in [0,1]).
    """
    check_images(x=x, y=y)
    a, b = (luma_255(to_8bit(p.double()) / 255) / 255 for p in (x, y))
    return -10 * torch.log10((a - b).square().mean((1, 2)) + 1e-8)


def psnr_rgb(x: Tensor, y: Tensor) -> Tensor:
    """10 log10(255^2 / mean (x - y)^2) in dB, over the three channels of 8-bit pictures.

    Args:
        x, y: [N,3,H,W] in [0,1].

    Returns: [N], fp64; 80 dB for equal pictures.
    """
    check_images(x=x, y=y)
    a, b = (to_8bit(p.double()) / 255 for p in (x, y))
    return -10 * torch.log10((a - b).square().mean((1, 2, 3)) + 1e-8)


def ssim_y(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004): 11x11 Gaussian window of sigma 1.5, no padding, Y rounded to 8 bits.

    Args:
        x, y: [N,3,H,W] in [0,1], sides of at least 11.

    Returns: [N], fp64, at most 1.
    """
    check_images(11, x=x, y=y)
    a, b = (luma_255(to_8bit(p.double()) / 255).round() for p in (x, y))
    window = gaussian(1.5, 5)
    ma, mb = convolve(a, window), convolve(b, window)
    va, vb = convolve(a * a, window) - ma * ma, convolve(b * b, window) - mb * mb
    cov = convolve(a * b, window) - ma * mb
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    contrast = ((2 * cov + c2) / (va + vb + c2)).clamp_min(0)  # pyiqa's relu: negative structure counts as none
    return (contrast * (2 * ma * mb + c1) / (ma * ma + mb * mb + c1)).mean((1, 2))
