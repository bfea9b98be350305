"""A discriminator on the VGG features that the perceptual distance has computed already (Projected GAN, Sauer 2021).

It takes the place that VSD has where there is no pretrained teacher: it asks whether a restored picture's features are
those of a photo, not whether they are those of this photo, and so does not reward the blurred mean. The pairing is
relativistic (Jolicoeur-Martineau 2018, eq. 10 without averages): photo and restored picture show the same scene, and
only their difference at each place is judged.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..features import BLOCKS

_WIDTH, _SLOPE, _EPS = 32, 0.2, 1e-8


class _Conv(nn.Conv2d):
    """A convolution whose filters have unit length: the discriminator stays smooth, with no state to save."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.normalize(self.weight.flatten(1), dim=1).view_as(self.weight)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class FeatureDiscriminator(nn.Module):
    """One small head for each VGG16 block; feature vectors are scaled to unit length, as in the distance.

    Args:
        blocks: how many VGG16 blocks are looked at, 1..5.
        seed: of the initial weights.
    """

    def __init__(self, blocks: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleList(
                nn.Sequential(
                    _Conv(channels, _WIDTH, 1),
                    nn.LeakyReLU(_SLOPE),
                    _Conv(_WIDTH, _WIDTH, 3, padding=1),
                    nn.LeakyReLU(_SLOPE),
                    nn.Conv2d(_WIDTH, 1, 3, padding=1),
                )
                for channels, _ in BLOCKS[:blocks]
            )

    def generator_loss(self, restored: Iterable[Tensor], photo: Iterable[Tensor]) -> Tensor:
        """How clearly the photo is told from the restored one. Features [B,C_l,h_l,w_l]; grad to `restored` only."""
        self.requires_grad_(False)
        loss = self._doubt(restored, photo)
        self.requires_grad_(True)
        return loss

    def loss(self, restored: Iterable[Tensor], photo: Iterable[Tensor]) -> Tensor:
        """The discriminator's own loss, on detached features: log 2 where it cannot tell them apart."""
        return self._doubt(photo, [f.detach() for f in restored])

    def _doubt(self, better: Iterable[Tensor], worse: Iterable[Tensor]) -> Tensor:
        """softplus(D(worse) - D(better)), averaged over places and blocks."""
        terms = []
        for head, b, w in zip(self.heads, better, worse):
            terms.append(F.softplus(head(_unit(w)).float() - head(_unit(b)).float()).mean())
        return torch.stack(terms).mean()


def _unit(feature: Tensor) -> Tensor:
    """Vectors of root-mean-square 1 over channels: [B,C,h,w] -> the same."""
    length = (feature.float().square().mean(1, keepdim=True) + _EPS).sqrt()
    return feature / length.to(feature.dtype)
