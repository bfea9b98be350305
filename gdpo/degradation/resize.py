"""Resizes as Real-ESRGAN does them (torch, no antialiasing), and the antialiased ones of photo software."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def resize(images: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """Resize [B,C,H,W] to size (height, width), half-pixel centres.

    Args:
        mode: "area" (mean over the covered pixels), "bilinear", "bicubic" (a=-0.75, as OpenCV), or with antialiasing
            "bilinear_antialias", "bicubic_antialias" (a=-0.5, as Pillow).

    Returns:
        [B,C,h,w]; bicubic may leave the range of its input.
    """
    if images.shape[2:] == size:
        return images
    if mode == "area":
        if size[0] % images.shape[2] == size[1] % images.shape[3] == 0:
            return F.interpolate(images, size=size, mode="nearest")  # the same, ten times faster
        return F.interpolate(images, size=size, mode="area")
    name, _, antialias = mode.partition("_")
    return F.interpolate(images, size=size, mode=name, antialias=bool(antialias), align_corners=False)
