"""Brightness of RGB: the weights of BT.601 in every form that is in use here, and their formulas."""

from __future__ import annotations

import torch
from torch import Tensor

# Full range, Y in the range of RGB: which patches are textured (paper, section 3.3).
BT601 = (0.299, 0.587, 0.114)
# Studio range of RGB in [0,1], as MATLAB's rgb2ycbcr and so PSNR-Y: Y = (65.481 R + 128.553 G + 24.966 B + 16) / 255.
BT601_STUDIO = (65.481, 128.553, 24.966)
RGB2GRAY = (0.298936021293775, 0.587043074451121, 0.114020904255103)  # of MATLAB, as PIQE has it
GRAYSCALE = (0.2989, 0.587, 0.114)  # of torchvision, as Real-ESRGAN's gray noise has it


def luma(images: Tensor) -> Tensor:
    """[B,3,H,W] in [-1,1] -> full-range luma [B,H,W] in [0,1]."""
    return weighted((images + 1) / 2, BT601)


def luma_255(x: Tensor) -> Tensor:
    """[N,3,H,W] in [0,1] -> studio-range luma [N,H,W] in 16..235, not rounded."""
    return torch.einsum("nchw,c->nhw", x, x.new_tensor(BT601_STUDIO)) + 16


def weighted(x: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """[N,3,H,W] -> the weighted sum of its channels, [N,H,W]."""
    red, green, blue = x.unbind(1)
    return weights[0] * red + weights[1] * green + weights[2] * blue
