"""The attribute-aware reward and its advantage inside a group: the formula, in torch and as a kernel.

`gdpo.scores.group.GroupReward` applies it to pictures.

Every metric is min-max normalised inside its group; the fidelity metrics count by the share of smooth area, the
perceptual metrics by the share of texture (arXiv 2603.16769):

    R_g = smooth * mean_F norm(fidelity_g) + texture * mean_P norm(perceptual_g)
    A_g = (R_g - mean R) / (std R + 1e-8)            (unbiased std)

Unlike the released code, a metric that is equal for the whole group gives 0, not NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks
from .dispatch import jit, tl, use_triton
from .launch import options, power_of_two

EPSILON = 1e-8


def _of_kind(metrics: Tensor, weights: Tensor | None) -> Tensor:
    """[B,G,M] -> [B,G]: the (weighted) mean of the min-max normalised metrics; 0 for a tie and for M = 0."""
    low, high = metrics.amin(1, keepdim=True), metrics.amax(1, keepdim=True)
    span = high - low
    scaled = (metrics - low) / torch.where(span > 0, span, torch.ones_like(span))
    if weights is None:
        return scaled.sum(2) / max(metrics.shape[2], 1)
    return (scaled * (weights / weights.sum()).to(scaled.dtype)).sum(2)


def group_scores(
    fidelity: Tensor,
    perceptual: Tensor,
    smooth: Tensor,
    texture: Tensor,
    fidelity_weights: Tensor | None = None,
    perceptual_weights: Tensor | None = None,
) -> Tensor:
    """The reward itself: R_g of the module's docstring, [B,G], of which the advantage is the standardised form.

    In fp64 for fp64 metrics and in fp32 otherwise; not negative, at most smooth + texture. Arguments as in
    `attribute_reward`, which checks them.
    """
    dtype = torch.promote_types(torch.promote_types(fidelity.dtype, perceptual.dtype), torch.float32)
    reward = smooth.to(dtype)[:, None] * _of_kind(fidelity.to(dtype), fidelity_weights)
    return reward + texture.to(dtype)[:, None] * _of_kind(perceptual.to(dtype), perceptual_weights)


def attribute_reward_reference(
    fidelity: Tensor,
    perceptual: Tensor,
    smooth: Tensor,
    texture: Tensor,
    fidelity_weights: Tensor | None = None,
    perceptual_weights: Tensor | None = None,
) -> Tensor:
    """The definition, in fp64 for fp64 metrics and in fp32 otherwise. Arguments as in `attribute_reward`."""
    reward = group_scores(fidelity, perceptual, smooth, texture, fidelity_weights, perceptual_weights)
    centred = reward - reward[:, :1]  # exactly 0 for a tie: rounding of the mean would count as much as 1e-8 does
    return (centred - centred.mean(1, keepdim=True)) / (centred.std(1, keepdim=True) + EPSILON)


@jit
def _group_scores_of(
    metrics_ptr, weights_ptr, b, group, count, GROUP: tl.constexpr, COUNT: tl.constexpr, WEIGHTED: tl.constexpr
):
    """The weighted mean of a picture's min-max normalised metrics, [GROUP]; 0 for a tie and for no metric."""
    g, m = tl.arange(0, GROUP)[:, None], tl.arange(0, COUNT)[None, :]
    inside = (g < group) & (m < count)
    x = tl.load(metrics_ptr + (b * group + g) * count + m, mask=inside, other=0.0).to(tl.float32)
    low = tl.min(tl.where(inside, x, float("inf")), 0, keep_dims=True)
    high = tl.max(tl.where(inside, x, float("-inf")), 0, keep_dims=True)
    span = tl.where(high > low, high - low, 1.0)
    scaled = tl.where(inside, tl.div_rn(x - low, span), 0.0)
    if WEIGHTED:
        weights = tl.load(weights_ptr + m, mask=m < count, other=0.0).to(tl.float32)
        return tl.sum(scaled * tl.div_rn(weights, tl.sum(weights)), 1)
    return tl.sum(scaled, 1) / tl.maximum(count, 1).to(tl.float32)


