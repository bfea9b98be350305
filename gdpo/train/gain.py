"""What tuning changed: the policy against its own reference, on the same pictures with the same noise."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gdpo.generator import OneStepGenerator
from gdpo.randomness import moved
from gdpo.scores.group import GroupReward
from gdpo.scores.rewards import require_finite
from gdpo.train.setup import group_noise


class Comparison(NamedTuple):
    """`scores`: name -> [B,2] (before, after), means over noises; `before`, `after`: images [B,3,H,W] of one noise."""

    scores: dict[str, torch.Tensor]
    before: torch.Tensor
    after: torch.Tensor


@torch.no_grad()
def compare(
    generator: OneStepGenerator,
    lr_up: torch.Tensor,
    hr: torch.Tensor,
    reward: GroupReward,
    *,
    samples: list[int],
    seed: int,
    noises: int,
    text: torch.Tensor | None = None,
) -> Comparison:
    """Score `noises` samples of the reference and of the policy, picture by picture, as one group.

    Args:
        lr_up, hr: [B,3,H,W] in [-1,1].
        reward: as training has it; its scores are the columns beside "reward" and "psnr_y".
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
        judged = reward(torch.cat([before, after])[None].float(), hr[i : i + 1])  # a group of [1,2N,3,H,W]
        require_finite(judged.scores)
        columns = {"reward": judged.reward, "psnr_y": judged.statistics.psnr_y} | judged.scores
        for name, values in columns.items():
            rows.setdefault(name, []).append(values[0].unflatten(0, (2, -1)).mean(1))
        befores.append(before[:1])
        afters.append(after[:1])
    return Comparison({k: torch.stack(v) for k, v in rows.items()}, torch.cat(befores), torch.cat(afters))
