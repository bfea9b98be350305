"""Normalisations and upsampling of diffusers' networks, made cheaper: without fp32 copies, or on the fused kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gdpo.kernels import group_norm


class _GroupNorm(nn.GroupNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class _LayerNorm(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def norms_in_own_precision(model: nn.Module) -> None:
    """Keep CUDA's autocast from widening every normalisation and every upsampling to fp32, in place.

    The statistics are fp32 inside the kernels anyway; what autocast adds are fp32 outputs, which the activation after
    them computes on and the backward pass keeps: twice the bytes for values that the next convolution rounds. Upsampled
    features, repetitions of what was there, would be the largest of a decoder.
    """
    own: dict[type, type] = {nn.GroupNorm: _GroupNorm, nn.LayerNorm: _LayerNorm}
    modules: list[Any] = list(model.modules())
    for module in modules:
        if type(module) in own:
            module.__class__ = own[type(module)]
        elif type(module).__name__ == "Upsample2D" and module.interpolate and module.norm is None:
            if module.use_conv_transpose:
                continue  # it upsamples by itself
            module.interpolate = False  # from here on before it
            module.register_forward_pre_hook(_upsampled, with_kwargs=True)


def _upsampled(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
    """What Upsample2D does ahead of its convolution, in the precision of its input."""
    x, size = inputs[0], (*inputs[1:], named.get("output_size"))[0]
    if 4 * x.numel() > 1 << 32:  # as Upsample2D: channels-last, CUDA leaves what is past 2^32 empty (pytorch#141831)
        x = x.contiguous()
    with torch.autocast(x.device.type, enabled=False):
        x = F.interpolate(x, size=size, scale_factor=None if size else 2.0, mode="nearest")
    return (x, *inputs[1:]), named


class FusedGroupNorm(nn.Module):
    """nn.GroupNorm, with SiLU or without, on the fused kernel where it can run."""

    def __init__(self, norm: nn.GroupNorm, silu: bool = False):
        super().__init__()
        self.groups, self.eps, self.silu = norm.num_groups, norm.eps, silu
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return group_norm(x, self.groups, self.weight, self.bias, self.eps, silu=self.silu)


def fuse_norms(module: nn.Module) -> None:
    """Replace every affine GroupNorm, together with the SiLU that follows it in diffusers' blocks."""
    from diffusers.models.resnet import ResnetBlock2D

    block: Any = ResnetBlock2D
    parts: list[Any] = list(module.modules())
    for part in parts:
        if isinstance(part, block) and isinstance(part.nonlinearity, nn.SiLU):
            if part.time_embedding_norm == "scale_shift" or not all(map(_affine, (part.norm1, part.norm2))):
                continue  # the SiLU follows something else
            part.norm1, part.norm2 = FusedGroupNorm(part.norm1, True), FusedGroupNorm(part.norm2, True)
            if part.time_emb_proj is not None and not part.skip_time_act:
                part.time_emb_proj = nn.Sequential(part.nonlinearity, part.time_emb_proj)
            part.nonlinearity = nn.Identity()
        elif _affine(getattr(part, "conv_norm_out", None)) and isinstance(getattr(part, "conv_act", None), nn.SiLU):
            part.conv_norm_out, part.conv_act = FusedGroupNorm(part.conv_norm_out, True), nn.Identity()
    for part in list(module.modules()):
        children: list[tuple[str, Any]] = list(part.named_children())
        for name, child in children:
            if _affine(child):
                setattr(part, name, FusedGroupNorm(child))


def _affine(norm: object) -> bool:
    return isinstance(norm, nn.GroupNorm) and norm.affine
