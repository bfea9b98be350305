"""The one step of a generator with a CompactUNet, for exports: the same sums, in few passes over memory.

- The condition, which the UNet takes off its picture and the step adds again, is left out.
- Noise reaches the network through one convolution; the condition's part of `grain` is in the kernels of `recover`.
- Factors and offsets are in the convolutions.
- The features are less what they are beyond the border (`CompactUNet.beyond`), so that the zeros with which every run
  time frames a picture stand for that; the biases of the next convolution put it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

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
        layers: list[Any] = [unet.conv_in, *unet.convs, unet.conv_out]
        weights = [layer.weight.double() for layer in layers]
        biases = [layer.bias.double() for layer in layers]
        biases[0] = biases[0] + 0.5 * weights[0].sum((1, 2, 3))
        weights[0] = 0.5 * weights[0]
        self.acts = nn.ModuleList()
        for i, (act, beyond) in enumerate(zip(unet.acts, unet.beyond.double())):
            beyond = beyond[: weights[i + 1].shape[1]]
            biases[i + 1] = biases[i + 1] + weights[i + 1].sum((2, 3)) @ beyond
            if isinstance(act, SplitPReLU):  # at no cost: x + relu(rest(x)) takes it off x, and puts it back in `rest`
                biases[i] = biases[i] - beyond
                part = SplitPReLU(1 + act.rest.weight.flatten())
                part.rest = conv(act.rest.weight, act.rest.weight.flatten().double() * beyond, groups=len(beyond))
                self.acts.append(part)
            else:
                self.acts.append(nn.Sequential(act, Less(beyond.to(unet.beyond))))
        weights[-1], biases[-1] = 2 * weights[-1], 2 * biases[-1]
        self.conv_in = conv(weights[0], biases[0])
        self.convs = nn.ModuleList(conv(*pair, padding=1) for pair in zip(weights[1:], biases[1:]))
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


def unet_weights(step: Mapping[str, torch.Tensor], signal: float, noise: float) -> dict[str, torch.Tensor]:
    """The weights of the CompactUNet that a CompactStep with split slopes was made of.

    Raises:
        KeyError: some are missing.
    """
    step = {name: weight.double() for name, weight in step.items()}
    with_grain, clean = step["recover.weight"].chunk(2)
    own = step["grain.weight"].chunk(2)[0] / (noise or 1)
    other = (with_grain - clean)[:, :, 1:2, 1:2] - signal * own
    found = {"recover.weight": clean, "grain.weight": torch.cat([own, other], 1), "base.weight": step["base.weight"]}
    count = sum(name.startswith("convs.") and name.endswith(".weight") for name in step)
    layers = ["conv_in", *(f"convs.{i}" for i in range(count))]
    weights = [step[f"{name}.weight"] for name in layers]
    biases = [step[f"{name}.bias"] for name in layers]
    weights[-1], biases[-1] = weights[-1] / 2, biases[-1] / 2
    beyond = []
    for i in range(count):
        rest = step[f"acts.{i}.rest.weight"]
        # A slope of 1 has no rest: the same network has zeros beyond this channel, and another bias.
        taken = torch.where(rest == 0, 0, step[f"acts.{i}.rest.bias"][:, None, None, None] / rest).flatten()
        biases[i] = biases[i] + taken
        biases[i + 1] = biases[i + 1] - weights[i + 1].sum((2, 3)) @ taken
        found[f"acts.{i}.rest.weight"] = rest
        beyond.append(taken)
    biases[0] = biases[0] - weights[0].sum((1, 2, 3))
    weights[0] = 2 * weights[0]
    for name, weight, bias in zip([*layers[:-1], "conv_out"], weights, biases):
        found |= {f"{name}.weight": weight, f"{name}.bias": bias}
    found["beyond"] = pad_sequence(beyond, batch_first=True)
    return {name: weight.float() for name, weight in CompactUNet.join_slopes(found).items()}
