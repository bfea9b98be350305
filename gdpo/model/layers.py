"""Layers in another form: the same results with fewer products or fewer passes over memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

FLASH = 256  # channels of a head; kernels that keep no scores take no more
SCORES = 1 << 28  # that are in memory at once: 1 GiB
_PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))  # of an upsampled picture: row, column


class Subpixel(nn.ConvTranspose2d):
    """Nearest x2 and a 3x3 convolution behind it, as one."""


@torch.no_grad()
def subpixel(conv: nn.Conv2d) -> Subpixel:
    """What `conv`, 3x3 with padding 1, makes of a picture upsampled x2 by repetition: 4/9 of its products, no copy.

    Along an axis a pixel adds w[2], w[1], w[0] to the outputs around it, and its repetition the same one further: the
    reversed filter, summed with itself moved by one. So the borders are those of the zero padding, too.
    """
    weight = conv.weight.double().flip(2, 3).transpose(0, 1)
    weight = F.pad(weight, (0, 1)) + F.pad(weight, (1, 0))
    weight = F.pad(weight, (0, 0, 0, 1)) + F.pad(weight, (0, 0, 1, 0))
    made: Any = Subpixel(conv.in_channels, conv.out_channels, 4, 2, 1, device="meta")
    made.weight = nn.Parameter(weight.to(conv.weight.dtype).contiguous(), requires_grad=False)
    made.bias = conv.bias
    return made


class Phases(nn.Module):
    """What `subpixel` makes, as four 2x2 convolutions, of the even and odd rows and columns.

    For CPUs: ONNX Runtime's transposed convolution keeps 16 products a pixel and channel in memory, and takes longer;
    torch's in bf16 may add rounded products.
    """

    def __init__(self, conv: Subpixel):
        super().__init__()
        weight = conv.weight.detach().flip(2, 3).transpose(0, 1)
        self.phases = nn.ModuleList()
        for row, column in _PHASES:
            part: Any = nn.Conv2d(conv.in_channels, conv.out_channels, 2, device="meta")
            part.weight = nn.Parameter(weight[:, :, row::2, column::2].contiguous(), requires_grad=False)
            part.bias = conv.bias
            self.phases.append(part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pads = [(1 - column, column, 1 - row, row) for row, column in _PHASES]
        phases = [conv(F.pad(x, pad)) for conv, pad in zip(self.phases, pads)]
        rows = [torch.stack(phases[row : row + 2], 4).flatten(3) for row in (0, 2)]
        return torch.stack(rows, 3).flatten(2, 3).contiguous(memory_format=_order(x))


def _order(x: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def split_phases(module: nn.Module) -> None:
    """Replace what `fold_upsampling` made by its four phases, in place."""
    for part in list(module.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, Subpixel):
                setattr(part, name, Phases(child))


class PaddedBehind(nn.Conv2d):
    """A 3x3 convolution of stride 2: with padding 2, which it can do itself, it begins one output too early."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.conv2d(x, self.weight, self.bias, self.stride, padding=2)
        return out[:, :, 1:, 1:].contiguous(memory_format=_order(x))


def unshuffled(x: torch.Tensor, factor: int) -> torch.Tensor:
    """F.pixel_unshuffle in two moves of one axis each, which ONNX Runtime does six times faster than all at once."""
    batch, channels, height, width = x.shape
    h, w = height // factor, width // factor
    x = x.reshape(batch * channels * height, w, factor).transpose(1, 2)
    x = x.reshape(batch * channels, h, factor * factor, w).transpose(1, 2)
    return x.reshape(batch, channels * factor * factor, h, w)


def shuffled(x: torch.Tensor, factor: int) -> torch.Tensor:
    """F.pixel_shuffle, as `unshuffled`."""
    batch, channels, h, w = x.shape
    colours = channels // (factor * factor)
    x = x.reshape(batch * colours, factor * factor, h, w).transpose(1, 2)
    x = x.reshape(batch * colours * h * factor, factor, w).transpose(1, 2)
    return x.reshape(batch, colours, h * factor, w * factor)


def attention_by_products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(query key^T) value for heads that are too wide for a fused kernel, with the softmax in fp32.

    Args:
        query: [B,h,L,D], scaled already.
        key, value: [B,h,K,D].

    Returns:
        [B,h,L,D], like value.
    """
    q, k, v = (t.flatten(0, 1) for t in (query, key, value))
    rows = max(1, SCORES // (len(k) * k.shape[1]))
    parts = [_wide_product(part, k.mT).softmax(-1).to(v.dtype) @ v for part in q.split(rows, dim=1)]
    return (torch.cat(parts, 1) if parts[1:] else parts[0]).unflatten(0, query.shape[:2])


def _wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, in fp32 for halves."""
    if a.dtype not in (torch.float16, torch.bfloat16):
        return a @ b
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def tokens(attn: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """What an Attention of diffusers projects, [B,L,C]: a picture [B,C,H,W] is flattened; with its norm, if any."""
    x = hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states
    return x if attn.group_norm is None else attn.group_norm(x.transpose(1, 2)).transpose(1, 2)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if query.is_cuda and query.shape[-1] > FLASH:
        return attention_by_products(query, key, value)
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)
