"""The energy score on VGG features: a distance that a generator minimises by being as uncertain as the truth is.

    ES = E |f(x) - f(y)| - diversity/2 E |f(x) - f(x')|        (Gneiting and Raftery 2007, eq. 21, with diversity = 1)

with |.| the Euclidean norm over the channels of each position, averaged over positions and blocks. With diversity = 1
it is a proper scoring rule: sampling plausible detail beats returning its blurred mean. It takes the place that VSD has
where there is no pretrained teacher (the tiny preset).
"""

from __future__ import annotations

import torch
from torch import nn

from gdpo.scores.features import VGG16Features

_EPS = 1e-6
# The mean length of a feature vector on photos, block by block. Fixed, and the vectors are not made unit length: else
# the faintest streak on a clear sky counts as much as an edge, and a generator learns to draw streaks.
_LENGTH = (400.0, 220.0, 160.0, 72.0, 267.0)


class EnergyScore(nn.Module):
    """Distance to the target and spread of K samples, in VGG feature space."""

    def __init__(self, blocks: int):
        super().__init__()
        self.vgg = VGG16Features(blocks=blocks)

    def forward(self, samples: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """samples [B,K,3,H,W], target [B,3,H,W] in [-1,1] -> (distance [], spread []) with E over K and pairs."""
        b, k = samples.shape[:2]
        with torch.no_grad():
            truths = self.vgg(target)
        distance = spread = samples.new_zeros(())
        for feature, truth, length in zip(self.vgg(samples.flatten(0, 1)), truths, _LENGTH):
            u, v = feature.float().unflatten(0, (b, k)) / length, truth.float()[:, None] / length
            distance = distance + _norm(u - v).mean()
            pairs = [_norm(u[:, i] - u[:, j]).mean() for i in range(k) for j in range(i)]
            if pairs:
                spread = spread + torch.stack(pairs).mean()
        return distance / len(truths), spread / len(truths)


def _norm(difference: torch.Tensor) -> torch.Tensor:
    return (difference.square().sum(-3) + _EPS).sqrt()
