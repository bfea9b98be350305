"""Where a picture has texture: many small gradients in every direction, unlike lines, print, stripes and flat areas."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_FINE, _WINDOW, _SEAM = 1.0, 9.0, 5.0  # standard deviations in pixels: noise, the window looked at, the result's edges
_LUMA = (0.299, 0.587, 0.114)


def texture_share(picture: Tensor) -> Tensor:
    """How much of each pixel is texture, from 0 to 1, [N,1,H,W]; the picture is [N,3,H,W] in [-1,1].

    Of the gradients in a Gaussian window, texture has
    - many: the squared mean of their lengths is near the mean of their squares (lines and print have few, strong ones),
    - no direction: the structure tensor's eigenvalues are alike (those of stripes and edges are not),
    - a strength above that of noise and below that of print.
    """
    with torch.autocast(picture.device.type, enabled=False):
        return _texture_share(picture.float())


def _texture_share(picture: Tensor) -> Tensor:
    luma = 127.5 * (picture * picture.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
    smooth = _blurred(luma, _FINE)
    dx = F.pad(smooth[..., 2:] - smooth[..., :-2], (1, 1, 0, 0), mode="replicate") / 2
    dy = F.pad(smooth[..., 2:, :] - smooth[..., :-2, :], (0, 0, 1, 1), mode="replicate") / 2
    xx, yy, xy = (_blurred(product, _WINDOW) for product in (dx * dx, dy * dy, dx * dy))
    length = _blurred((dx * dx + dy * dy).sqrt(), _WINDOW)
    energy = xx + yy
    many = length.square() / (energy + 1e-3)
    directed = ((xx - yy).square() + 4 * xy.square()).sqrt() / (energy + 1e-3)
    strength = energy.sqrt()
    share = _ramp(many, 0.5, 0.64) * (1 - _ramp(directed, 0.45, 0.7))
    return _blurred(share * _ramp(strength, 2, 4) * (1 - _ramp(strength, 10, 16)), _SEAM)


def _ramp(x: Tensor, low: float, high: float) -> Tensor:
    return ((x - low) / (high - low)).clamp(0, 1)


def _blurred(x: Tensor, sigma: float) -> Tensor:
    """A Gaussian; the picture goes on beyond its border as its last pixels do."""
    reach = int(3 * sigma)
    at = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-at.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    x = F.pad(x, (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(x, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
