"""Errors and detail of a group of samples against their target, by smooth and textured area, in one pass.

Luma is BT.601 as in the PSNR-Y of super-resolution papers: Y = (65.481 R + 128.553 G + 24.966 B + 16) / 255 for RGB in
[0,1]. Detail is the mean magnitude of the luma's forward differences (0 beyond the last row and column).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .dispatch import use_triton

# For RGB in [-1,1], x = 2 rgb - 1: half of each coefficient; the constant falls out of every difference.
LUMA = (65.481 / 510, 128.553 / 510, 24.966 / 510)
MSE_FLOOR = 1e-10  # 100 dB: a perfect copy must not be infinitely good
DETAIL_FLOOR = 1e-4  # a fortieth of an 8-bit step: below it detail is noise


class AttributeStatistics(NamedTuple):
    """Per sample, [B,G] fp32 (fp64 for fp64 samples). Where a picture has no smooth (or no textured) pixel, the fields
    of that kind hold the whole picture's value, so that scores made of them stay comparable."""

    mse: Tensor
    """Mean squared luma error over all pixels, luma in [0,1]."""
    mse_smooth: Tensor
    """The same over smooth pixels (mask False)."""
    mse_texture: Tensor
    """The same over textured pixels (mask True)."""
    detail_smooth: Tensor
    """Mean gradient magnitude of the sample's luma over smooth pixels."""
    detail_texture: Tensor
    """The same over textured pixels."""
    target_detail_smooth: Tensor
    """The target's, over smooth pixels; equal for all samples of a group."""
    target_detail_texture: Tensor
    """The target's, over textured pixels."""

    @property
    def psnr_y(self) -> Tensor:
        """PSNR of the luma over the whole picture in dB, [B,G]; 100 at most."""
        return _psnr(self.mse)

    @property
    def fidelity(self) -> Tensor:
        """PSNR of the luma where the picture is smooth (the whole picture where nothing is), dB, [B,G]."""
        return _psnr(self.mse_smooth)

    @property
    def detail(self) -> Tensor:
        """Closeness of the detail to the target's where the picture is textured (everywhere where nothing is), [B,G].

        -|log(detail / target detail)|: 0 is best, and half or twice the target's detail are equally bad.
        """
        return -((self.detail_texture + DETAIL_FLOOR) / (self.target_detail_texture + DETAIL_FLOOR)).log().abs()


def _psnr(mse: Tensor) -> Tensor:
    return -10 * mse.clamp_min(MSE_FLOOR).log10()


def _luma(rgb: Tensor) -> Tensor:
    """[...,3,H,W] in [-1,1] -> [...,H,W], without the constant."""
    r, g, b = rgb.unbind(-3)
    return LUMA[0] * r + LUMA[1] * g + LUMA[2] * b


def _detail(luma: Tensor) -> Tensor:
    """[...,H,W] -> [...,H,W]: the magnitude of the forward differences."""
    dx, dy = torch.zeros_like(luma), torch.zeros_like(luma)
    dx[..., :, :-1] = luma[..., :, 1:] - luma[..., :, :-1]
    dy[..., :-1, :] = luma[..., 1:, :] - luma[..., :-1, :]
    return (dx.square() + dy.square()).sqrt()


def attribute_statistics_reference(samples: Tensor, target: Tensor, mask: Tensor) -> AttributeStatistics:
    """The definition, in fp64 for fp64 samples and in fp32 otherwise. Arguments as in `attribute_statistics`."""
    dtype = torch.promote_types(torch.promote_types(samples.dtype, target.dtype), torch.float32)
    sample_luma, target_luma = _luma(samples.to(dtype)), _luma(target.to(dtype))[:, None]
    textured = mask[:, None].to(dtype)

    def means(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B,G,H,W] -> means over all, smooth, textured pixels."""
        n, n_texture = textured[0].numel(), textured.sum((2, 3))
        in_texture, in_smooth = (values * textured).sum((2, 3)), (values * (1 - textured)).sum((2, 3))
        whole = (in_texture + in_smooth) / n
        texture = torch.where(n_texture > 0, in_texture / n_texture.clamp_min(1), whole)
        smooth = torch.where(n_texture < n, in_smooth / (n - n_texture).clamp_min(1), whole)
        return whole, smooth, texture

    mse, mse_smooth, mse_texture = means((sample_luma - target_luma).square())
    _, detail_smooth, detail_texture = means(_detail(sample_luma))
    _, target_smooth, target_texture = (m.expand_as(mse) for m in means(_detail(target_luma)))
    return AttributeStatistics(
        mse, mse_smooth, mse_texture, detail_smooth, detail_texture, target_smooth, target_texture
    )


@torch.no_grad()
def attribute_statistics(
    samples: Tensor, target: Tensor, mask: Tensor, *, backend: str = "auto"
) -> AttributeStatistics:
    """Luma errors and detail of every sample, over all, smooth and textured pixels. No gradient flows.

    Args:
        samples: [B,G,3,H,W] RGB in [-1,1]; any strides, contiguous or channels-last are fastest.
        target: [B,3,H,W] RGB in [-1,1], the ground truth.
        mask: [B,H,W] bool, True where the target is textured (`attribute_ratios`).
        backend: "auto", "torch" (the definition) or "triton" (samples and target are read once).

    Returns:
        AttributeStatistics of [B,G]; `.psnr_y`, `.fidelity` and `.detail` are the scores made of it.

    Raises:
        TypeError, ValueError: a wrong type, rank, size or device, values far outside [-1,1], NaN (see `checks`).
        RuntimeError: backend="triton" where it cannot run.
    """
    sizes = checks.tensor("samples", samples, "B,G,3,H,W")
    checks.tensor("target", target, "B,3,H,W", sizes)
    checks.mask("mask", mask, "B,H,W", sizes)
    checks.same_device(samples=samples, target=target, mask=mask)
    checks.between("samples", samples, -1.0, 1.0, "clamp, or convert with 2 * rgb - 1")
    checks.between("target", target, -1.0, 1.0, "clamp, or convert with 2 * rgb - 1")
    use_triton(backend, samples, target, mask)
    return attribute_statistics_reference(samples, target, mask)
