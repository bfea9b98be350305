"""The one step of a generator with a CompactUNet, for exports: the same sums, in few passes over memory.

- The condition, which the UNet takes off its picture and the step adds again, is left out.
- Noise reaches the network through one convolution; the condition's part of `grain` is in the kernels of `recover`.
- Factors and offsets are in the convolutions.
- From the features comes what they are beyond the border (`CompactUNet.beyond`), so that the zeros with which every run
  time frames a picture stand for that; the biases of the next convolution put it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gdpo.model.compact import CompactUNet, SplitPReLU, mirrored


class Less(nn.Module):
    """x [B,C,h,w] less a number for each channel."""

    values: torch.Tensor

    def __init__(self, values: torch.Tensor):
        super().__init__()
        self.register_buffer("values", values[:, None, None].clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.values


class CompactStep(nn.Module):
    """latent, noise [B,C,h,w] -> x0, float32.

    Args:
        unet: folded, in the precision of the step; its slopes may be split.
        signal, noise: of the noisy latent, sqrt(a_n) and sqrt(b_n).
    """

    def __init__(self, unet: CompactUNet, signal: float, noise: float):
        super().__init__()
        channels = unet.recover.out_channels
        own, other = unet.grain.weight.double().chunk(2, 1)  # of the noisy latent, of the condition

        def conv(weight: torch.Tensor, bias: torch.Tensor | None = None, padding: int = 0, groups: int = 1) -> Any:
            made = nn.Conv2d(
                weight.shape[1] * groups, len(weight), weight.shape[2], padding=padding, groups=groups,
                bias=bias is not None,
            ).to(unet.grain.weight)  # fmt: skip
            made.weight.data.copy_(weight)
            if bias is not None:
                assert made.bias is not None
                made.bias.data.copy_(bias)
            return made.requires_grad_(False)

        clean = unet.recover.weight.double()
        with_grain = clean.clone()
        with_grain[:, :, 1:2, 1:2] += signal * own + other
        self.recover = conv(torch.cat([with_grain, clean]))
        self.grain = conv(torch.cat([noise * own, torch.zeros_like(own)]))
        first = unet.conv_in.weight.double()
        assert unet.conv_in.bias is not None and unet.conv_out.bias is not None
        self.conv_in = conv(0.5 * first, unet.conv_in.bias.double() + 0.5 * first.sum((1, 2, 3)))
        self.acts = nn.ModuleList(_less(act, beyond, conv) for act, beyond in zip(unet.acts, unet.beyond))
        self.convs = nn.ModuleList()
        for layer, beyond in zip([*unet.convs, unet.conv_out], unet.beyond.double()):
            weight, bias = layer.weight.double(), layer.bias.double()
            factor = 2 if layer is unet.conv_out else 1
            self.convs.append(conv(factor * weight, factor * (bias + weight.sum((2, 3)) @ beyond), padding=1))
        self.base = conv(unet.base.weight)
        self.channels, self.margin = channels, self.base.kernel_size[0] // 2
        self.dtype = self.grain.weight.dtype

    def forward(self, latent: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        latent, noise = latent.to(self.dtype), noise.to(self.dtype)
        lr = self.recover(mirrored(latent, 1, unshuffled=True)) + self.grain(noise)
        lr = mirrored(lr, self.margin)
        spare = self.margin - 1  # what the linear upsampler sees beyond the first convolution's reach
        x = self.conv_in(lr[:, :, spare : lr.shape[2] - spare, spare : lr.shape[3] - spare])
        for act, conv in zip(self.acts, self.convs):
            x = conv(act(x))
        return (x + self.base(lr[:, self.channels :])).float()


def _less(act: Any, beyond: torch.Tensor, conv: Any) -> nn.Module:
    """An activation less what it is beyond the border: a split one in its second convolution, at no cost."""
    if not isinstance(act, SplitPReLU):
        return nn.Sequential(act, Less(beyond.detach()))
    made = SplitPReLU.__new__(SplitPReLU)
    nn.Module.__init__(made)
    count = len(beyond)
    made.rest = conv(act.rest.weight, groups=count)
    made.through = conv(act.through.weight, -beyond, groups=count)
    return made


def unet_weights(step: Mapping[str, torch.Tensor], signal: float, noise: float) -> dict[str, torch.Tensor]:
    """The weights of the CompactUNet that a CompactStep with split slopes was made of.

    Raises:
        KeyError: some are missing.
    """
    step = {name: weight.double() for name, weight in step.items()}
    with_grain, clean = step["recover.weight"].chunk(2)
    own = step["grain.weight"].chunk(2)[0] / (noise or 1)
    other = (with_grain - clean)[:, :, 1:2, 1:2] - signal * own
    first = 2 * step["conv_in.weight"]
    found = {
        "recover.weight": clean,
        "grain.weight": torch.cat([own, other], 1),
        "base.weight": step["base.weight"],
        "conv_in.weight": first,
        "conv_in.bias": step["conv_in.bias"] - 0.5 * first.sum((1, 2, 3)),
    }
    count = sum(name.startswith("convs.") and name.endswith(".weight") for name in step)
    beyond = torch.stack([-step[f"acts.{i}.through.bias"] for i in range(count)])
    for i in range(count):
        name, factor = (f"convs.{i}", 1) if i + 1 < count else ("conv_out", 2)
        weight = step[f"convs.{i}.weight"] / factor
        found[f"{name}.weight"] = weight
        found[f"{name}.bias"] = step[f"convs.{i}.bias"] / factor - weight.sum((2, 3)) @ beyond[i]
        found |= {f"acts.{i}.{part}.weight": step[f"acts.{i}.{part}.weight"] for part in ("rest", "through")}
    return {name: weight.float() for name, weight in CompactUNet.join_slopes(found | {"beyond": beyond}).items()}
