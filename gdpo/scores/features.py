"""A differentiable perceptual distance from the features of a VGG16, and the choice between it and LPIPS.

The definition (Zhang et al. 2018, eq. 1, with all channel weights equal): run both pictures through VGG16, take the
last ReLU of each block, scale every feature vector to unit length, and sum

    d(x, y) = sum_l mean_hw |f_l(x)/|f_l(x)| - f_l(y)/|f_l(y)||^2        (0 = equal; at most 2 per block)

It is not LPIPS: LPIPS weighs the channels by weights learnt on human judgements, and its VGG was trained on ImageNet
alone. The weights used here were trained further on edges (HED, BSDS500), so absolute values compare only with
themselves.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor

logger = logging.getLogger(__name__)

BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # VGG16: channels and 3x3 convolutions of each block
_MEAN_RGB = (122.67892, 116.66877, 104.00699)  # of 0..255, as HED and the Caffe models subtract it
_EPS = 1e-8  # added to the squared length of a feature vector: an all-zero vector stays zero
_CPU_PIXELS = 4 * 128 * 128  # at a time on a CPU: the first block's features still fit the cache (1.4x faster)


class VGG16Features(nn.Module):
    """The convolutional part of VGG16, frozen; names as in torchvision (`features.N.weight`).

    Args:
        path: safetensors file with `features.N.weight` and `.bias` for RGB in 0..255 minus the mean; None asks
            `gdpo.assets` for the project's copy.
        blocks: how many of the five blocks to run, 1..5. Half of the time goes into the first two.

    Raises:
        ValueError: `blocks` out of range, or the file is not a VGG16.
        FileNotFoundError: no weights; the message names the command that fetches them.
    """

    mean: Tensor

    def __init__(self, path: str | Path | None = None, blocks: int = 5) -> None:
        super().__init__()
        if blocks not in range(1, len(BLOCKS) + 1):
            raise ValueError(f"blocks must be 1..{len(BLOCKS)}; got {blocks}")
        layers: list[nn.Module] = []
        self.taps: list[int] = []
        channels = 3
        for i, (width, count) in enumerate(BLOCKS[:blocks]):
            layers += [nn.MaxPool2d(2)] if i else []
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        self.register_buffer("mean", torch.tensor(_MEAN_RGB).view(1, 3, 1, 1), persistent=False)
        self._load(path)
        self.requires_grad_(False).eval()
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                layer.weight.data = layer.weight.contiguous(memory_format=torch.channels_last)

    def _load(self, path: str | Path | None) -> None:
        from safetensors.torch import load_file

        if path is None:
            from gdpo.assets import asset

            path = asset("vgg16")
        stored = load_file(str(path))
        wanted = self.state_dict()
        wrong = [k for k, v in wanted.items() if k not in stored or stored[k].shape != v.shape]
        if wrong:
            raise ValueError(f"{path} is not a VGG16: {wrong[0]} must be {tuple(wanted[wrong[0]].shape)}")
        self.load_state_dict({k: stored[k] for k in wanted})

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B,3,H,W] RGB in [-1,1], sides of at least 16 -> the last ReLU of each block, [B,C,H/2^l,W/2^l]."""
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < 2 ** (len(self.taps) - 1):
            raise ValueError(f"images must be [B,3,H,W] of at least 16x16; got {tuple(x.shape)}")
        x = ((x + 1) * 127.5 - self.mean).contiguous(memory_format=torch.channels_last)
        out = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                out.append(x)
        return out


