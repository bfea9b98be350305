"""The attribute-aware reward and its advantage inside a group.

Every metric is min-max normalised inside its group; the fidelity metrics count by the share of smooth area, the
perceptual metrics by the share of texture (arXiv 2603.16769):

    R_g = smooth * mean_F norm(fidelity_g) + texture * mean_P norm(perceptual_g)
    A_g = (R_g - mean R) / (std R + 1e-8)            (unbiased std)

Unlike the released code, a metric that is equal for the whole group gives 0, not NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .dispatch import use_triton

EPSILON = 1e-8


def _group_scores(metrics: Tensor) -> Tensor:
    """[B,G,M] -> [B,G]: the mean of the min-max normalised metrics; 0 for a tie and for M = 0."""
    low, high = metrics.amin(1, keepdim=True), metrics.amax(1, keepdim=True)
    span = high - low
    scaled = (metrics - low) / torch.where(span > 0, span, torch.ones_like(span))
    return scaled.sum(2) / max(metrics.shape[2], 1)


def attribute_reward_reference(fidelity: Tensor, perceptual: Tensor, smooth: Tensor, texture: Tensor) -> Tensor:
    """The definition, in fp64 for fp64 metrics and in fp32 otherwise. Arguments as in `attribute_reward`."""
    dtype = torch.promote_types(torch.promote_types(fidelity.dtype, perceptual.dtype), torch.float32)
    reward = smooth.to(dtype)[:, None] * _group_scores(fidelity.to(dtype))
    reward = reward + texture.to(dtype)[:, None] * _group_scores(perceptual.to(dtype))
    centred = reward - reward[:, :1]  # exactly 0 for a tie: rounding of the mean would count as much as 1e-8 does
    return (centred - centred.mean(1, keepdim=True)) / (centred.std(1, keepdim=True) + EPSILON)


@torch.no_grad()
def attribute_reward(
    fidelity: Tensor, perceptual: Tensor, smooth: Tensor, texture: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Advantages of B groups of G samples, from metrics of which higher is better. No gradient flows.

    Args:
        fidelity: [B,G,F] full-reference metrics (PSNR-Y in the paper); F may be 0.
        perceptual: [B,G,P] no-reference metrics (MANIQA, MUSIQ in the paper); P may be 0, but not both.
        smooth: [B] share of smooth area, in [0,1], from `attribute_ratios`.
        texture: [B] share of texture area, likewise.
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
    checks.same_device(fidelity=fidelity, perceptual=perceptual, smooth=smooth, texture=texture)
    checks.finite(fidelity=fidelity, perceptual=perceptual, smooth=smooth, texture=texture)
    use_triton(backend, fidelity, perceptual, smooth, texture)
    return attribute_reward_reference(fidelity, perceptual, smooth, texture)
