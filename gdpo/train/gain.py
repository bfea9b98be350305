"""What tuning changed: the policy against its own reference, on the same pictures with the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from gdpo.generator import OneStepGenerator
from gdpo.kernels import attribute_ratios, attribute_statistics
from gdpo.randomness import moved
from gdpo.scores.registry import Reward, require_finite
from gdpo.train.setup import group_noise

LUMA = (0.299, 0.587, 0.114)


class Comparison(NamedTuple):
    """`scores`: name -> [B,2] (before, after), means over noises; `before`, `after`: images [B,3,H,W] of one noise."""

    scores: dict[str, torch.Tensor]
    before: torch.Tensor
    after: torch.Tensor


def luma(images: torch.Tensor) -> torch.Tensor:
    """[B,3,H,W] in [-1,1] -> gray [B,H,W] in [0,1]."""
    red, green, blue = ((images + 1) / 2).unbind(1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def group_reward(
    scores: Sequence[tuple[str, torch.Tensor]], smooth: torch.Tensor, texture: torch.Tensor
) -> torch.Tensor:
    """The attribute-aware reward before it is standardised (paper: R_i): for reading, training uses the kernel.

    Args:
        scores: (kind, [B,G]) of every reward function.
        smooth, texture: [B], weights of the kinds fidelity and perceptual.
    """
    total = torch.zeros_like(scores[0][1])
    for kind, share in (("fidelity", smooth), ("perceptual", texture)):
        of_kind = [s for k, s in scores if k == kind]
        for s in of_kind:
            low, high = s.amin(1, keepdim=True), s.amax(1, keepdim=True)
            total = total + share[:, None] / len(of_kind) * (s - low) / (high - low).clamp_min(1e-12)
    return total


@torch.no_grad()
def compare(
    generator: OneStepGenerator,
    lr_up: torch.Tensor,
    hr: torch.Tensor,
    rewards: Sequence[Reward],
    *,
    samples: list[int],
    seed: int,
    noises: int,
    text: torch.Tensor | None = None,
) -> Comparison:
    """Score `noises` samples of the reference and of the policy, picture by picture, as one group.

    Args:
        lr_up, hr: [B,3,H,W] in [-1,1].
        samples: numbers that name the noise, with `seed`.
        text: prompt embeddings [B,L,D] or None.
    """
    rows: dict[str, list[torch.Tensor]] = {}
    befores, afters = [], []
    for i, sample in enumerate(samples):
        latents = generator.encode(lr_up[i : i + 1]).repeat_interleave(noises, dim=0)
        noise = moved(group_noise(latents.shape, seed, "compare", [sample], noises), latents)
        prompt = None if text is None else text[i : i + 1]
        with generator.reference():
            before = generator.decode(generator.predict(latents, noise, prompt).x0)
        after = generator.decode(generator.predict(latents, noise, prompt).x0)
        target, group = hr[i : i + 1], torch.cat([before, after])[None].float()  # [1,2N,3,H,W]
        smooth, texture, mask = attribute_ratios(luma(target))
        statistics = attribute_statistics(group, target, mask)
        scores = {r.name: r.score(group, target, statistics) for r in rewards}
        require_finite(scores)
        reward = group_reward([(r.kind, scores[r.name]) for r in rewards], smooth, texture)
        columns = {"reward": reward, "psnr_y": statistics.psnr_y} | scores
        for name, values in columns.items():
            rows.setdefault(name, []).append(values[0].unflatten(0, (2, -1)).mean(1))
        befores.append(before[:1])
        afters.append(after[:1])
    return Comparison({k: torch.stack(v) for k, v in rows.items()}, torch.cat(befores), torch.cat(afters))
