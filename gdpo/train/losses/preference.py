"""Losses of the algorithms that GDPO is compared with, on the same groups of samples and the same predictions.

All of them see a sample through the one-step likelihood, as Diffusion-DPO and GDPO do (arXiv 2311.12908, eq. 14): with
m = mean |policy - noise|^2 and r the same of the reference,

    l = log p_policy(x) / p_reference(x) = -(beta / 2) (m - r)                                          [B,K]

The samples come from the reference, which so is the "old" policy of GRPO and DiffusionNFT as well.

Each function takes K samples of B pictures: predictions of the noise [B,K,C,h,w], advantage and reward [B,K]. It
returns (loss [], margin [B]); the margin is how far the policy prefers what the rewards prefer. A weight [B,h,w] >= 0
makes every mean over latent pixels a weighted one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_of(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """[B,K,C,h,w] -> [B,K]: the mean over a sample, weighted by [B,h,w]."""
    if weight is None:
        return x.mean((2, 3, 4))
    w = weight.to(x.dtype)[:, None, None]
    return (x * w).sum((2, 3, 4)) / (w.sum((2, 3, 4)) * x.shape[2])


def log_ratio(policy: Tensor, noise: Tensor, reference: Tensor, beta: float, weight: Tensor | None = None) -> Tensor:
    """l of the module's docstring, [B,K]. Written as a product: the difference of two means would cancel in fp32."""
    return -(beta / 2) * mean_of((policy - reference) * (policy + reference - 2 * noise), weight)


def grpo_loss(
    policy: Tensor,
    noise: Tensor,
    reference: Tensor,
    advantage: Tensor,
    *,
    beta: float,
    epsilon: float,
    kl: float,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """GRPO (arXiv 2402.03300, eq. 3, with its estimator of the KL divergence, eq. 4), of an answer of one step.

    With the ratio q = exp(l) and q' = q clipped to [1 - epsilon, 1 + epsilon]:

        loss = -mean_BG [min(q A, q' A) - kl (1/q + log q - 1)]

    Where it differs: one likelihood for a whole picture, as a one-step generator has no chain of steps (Flow-GRPO,
    arXiv 2505.05470, has); the old policy stays the reference.
    """
    log_q = log_ratio(policy, noise, reference, beta, weight)
    q = log_q.exp()
    surrogate = torch.minimum(q * advantage, q.clamp(1 - epsilon, 1 + epsilon) * advantage)
    divergence = torch.expm1(-log_q) + log_q
    return -(surrogate - kl * divergence).mean(), (advantage * log_q).sum(1)


def nft_loss(
    policy: Tensor,
    noise: Tensor,
    reference: Tensor,
    advantage: Tensor,
    *,
    beta: float,
    strength: float,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """DiffusionNFT (arXiv 2509.16117, eq. 5): a positive and a negative policy, mirrored in the old one.

    With s = `strength` (the paper's beta) and the optimality probability o = 1/2 + 1/2 clip(A, -1, 1):

        p+ = (1 - s) reference + s policy,    p- = (1 + s) reference - s policy
        loss = mean_BG [o |p+ - noise|^2 / a+  +  (1 - o) |p- - noise|^2 / a-]

    where a = mean |p - noise| without gradient is the paper's adaptive weight. Predictions are of the noise in place of
    a velocity, of which it is a linear function: the loss is the same up to a constant. The released code divides A by
    5 before it clips, divides the loss by s, and adds a distance to the reference.

    Args:
        beta: of the margin alone.
    """
    optimal = 0.5 + 0.5 * advantage.clamp(-1, 1)

    def normalised(prediction: Tensor) -> Tensor:
        error = prediction - noise
        return mean_of(error.square(), weight) / mean_of(error.detach().abs(), weight).clamp_min(1e-5)

    positive = normalised((1 - strength) * reference + strength * policy)
    negative = normalised((1 + strength) * reference - strength * policy)
    margin = (advantage * log_ratio(policy, noise, reference, beta, weight).detach()).sum(1)
    return (optimal * positive + (1 - optimal) * negative).mean(), margin


def diffusion_dpo_loss(
    policy: Tensor, noise: Tensor, reference: Tensor, reward: Tensor, *, beta: float, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Diffusion-DPO (arXiv 2311.12908, eq. 14) on the best (first) and the worst (last) of a group.

        loss = -mean_B log sigmoid(l_best - l_worst)

    Pictures whose samples tie count as margin 0: there is nothing to prefer.
    """
    l = log_ratio(policy, noise, reference, beta, weight)
    margin = (l[:, 0] - l[:, -1]) * (reward[:, 0] > reward[:, -1])
    return -F.logsigmoid(margin).mean(), margin


def dp2o_loss(
    policy: Tensor,
    noise: Tensor,
    reference: Tensor,
    reward: Tensor,
    spread: Tensor,
    *,
    beta: float,
    mean_spread: float,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """DP2O-SR (arXiv 2510.18851): each of the N best against each of the N worst, weighed by hierarchy.

        loss = mean_B mean_pairs w_intra w_inter (-log sigmoid(l_best - l_worst))
        w_intra = (R_best - R_worst) + 1 - (mean of that over the group's pairs)
        w_inter = spread + 1 - mean_spread

    Where it differs: the mean over pairs in place of their sum; `mean_spread`, which the paper takes over a set of
    samples drawn beforehand, is a constant, so that the loss of a picture depends on no other picture.

    Args:
        reward: [B,2N], R in descending order; so are the predictions.
        spread: [B], the standard deviation of R in the whole group.
        mean_spread: the same on average over groups (`reward_std` in the log).
    """
    n = reward.shape[1] // 2
    l = log_ratio(policy, noise, reference, beta, weight)
    margins = l[:, :n, None] - l[:, None, n:]  # [B,N,N]
    gap = reward[:, :n, None] - reward[:, None, n:]
    told_apart = (gap > 0).to(l.dtype)
    intra = gap + 1 - gap.mean((1, 2), keepdim=True)
    inter = (spread + 1 - mean_spread)[:, None, None]
    loss = -(intra * inter * F.logsigmoid(margins * told_apart)).mean()
    return loss, (margins * told_apart).mean((1, 2))
