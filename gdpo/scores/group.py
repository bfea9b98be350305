"""The attribute-aware reward of groups of samples: what training learns from, logs, and is judged by.

    judge = GroupReward(build_rewards(["psnr_y", "naturalness"]))
    judged = judge(samples, target)         # .reward, .advantage, .scores["psnr_y"], each [B,G]

Where the weights count is a choice (`normalization`); with w the weight of a metric and norm its min-max normalisation
inside the group:

    group       R = smooth * sum_F w norm / sum_F w + texture * sum_P w norm / sum_P w      (the paper)
    weighted    R = (smooth * sum_F w norm + texture * sum_P w norm) / sum w
    none        R = (smooth * sum_F w metric + texture * sum_P w metric) / sum w
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gdpo.kernels import AttributeStatistics, attribute_ratios, attribute_reward, attribute_statistics, group_scores
from gdpo.randomness import moved
from gdpo.scores.luma import luma
from gdpo.scores.registry import Kind
from gdpo.scores.rewards import Reward, require_finite

Normalization = Literal["group", "weighted", "none"]
KINDS: tuple[Kind, Kind] = ("fidelity", "perceptual")


def check_options(rewards: int, weights: Sequence[float] | None, rho: float | Literal["auto"]) -> None:
    """Raise ValueError for weights or a share that GroupReward cannot take, by the name of the option."""
    if weights is not None:
        if len(weights) != rewards:
            raise ValueError(f"reward_weights must have one number per reward function ({rewards}); got {len(weights)}")
        if not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"reward_weights must be finite and above 0; got {list(weights)}")
    if rho != "auto" and not (isinstance(rho, (int, float)) and 0 <= rho <= 1):
        raise ValueError(f"rho must be 'auto' or a number in [0,1]; got {rho!r}")


class Judged(NamedTuple):
    """What a group scored.

    Attributes:
        scores: [B,G] fp32 of each reward, by its name; not looked at (`require_finite`).
        reward: [B,G], R of the module's docstring.
        advantage: [B,G], the reward less its mean over its standard deviation, in the group.
        smooth, texture: [B], the shares that weighed fidelity and perception.
        mask: [B,H,W] bool, True where the target is textured.
        statistics: of the group.
    """

    scores: dict[str, Tensor]
    reward: Tensor
    advantage: Tensor
    smooth: Tensor
    texture: Tensor
    mask: Tensor
    statistics: AttributeStatistics


@dataclass(frozen=True)
class GroupReward:
    """From pictures to rewards: scores a group and applies `gdpo.kernels.attribute_reward`; holds all of its options.

    Args:
        rewards: what is measured (`build_rewards`).
        weights: a number above 0 for each of them; None weighs alike.
        normalization: what the weights mean; see the module's docstring.
        rho: the smooth share, in [0,1]; "auto" takes the picture's own (the paper).
        threshold: complexity above which a patch counts as texture.
        backend: of gdpo.kernels.

    The options of training and evaluation take their defaults from here.
    """

    rewards: Sequence[Reward]
    weights: Sequence[float] | None = None
    normalization: Normalization = "group"
    rho: float | Literal["auto"] = "auto"
    threshold: float = 50.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.normalization not in get_args(Normalization):
            raise ValueError(
                f"reward_normalization must be {', '.join(get_args(Normalization))}; got {self.normalization!r}"
            )
        check_options(len(self.rewards), self.weights, self.rho)

    def start(self, samples: Tensor, target: Tensor) -> dict[str, Callable[[], Tensor]]:
        """Send the samples to the rewards that other processes compute; by name, functions that wait for them."""
        return {r.name: r.start(samples, target) for r in self.rewards if r.start is not None}

    @torch.no_grad()
    def __call__(
        self, samples: Tensor, target: Tensor, started: Mapping[str, Callable[[], Tensor]] | None = None
    ) -> Judged:
        """Score samples [B,G,3,H,W] against target [B,3,H,W], both in [-1,1].

        Args:
            started: what `start` returned for the same pictures; None starts and waits.

        Raises:
            ValueError: names the reward whose score is of another shape, failed or (on a CPU) is not finite.
        """
        smooth, texture, mask = attribute_ratios(luma(target), threshold=self.threshold, backend=self.backend)
        if self.rho != "auto":
            smooth = torch.full_like(smooth, float(self.rho))
            texture = 1 - smooth
        statistics = attribute_statistics(samples, target, mask, backend=self.backend)
        started = self.start(samples, target) if started is None else started
        here = {r.name: r.score(samples, target, statistics) for r in self.rewards if r.name not in started}
        scores = {r.name: here[r.name] if r.name in here else started[r.name]() for r in self.rewards}
        try:
            reward, advantage = self._compared(scores, smooth, texture)
        except ValueError:  # the kernel looks at values where that costs nothing, but cannot name the reward
            require_finite(scores)
            raise
        return Judged(scores, reward, advantage, smooth, texture, mask, statistics)

    def _compared(self, scores: dict[str, Tensor], smooth: Tensor, texture: Tensor) -> tuple[Tensor, Tensor]:
        """Reward and advantage, [B,G] each."""
        fidelity, perceptual = (self._stacked(scores, kind) for kind in KINDS)
        weights = [self._weights(kind, smooth) for kind in KINDS]
        if self.normalization != "group":
            of_kind = [sum(self._numbers(kind)) for kind in KINDS]
            smooth, texture = (s * (n / sum(of_kind)) for s, n in zip((smooth, texture), of_kind))
        if self.normalization == "none":
            reward = smooth[:, None] * _mean(fidelity, weights[0]) + texture[:, None] * _mean(perceptual, weights[1])
            # As the only metric it is normalised in its group before it is standardised, which undoes that.
            fidelity, perceptual, weights = reward[..., None], perceptual[..., :0], [None, None]
            smooth = torch.ones_like(smooth)
        else:
            reward = group_scores(fidelity, perceptual, smooth, texture, *weights)
        advantage = attribute_reward(
            fidelity, perceptual, smooth, texture,
            fidelity_weights=weights[0], perceptual_weights=weights[1], backend=self.backend,
        )  # fmt: skip
        return reward, advantage

    def _stacked(self, scores: dict[str, Tensor], kind: Kind) -> Tensor:
        """[B,G,M], the M metrics of a kind."""
        of_kind = [scores[r.name] for r in self.rewards if r.kind == kind]
        like = next(iter(scores.values()))
        return torch.stack(of_kind, dim=-1) if of_kind else like.new_empty(*like.shape, 0)

    def _numbers(self, kind: Kind) -> list[float]:
        """The weights of the metrics of a kind."""
        weights = self.weights or [1.0] * len(self.rewards)
        return [w for r, w in zip(self.rewards, weights) if r.kind == kind]

    def _weights(self, kind: Kind, like: Tensor) -> Tensor | None:
        numbers = self._numbers(kind)
        return moved(torch.tensor(numbers), like) if self.weights is not None and numbers else None

    def warning(self) -> str | None:
        """One line where `weights` differ and change nothing, else None."""
        kinds = {k: self._numbers(k) for k in KINDS}
        alike_inside = all(len(set(numbers)) <= 1 for numbers in kinds.values())
        if self.normalization != "group" or not alike_inside or len({w for n in kinds.values() for w in n}) <= 1:
            return None
        names = {k: ", ".join(r.name for r in self.rewards if r.kind == k) for k in kinds}
        return (
            f"reward_weights {list(self.weights or [])} change nothing: with reward_normalization group they count "
            f"among rewards of one kind, and these are equal (fidelity: {names['fidelity']}; perceptual: "
            f"{names['perceptual']}); with reward_normalization weighted they count between the kinds too"
        )


def _mean(metrics: Tensor, weights: Tensor | None) -> Tensor:
    """[B,G,M] -> [B,G]: the weighted mean; 0 for M = 0."""
    if weights is None:
        return metrics.sum(2) / max(metrics.shape[2], 1)
    return (metrics * (weights / weights.sum())).sum(2)
