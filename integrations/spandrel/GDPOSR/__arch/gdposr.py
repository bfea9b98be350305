"""The one-step generators of GDPO-SR (Apache-2.0) as a plain network: the noise is a part of the weights.

Needs torch alone, as spandrel asks of an architecture's code.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _act(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1)


def _conv(in_channels: int, out_channels: int, side: int = 3, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, side, padding=side // 2, bias=bias)


class ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1, self.conv2 = _conv(in_channels, out_channels), _conv(out_channels, out_channels)
        self.skip = _conv(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.conv2(_act(self.conv1(x)))


class Head(nn.Module):
    def __init__(self, in_channels: int, half: int, full: int):
        super().__init__()
        self.up1, self.conv1 = _conv(in_channels, 4 * half), _conv(half, half)
        self.up2, self.conv2 = _conv(half, 4 * full), _conv(full + 6, full)
        self.out = _conv(full, 3)

    def forward(self, x: Tensor, sample: Tensor) -> Tensor:
        x = _act(self.conv1(_act(F.pixel_shuffle(self.up1(x), 2))))
        x = _act(F.pixel_shuffle(self.up2(x), 2))
        return F.pixel_unshuffle(self.out(_act(self.conv2(torch.cat([x, F.pixel_shuffle(sample, 4)], 1)))), 4)


class TinyUNet(nn.Module):
    """A UNet of residual blocks on pixel-unshuffled pictures."""

    def __init__(self, widths: tuple[int, ...], blocks: int, head: tuple[int, int]):
        super().__init__()
        self.conv_in = _conv(96, widths[0])
        self.encoder = nn.ModuleList(nn.ModuleList(ResBlock(w, w) for _ in range(blocks)) for w in widths)
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(widths))
        self.ups, self.decoder = nn.ModuleList(), nn.ModuleList()
        for wide, narrow in pairwise(widths[::-1]):
            self.ups.append(_conv(wide, 4 * narrow, 1))
            self.decoder.append(nn.ModuleList(ResBlock(narrow if k else 2 * narrow, narrow) for k in range(blocks)))
        self.head = Head(widths[0], *head)

    def forward(self, sample: Tensor) -> Tensor:
        def run(blocks, x: Tensor) -> Tensor:
            for block in blocks:
                x = block(x)
            return x

        x, skips = run(self.encoder[0], self.conv_in(sample)), []
        for down, blocks in zip(self.downs, self.encoder[1:]):
            skips.append(x)
            x = run(blocks, down(x))
        for up, blocks in zip(self.ups, self.decoder):
            x = run(blocks, torch.cat([F.pixel_shuffle(up(x), 2), skips.pop()], 1))
        return self.head(x, sample)


class CompactUNet(nn.Module):
    """A stack of convolutions at the LR's resolution; `widths` are the channels of its activations."""

    def __init__(self, widths: list[int], base_kernel: int):
        super().__init__()
        self.recover = nn.Conv2d(48, 3, 3, bias=False)
        self.grain = nn.Conv2d(96, 3, 1, bias=False)
        self.base = nn.Conv2d(3, 48, base_kernel, bias=False)
        self.conv_in = nn.Conv2d(6, widths[0], 3)
        self.convs = nn.ModuleList(nn.Conv2d(*pair, 3) for pair in pairwise(widths))
        self.acts = nn.ModuleList(nn.PReLU(width) for width in widths)
        self.beyond = nn.Parameter(torch.zeros(len(widths), max(widths)))  # the picture's border, of each act
        self.conv_out = nn.Conv2d(widths[-1], 48, 3)

    def forward(self, sample: Tensor) -> Tensor:
        condition = sample[:, 48:]
        lr = self.recover(_mirrored(condition, 1, unshuffled=True))
        margin = self.base.kernel_size[0] // 2
        lr = _mirrored(torch.cat([lr + self.grain(sample), lr], 1), margin)
        spare = margin - 1
        x = 0.5 * lr[:, :, spare : lr.shape[2] - spare, spare : lr.shape[3] - spare] + 0.5
        for conv, act, values in zip([self.conv_in, *self.convs], self.acts, self.beyond):
            values = values[: conv.out_channels, None, None]
            x = F.pad(act(conv(x)) - values, (1, 1, 1, 1)) + values
        return 2 * self.conv_out(x) + self.base(lr[:, 3:]) - condition


def _mirrored(x: Tensor, count: int, unshuffled: bool = False) -> Tensor:
    """Pictures, perhaps unshuffled ones, with `count` pixels more beyond each border, as in a mirror there."""
    for axis in (2, 3):
        last = x.shape[axis] - 1
        places = [min(i, last) for i in range(count)]
        before = [x.narrow(axis, i, 1) for i in reversed(places)]
        after = [x.narrow(axis, last - i, 1) for i in places]
        if unshuffled:
            order = torch.arange(x.shape[1], device=x.device).view(-1, 4, 4).flip(axis - 1).flatten()
            before, after = [part[:, order] for part in before], [part[:, order] for part in after]
        x = torch.cat([*before, x, *after], axis)
    return x


class GDPOSR(nn.Module):
    """picture [B,3,h,w] in [0,1] -> [B,3,4h,4w]: enlarged by bicubic, noise added, one call of the UNet.

    Args:
        unet: one of the two above.
        side: of the square of noise, which is repeated over the picture.
    """

    noise: Tensor
    amounts: Tensor

    def __init__(self, unet: nn.Module, side: int = 64):
        super().__init__()
        self.unet = unet
        self.register_buffer("noise", torch.zeros(1, 48, side, side))
        self.register_buffer("amounts", torch.zeros(2))  # of the picture and of the noise

    def forward(self, x: Tensor) -> Tensor:
        large = F.interpolate(x.float(), scale_factor=4, mode="bicubic", antialias=True).clamp(0, 1).to(x.dtype)
        condition = F.pixel_unshuffle(2 * large - 1, 4)
        height, width = x.shape[2:]
        rows, columns = (-(-n // side) for n, side in zip((height, width), self.noise.shape[2:]))
        noise = self.noise.repeat(len(x), 1, rows, columns)[:, :, :height, :width]
        noisy = self.amounts[0] * condition + self.amounts[1] * noise
        x0 = condition + self.unet(torch.cat([noisy, condition], 1))
        return F.pixel_shuffle(x0, 4) / 2 + 0.5
