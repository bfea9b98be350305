"""A discriminator of patches: what a picture looks like in places, whatever exactly it shows (PatchGAN, Isola et al.
2017, arXiv 1611.07004; hinge loss and spectral normalisation, Miyato et al. 2018, arXiv 1802.05957).

A pixel or feature distance is least for the mean of what a picture may be, which is blurred. The discriminator tells
that from the target's sharpness.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SLOPE = 0.2


class SpectralConv2d(nn.Conv2d):
    """A convolution with its weight divided by its largest singular value. That is computed and not tracked, so that
    parameters are all that a checkpoint has to keep."""

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.matrix_norm(self.weight.flatten(1).float(), 2)
        return self._conv_forward(x, self.weight / norm.to(self.weight), self.bias)


class Discriminator(nn.Module):
    """Pictures [N,3,H,W] in [-1,1] -> a score of each patch of 29 pixels, [N,1,H/4,W/4]: high for the target's.

    Args:
        seed: of its initial weights.
        width: channels of the first convolution.
    """

    def __init__(self, seed: int, width: int = 32):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            plan = [(3, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1), (2 * width, 4 * width, 2),
                    (4 * width, 4 * width, 1), (4 * width, 1, 1)]  # fmt: skip
            self.convs = nn.ModuleList(SpectralConv2d(i, o, 3, stride=s, padding=1) for i, o, s in plan)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs[:-1]:
            x = F.leaky_relu(conv(x), _SLOPE)
        return self.convs[-1](x)

    def generator_loss(self, restored: Tensor) -> Tensor:
        """What the generator minimises, a scalar. The discriminator gets no gradient."""
        self.requires_grad_(False)
        loss = -self(restored).mean()
        self.requires_grad_(True)
        return loss

    def own_loss(self, restored: Tensor, target: Tensor) -> Tensor:
        """What the discriminator minimises, a scalar >= 0. The generator gets no gradient."""
        return F.relu(1 - self(target)).mean() + F.relu(1 + self(restored.detach())).mean()
