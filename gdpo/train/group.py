"""A group: several samples of each picture of a batch, with all that they were made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """G samples of each of B pictures, [B,G,...]; or the same in one row, [B*G,...], image after image.

    Attributes:
        images: [B,G,3,H,W] in [-1,1].
        x0: [B,G,C,h,w], the latents that the images were decoded from.
        condition: [B,G,C,h,w], the latent of the degraded picture; G copies.
        text: [B,G,L,D], its prompt embeddings, or None; G copies.
    """

    images: Tensor
    x0: Tensor
    condition: Tensor
    text: Tensor | None

    def flat(self) -> Group:
        """[B,G,...] -> [B*G,...]."""
        text = None if self.text is None else self.text.flatten(0, 1)
        return Group(self.images.flatten(0, 1), self.x0.flatten(0, 1), self.condition.flatten(0, 1), text)

    def pick(self, keep: Tensor) -> Group:
        """The samples `keep` [B,K] of each picture, [B,K,...]."""
        text = None if self.text is None else pick(self.text, keep)
        return Group(pick(self.images, keep), pick(self.x0, keep), pick(self.condition, keep), text)


def pick(x: Tensor, keep: Tensor) -> Tensor:
    """x [B,G,...], keep [B,K] -> [B,K,...]."""
    return x[torch.arange(len(x), device=x.device)[:, None], keep]