@jit
def _attribute_reward_fwd_kernel(
    fidelity_ptr,
    perceptual_ptr,
    smooth_ptr,
    texture_ptr,
    fidelity_weights_ptr,
    perceptual_weights_ptr,
    advantage_ptr,
    group,
    n_fidelity,
    n_perceptual,
    epsilon,
    GROUP: tl.constexpr,
    FIDELITY: tl.constexpr,
    PERCEPTUAL: tl.constexpr,
    FIDELITY_WEIGHTED: tl.constexpr,
    PERCEPTUAL_WEIGHTED: tl.constexpr,
):
    """One picture a program."""
    b = tl.program_id(0).to(tl.int64)
    smooth, texture = tl.load(smooth_ptr + b).to(tl.float32), tl.load(texture_ptr + b).to(tl.float32)
    reward = smooth * _group_scores_of(
        fidelity_ptr, fidelity_weights_ptr, b, group, n_fidelity, GROUP, FIDELITY, FIDELITY_WEIGHTED
    )
    reward += texture * _group_scores_of(
        perceptual_ptr, perceptual_weights_ptr, b, group, n_perceptual, GROUP, PERCEPTUAL, PERCEPTUAL_WEIGHTED
    )
    g = tl.arange(0, GROUP)
    inside = g < group
    centred = reward - tl.sum(tl.where(g == 0, reward, 0.0))
    centred -= tl.sum(tl.where(inside, centred, 0.0)) / group.to(tl.float32)
    variance = tl.sum(tl.where(inside, centred * centred, 0.0)) / (group - 1).to(tl.float32)
    tl.store(advantage_ptr + b * group + g, tl.div_rn(centred, tl.sqrt_rn(variance) + epsilon), mask=inside)


def _launch(
    fidelity: Tensor,
    perceptual: Tensor,
    smooth: Tensor,
    texture: Tensor,
    fidelity_weights: Tensor | None = None,
    perceptual_weights: Tensor | None = None,
) -> Tensor:
    b, g, f = fidelity.shape
    p = perceptual.shape[2]
    advantage = torch.empty(b, g, dtype=torch.float32, device=fidelity.device)
    with torch.cuda.device_of(fidelity):
        _attribute_reward_fwd_kernel[(b,)](
            fidelity.contiguous(), perceptual.contiguous(), smooth.contiguous(), texture.contiguous(),
            smooth if fidelity_weights is None else fidelity_weights.contiguous(),
            smooth if perceptual_weights is None else perceptual_weights.contiguous(), advantage,
            g, f, p, EPSILON, GROUP=power_of_two(g), FIDELITY=power_of_two(f), PERCEPTUAL=power_of_two(p),
            FIDELITY_WEIGHTED=fidelity_weights is not None, PERCEPTUAL_WEIGHTED=perceptual_weights is not None,
            **options(1),
        )  # fmt: skip
    return advantage


@torch.no_grad()
def attribute_reward(
    fidelity: Tensor,
    perceptual: Tensor,
    smooth: Tensor,
    texture: Tensor,
    *,
    fidelity_weights: Tensor | None = None,
    perceptual_weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Advantages of B groups of G samples, from metrics of which higher is better. No gradient flows.

    Args:
        fidelity: [B,G,F] full-reference metrics (PSNR-Y in the paper); F may be 0.
        perceptual: [B,G,P] no-reference metrics (MANIQA, MUSIQ in the paper); P may be 0, but not both.
        smooth: [B] share of smooth area, in [0,1], from `attribute_ratios`.
        texture: [B] share of texture area, likewise.
        fidelity_weights: [F] above 0, relative to each other; None weighs alike (the paper).
        perceptual_weights: [P], likewise.
        backend: "auto", "torch" (the definition) or "triton" (one launch for the batch).

    Returns:
        [B,G] advantage, fp32 (fp64 for fp64 metrics): mean 0 and std 1 in a group, or all 0 where all rewards tie.

    Raises:
        TypeError, ValueError: a wrong type, rank, size or device, G = 1, no metric at all, NaN (see `checks`).
        RuntimeError: backend="triton" where it cannot run.
    """
    sizes = checks.tensor("fidelity", fidelity, "B,G,F")
    sizes = checks.tensor("perceptual", perceptual, "B,G,P", sizes)
    checks.tensor("smooth", smooth, "B", sizes)
    checks.tensor("texture", texture, "B", sizes)
    checks.group("fidelity", sizes)
    if sizes["F"] + sizes["P"] == 0:
        raise ValueError("fidelity and perceptual must hold at least one metric together; got F=0 and P=0")
    for name, weights, axis in (
        ("fidelity_weights", fidelity_weights, "F"),
        ("perceptual_weights", perceptual_weights, "P"),
    ):
        if weights is not None:
            checks.tensor(name, weights, axis, sizes)
            checks.between(name, weights, 1e-6, math.inf, "leave out a metric that shall not count")
    inputs: dict[str, Tensor | None] = {"fidelity": fidelity, "perceptual": perceptual}
    inputs |= {"smooth": smooth, "texture": texture}
    inputs |= {"fidelity_weights": fidelity_weights, "perceptual_weights": perceptual_weights}
    checks.same_device(**inputs)
    checks.finite(**inputs)
    if use_triton(backend, fidelity, perceptual, smooth, texture):
        return _launch(fidelity, perceptual, smooth, texture, fidelity_weights, perceptual_weights)
    return attribute_reward_reference(fidelity, perceptual, smooth, texture, fidelity_weights, perceptual_weights)
