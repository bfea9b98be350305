"""The GDPO loss: a group of predictions against a frozen reference, weighted by advantages.

With m_g = mean |pred_g - noise_g|^2 and r_g the same of the reference (arXiv 2603.16769):

    margin = -(beta / 2) * sum_g A_g (m_g - r_g),    loss = -mean_B log sigmoid(margin)

With beta = 5000 the difference of two means cancels (a relative error of 6e-4 in fp32), so both implementations sum
(pred - ref)(pred + ref - 2 noise), which is |pred - noise|^2 - |ref - noise|^2 element by element.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .dispatch import use_triton


def gdpo_loss_reference(
    pred: Tensor, noise: Tensor, ref_pred: Tensor, advantage: Tensor, beta: float, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, differentiable, in fp64 for fp64 inputs and in fp32 otherwise. Arguments as in `gdpo_loss`."""
    dtype = torch.promote_types(pred.dtype, torch.float32)
    pred, noise, ref_pred = pred.to(dtype), noise.to(dtype), ref_pred.to(dtype)
    difference = (pred - ref_pred) * (pred + ref_pred - 2 * noise)
    if weight is None:
        ratio = difference.mean((2, 3, 4))
    else:
        w = weight.to(dtype)[:, None, None]
        total = (w.sum((2, 3, 4)) * pred.shape[2]).expand(-1, 1)
        summed = (difference * w).sum((2, 3, 4))
        ratio = torch.where(total > 0, summed / total.clamp_min(torch.finfo(dtype).tiny), torch.zeros_like(summed))
    margin = -(beta / 2) * (advantage.to(dtype) * ratio).sum(1)
    return -F.logsigmoid(margin).mean(), margin


def gdpo_loss(
    pred: Tensor,
    noise: Tensor,
    ref_pred: Tensor,
    advantage: Tensor,
    *,
    beta: float = 5000.0,
    weight: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """GDPO loss and log-likelihood-ratio margins of B groups.

    Args:
        pred: [B,G,C,H,W], the policy's noise prediction; the one argument that gets a gradient.
        noise: [B,G,C,H,W], the noise that was added to the latents.
        ref_pred: [B,G,C,H,W], the frozen reference's prediction.
        advantage: [B,G], e.g. from `attribute_reward`.
        beta: strength of the preference, > 0.
        weight: [B,H,W] >= 0 weighs the squared errors per latent pixel (a departure from the paper): m_g becomes
            sum(w * error) / (C * sum(w)). A picture whose weights are all zero has margin 0 and no gradient.
        backend: "auto", "torch" (the definition) or "triton".

    Returns:
        loss: [] fp32 (fp64 for fp64 pred).
        margin: [B], the same dtype; positive where the policy prefers what the advantages prefer. Its mean and the
            share above 0 are TRL's rewards/margins and rewards/accuracies. Reading it later costs no sync now.

    Raises:
        TypeError, ValueError: a wrong type, rank, size or device, G = 1, a noise, reference, advantage or weight that
            requires grad, NaN (see `checks`).
        RuntimeError: backend="triton" where it cannot run.
    """
    sizes = checks.tensor("pred", pred, "B,G,C,H,W")
    checks.tensor("noise", noise, "B,G,C,H,W", sizes)
    checks.tensor("ref_pred", ref_pred, "B,G,C,H,W", sizes)
    checks.tensor("advantage", advantage, "B,G", sizes)
    checks.group("pred", sizes)
    if weight is not None:
        checks.tensor("weight", weight, "B,H,W", sizes)
    if not (isinstance(beta, float | int) and 0 < beta < float("inf")):
        raise ValueError(f"beta must be a number > 0; got {beta!r}")
    checks.same_device(pred=pred, noise=noise, ref_pred=ref_pred, advantage=advantage, weight=weight)
    checks.no_grad(noise=noise, ref_pred=ref_pred, advantage=advantage, weight=weight)
    checks.finite(pred=pred, noise=noise, ref_pred=ref_pred, advantage=advantage)
    if weight is not None:
        checks.between("weight", weight, 0.0, float("inf"), "weights must not be negative")
    use_triton(backend, pred, noise, ref_pred, advantage, weight)
    return gdpo_loss_reference(pred, noise, ref_pred, advantage, float(beta), weight)
