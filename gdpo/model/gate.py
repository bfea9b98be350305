"""A gate on the residual of a CompactUNet: clean pictures get a part of it, degraded ones all.

What sharpens a degraded photo overdoes a clean one. Of a bicubic reduction the best picture has about 0.3 of such a
residual: better than bicubic in PSNR and in VGG distance, where the whole of it is worse in both. So the network says
how much of its residual is drawn, from its features averaged over a neighbourhood: degradation is not a pixel's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

REACH = 9  # side of the neighbourhood, in LR pixels


class Gate(nn.Module):
    """The share of the residual that is drawn: features [B,width,h,w] -> [B,1,h,w] in (0,1)."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.look = nn.Conv2d(width, channels, 3, padding=1)
        self.weigh = nn.Conv2d(channels, channels, 1)
        self.decide = nn.Conv2d(channels, 1, 1)
        nn.init.zeros_(self.decide.weight)
        nn.init.constant_(self.decide.bias, 4.0)  # open: sigmoid(4) is 0.98

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        seen = F.relu(self.look(features))
        around = F.avg_pool2d(seen, REACH, stride=1, padding=REACH // 2, count_include_pad=False)
        return self.decide(F.relu(self.weigh(around)))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.logits(features))


class Seen(NamedTuple):
    """Features [B,width,h,w] of a batch, and which of its pictures are clean, [B] bool."""

    features: torch.Tensor
    clean: torch.Tensor


def fit(gate: Gate, batches: Iterable[Seen], steps: int, *, clean: float, learning_rate: float = 1e-2) -> None:
    """Train the gate alone: the cross-entropy whose optimum is `clean` on clean pictures and 1 on degraded ones.

    Both kinds count alike, however many there are of each.

    Args:
        steps: how many batches there are; the learning rate falls to zero over them, as a cosine.
    """
    optimizer = torch.optim.Adam(gate.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for seen in batches:
        logits = gate.logits(seen.features).mean((1, 2, 3))
        wanted = torch.where(seen.clean, clean, 1.0)
        each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        kinds = [each[rows].mean() for rows in (seen.clean, ~seen.clean) if rows.any()]
        loss = torch.stack(kinds).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