class PerceptualDistance(nn.Module):
    """The distance of the module's docstring, differentiable in both pictures, frozen weights.

    Under bf16 autocast the convolutions run in bf16 and the distance in fp32; channels-last throughout.

    Args:
        blocks: how many VGG16 blocks to compare, 1..5. Fewer are cheaper and look at finer structure only.
        path: the weights, see VGG16Features.
    """

    name = "vgg"

    def __init__(self, blocks: int = 5, path: str | Path | None = None) -> None:
        super().__init__()
        self.vgg = VGG16Features(path, blocks)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [B,3,H,W] and y [B,3,H,W], or [1,3,H,W] for one target of all, in [-1,1] -> fp32 [B], >= 0."""
        if x.ndim != 4 or y.shape not in (x.shape, (1, *x.shape[1:])):
            raise ValueError(f"x and y must have one shape; got {tuple(x.shape)} and {tuple(y.shape)}")
        step = max(1, _CPU_PIXELS // (x.shape[2] * x.shape[3])) if x.device.type == "cpu" else len(x)
        if len(y) < len(x):  # one target of all: its features once
            target = self._features_of_target(y)
            return torch.cat([self._distance(part, target) for part in x.split(step)])
        parts = zip(x.split(step), y.split(step))
        return torch.cat([self._distance(part, self._features_of_target(t)) for part, t in parts])

    def _features_of_target(self, y: Tensor) -> list[Tensor]:
        with nullcontext() if y.requires_grad else torch.no_grad():
            return self.vgg(y)

    def _distance(self, x: Tensor, target: list[Tensor]) -> Tensor:
        return torch.stack([_unit_distance(f, t) for f, t in zip(self.vgg(x), target)]).sum(0)


def _unit_distance(f: Tensor, t: Tensor) -> Tensor:
    """mean_hw |f/|f| - t/|t||^2, multiplied out: |f|^2/|f|^2 + |t|^2/|t|^2 - 2 f.t/|f||t|, fewer large passes."""
    f, t = f.float(), t.float()
    ff, tt, ft = f.square().sum(1), t.square().sum(1), (f * t).sum(1)
    a, b = 1 / (ff + _EPS), 1 / (tt + _EPS)
    return (ff * a + tt * b - 2 * ft * (a * b).sqrt()).mean((1, 2))


class LPIPS(nn.Module):
    """LPIPS-VGG of the `lpips` package (extra `iqa`); its VGG weights come from torchvision's cache."""

    name = "lpips"

    def __init__(self) -> None:
        super().__init__()
        import lpips

        self.net = lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False).eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[B,3,H,W] in [-1,1], twice -> fp32 [B]."""
        return self.net(x, y).flatten().float()


def load_perceptual(
    name: Literal["lpips", "vgg", "auto"] = "auto", blocks: int = 5, device: str | torch.device | None = None
) -> PerceptualDistance | LPIPS:
    """The perceptual distance of a config word; `.name` says which one it is ("lpips" or "vgg").

    "auto" takes LPIPS when the `lpips` package works here and the VGG distance otherwise, and logs its choice.

    Raises:
        ValueError: unknown name. RuntimeError: "lpips" asked for and not usable, with the reason and the remedy.
    """
    if name not in ("lpips", "vgg", "auto"):
        raise ValueError(f"perceptual must be lpips, vgg or auto; got {name!r}")
    reason = ""
    if name != "vgg":
        try:
            return LPIPS().to(device)
        except Exception as error:  # a missing package, a CUDA torchvision beside a CPU torch, weights not to be had
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if name == "lpips":
                raise RuntimeError(
                    f"lpips cannot be used ({reason}); pip install 'gdpo-sr[iqa]' (and its VGG weights), or use vgg"
                ) from error
    distance = PerceptualDistance(blocks).to(device)
    logger.info("perceptual distance: VGG16 features%s", f" (no LPIPS: {reason})" if reason else "")
    return distance


@lru_cache(maxsize=4)
def _shared(device: torch.device, blocks: int) -> VGG16Features:
    return VGG16Features(blocks=blocks).to(device)


def vgg_features(x: Tensor, blocks: int = 5) -> list[Tensor]:
    """Features of [B,3,H,W] in [-1,1] by a copy of the network that is loaded once per device."""
    return _shared(x.device, blocks)(x)
