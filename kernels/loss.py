"""The GDPO loss: a group of predictions against a frozen reference, weighted by advantages.

With m_g = mean |pred_g - noise_g|^2 and r_g the same of the reference (arXiv 2603.16769):

    margin = -(beta / 2) * sum_g A_g (m_g - r_g),    loss = -mean_B log sigmoid(margin)

With beta = 5000 the difference of two means cancels (a relative error of 6e-4 in fp32), so both implementations sum
(pred - ref)(pred + ref - 2 noise), which is |pred - noise|^2 - |ref - noise|^2 element by element.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .dispatch import jit, tl, use_triton
from .launch import in_order, is_channels_last, options, power_of_two


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


@jit
def _pixel_weight(weight_ptr, b, i, n, channels, CHANNELS_LAST: tl.constexpr):
    """Weights of the elements i of a sample of n."""
    pixel = i // channels if CHANNELS_LAST else i % (n // channels)
    return tl.load(weight_ptr + b * (n // channels) + pixel, mask=i < n, other=0.0).to(tl.float32)


@jit
def _gdpo_loss_fwd_kernel(
    pred_ptr,
    noise_ptr,
    ref_ptr,
    weight_ptr,
    partial_ptr,
    n,
    group,
    channels,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """A chunk of STEPS * BLOCK elements of one sample a program: the chunk's sums of w * difference, and of w."""
    chunk, sample = tl.program_id(0), tl.program_id(1)
    base = sample.to(tl.int64) * n
    total = tl.zeros((BLOCK,), tl.float32)
    weights = tl.zeros((BLOCK,), tl.float32)
    for step in tl.static_range(STEPS):
        i = (chunk * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        pred = tl.load(pred_ptr + base + i, mask=i < n, other=0.0).to(tl.float32)
        noise = tl.load(noise_ptr + base + i, mask=i < n, other=0.0).to(tl.float32)
        ref = tl.load(ref_ptr + base + i, mask=i < n, other=0.0).to(tl.float32)
        difference = (pred - ref) * (pred + ref - 2 * noise)
        if WEIGHTED:
            w = _pixel_weight(weight_ptr, (sample // group).to(tl.int64), i, n, channels, CHANNELS_LAST)
            difference *= w
            weights += w
        total += difference
    out = (sample.to(tl.int64) * tl.num_programs(0) + chunk) * 2
    tl.store(partial_ptr + out, tl.sum(total))
    if WEIGHTED:
        tl.store(partial_ptr + out + 1, tl.sum(weights))


@jit
def _gdpo_loss_reduce_kernel(
    partial_ptr,
    advantage_ptr,
    loss_ptr,
    margin_ptr,
    scale_ptr,
    images,
    group,
    chunks,
    n,
    beta,
    IMAGES: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """One program, in a fixed order: margins, the loss, and scale = d margin / d pred over (pred - noise)."""
    g, c = tl.arange(0, GROUP), tl.arange(0, CHUNKS)
    loss = tl.zeros((IMAGES,), tl.float32)
    for first in range(0, images, IMAGES):
        b = first + tl.arange(0, IMAGES)
        sample = b[:, None] * group + g[None, :]
        inside = (b < images)[:, None] & (g < group)[None, :]
        total = tl.zeros((IMAGES, GROUP, CHUNKS), tl.float32)
        weights = tl.zeros((IMAGES, GROUP, CHUNKS), tl.float32)
        for start in range(0, chunks, CHUNKS):
            at = (sample.to(tl.int64)[:, :, None] * chunks + start + c[None, None, :]) * 2
            there = inside[:, :, None] & (start + c < chunks)[None, None, :]
            total += tl.load(partial_ptr + at, mask=there, other=0.0)
            if WEIGHTED:
                weights += tl.load(partial_ptr + at + 1, mask=there, other=0.0)
        if WEIGHTED:
            summed = tl.sum(weights, 2)
            inverse = tl.where(summed > 0, tl.div_rn(1.0, tl.where(summed > 0, summed, 1.0)), 0.0)
        else:
            inverse = tl.zeros((IMAGES, GROUP), tl.float32) + tl.div_rn(1.0, 1.0 * n)
        advantage = tl.load(advantage_ptr + sample, mask=inside, other=0.0).to(tl.float32)
        tl.store(scale_ptr + sample, -beta * advantage * inverse, mask=inside)
        margin = -0.5 * beta * tl.sum(advantage * (tl.sum(total, 2) * inverse), 1)
        tl.store(margin_ptr + b, margin, mask=b < images)
        # -log sigmoid(m) = max(-m, 0) + log1p(exp(-|m|)), where log1p(t) = log(u) * t / (u - 1) for u = 1 + t.
        t = tl.exp(-tl.abs(margin))
        u = 1 + t
        log1p = tl.where(u == 1, t, tl.log(u) * tl.div_rn(t, tl.where(u == 1, 1.0, u - 1)))
        loss += tl.where(b < images, tl.maximum(-margin, 0.0) + log1p, 0.0)
    tl.store(loss_ptr, tl.sum(loss) / images)


@jit
def _gdpo_loss_bwd_kernel(
    pred_ptr,
    noise_ptr,
    weight_ptr,
    margin_ptr,
    scale_ptr,
    grad_loss_ptr,
    grad_margin_ptr,
    grad_ptr,
    n,
    images,
    group,
    channels,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    FROM_LOSS: tl.constexpr,
    FROM_MARGIN: tl.constexpr,
):
    """A chunk of one sample a program: grad = (d loss / d margin) * scale * w * (pred - noise)."""
    chunk, sample = tl.program_id(0), tl.program_id(1)
    b = sample // group
    upstream = 0.0
    if FROM_LOSS:
        margin = tl.load(margin_ptr + b)
        t = tl.exp(-tl.abs(margin))  # at most 1
        sigmoid = tl.where(margin > 0, t, 1.0) / (1 + t)
        upstream -= tl.load(grad_loss_ptr).to(tl.float32) * sigmoid / images
    if FROM_MARGIN:
        upstream += tl.load(grad_margin_ptr + b).to(tl.float32)
    factor = upstream * tl.load(scale_ptr + sample)
    base = sample.to(tl.int64) * n
    for step in tl.static_range(STEPS):
        i = (chunk * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        pred = tl.load(pred_ptr + base + i, mask=i < n, other=0.0).to(tl.float32)
        noise = tl.load(noise_ptr + base + i, mask=i < n, other=0.0).to(tl.float32)
        grad = factor * (pred - noise)
        if WEIGHTED:
            grad *= _pixel_weight(weight_ptr, b.to(tl.int64), i, n, channels, CHANNELS_LAST)
        tl.store(grad_ptr + base + i, grad.to(grad_ptr.dtype.element_ty), mask=i < n)


BLOCK = 2048
BUSY = 1024  # programs that keep a GPU busy


def _chunking(samples: int, n: int) -> tuple[int, int]:
    """(chunks, steps): long chunks where there is work for every multiprocessor anyway, short ones where not."""
    steps = 4 if samples * n >= 4 * BLOCK * BUSY else 1
    return -(-n // (BLOCK * steps)), steps


CHANNELS = 2  # the axis, of [B,G,C,H,W]


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and is_channels_last(x, CHANNELS)


def _forward(
    pred: Tensor, noise: Tensor, ref_pred: Tensor, advantage: Tensor, weight: Tensor | None, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """loss [], margin [B], and scale [B,G] for the backward pass."""
    images, group, channels, *_ = pred.shape
    samples, n = images * group, math.prod(pred.shape[2:])
    last = _is_channels_last(pred)
    pred, noise, ref_pred = (in_order(x, CHANNELS, last) for x in (pred, noise, ref_pred))
    weight = None if weight is None else weight.contiguous()
    chunks, steps = _chunking(samples, n)
    partial = pred.new_empty(samples, chunks, 2, dtype=torch.float32)
    margin = pred.new_empty(images, dtype=torch.float32)
    scale = pred.new_empty(images, group, dtype=torch.float32)
    loss = pred.new_empty((), dtype=torch.float32)
    group_width, chunk_width = power_of_two(group), min(power_of_two(chunks), 32)
    with torch.cuda.device_of(pred):
        _gdpo_loss_fwd_kernel[(chunks, samples)](
            pred, noise, ref_pred, pred if weight is None else weight, partial, n, group, channels,
            BLOCK=BLOCK, STEPS=steps, WEIGHTED=weight is not None, CHANNELS_LAST=last, **options(8),
        )  # fmt: skip
        _gdpo_loss_reduce_kernel[(1,)](
            partial, advantage.contiguous(), loss, margin, scale, images, group, chunks, n, beta,
            IMAGES=max(1, min(power_of_two(images), 1024 // (group_width * chunk_width))), GROUP=group_width,
            CHUNKS=chunk_width, WEIGHTED=weight is not None, **options(8),
        )  # fmt: skip
    return loss, margin, scale


def _backward(
    pred: Tensor,
    noise: Tensor,
    weight: Tensor | None,
    margin: Tensor,
    scale: Tensor,
    grad_loss: Tensor | None,
    grad_margin: Tensor | None,
) -> Tensor:
    """The gradient of pred [B,G,C,H,W], in its dtype and order."""
    images, group, channels, *_ = pred.shape
    samples, n = images * group, math.prod(pred.shape[2:])
    last = _is_channels_last(pred)
    pred, noise = in_order(pred, CHANNELS, last), in_order(noise, CHANNELS, last)
    chunks, steps = _chunking(samples, n)
    grad = torch.empty_like(pred)
    with torch.cuda.device_of(pred):
        _gdpo_loss_bwd_kernel[(chunks, samples)](
            pred, noise, pred if weight is None else weight.contiguous(), margin, scale,
            margin if grad_loss is None else grad_loss,
            margin if grad_margin is None else grad_margin.contiguous(), grad, n, images, group, channels,
            BLOCK=BLOCK, STEPS=steps, WEIGHTED=weight is not None, CHANNELS_LAST=last,
            FROM_LOSS=grad_loss is not None, FROM_MARGIN=grad_margin is not None, **options(8),
        )  # fmt: skip
    return grad


class _GdpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred, noise, ref_pred, advantage, weight, beta):  # setup_context would look at its signature
        loss, margin, scale = _forward(pred, noise, ref_pred, advantage, weight, beta)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(pred, noise, weight, margin, scale)
        return loss, margin

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, grad_margin):
        if grad_loss is None and grad_margin is None:
            return (None,) * 6
        pred, noise, weight, margin, scale = ctx.saved_tensors
        return _backward(pred, noise, weight, margin, scale, grad_loss, grad_margin), *(None,) * 5


# The same as operators that torch.compile does not look into. Eager calls go past them: an operator of the library
# costs 20 microseconds a call more than an autograd function does.
@torch.library.custom_op("gdpo::loss_forward", mutates_args=())
def _forward_op(
    pred: Tensor, noise: Tensor, ref_pred: Tensor, advantage: Tensor, weight: Tensor | None, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(pred, noise, ref_pred, advantage, weight, beta)


@_forward_op.register_fake
def _(pred, noise, ref_pred, advantage, weight, beta):
    new = functools.partial(pred.new_empty, dtype=torch.float32)
    return new(()), new(pred.shape[0]), new(pred.shape[:2])


@torch.library.custom_op("gdpo::loss_backward", mutates_args=())
def _backward_op(
    pred: Tensor,
    noise: Tensor,
    weight: Tensor | None,
    margin: Tensor,
    scale: Tensor,
    grad_loss: Tensor | None,
    grad_margin: Tensor | None,
) -> Tensor:
    return _backward(pred, noise, weight, margin, scale, grad_loss, grad_margin)


@_backward_op.register_fake
def _(pred, noise, weight, margin, scale, grad_loss, grad_margin):
    return torch.empty_like(in_order(pred, CHANNELS, _is_channels_last(pred)))


def _op_setup(ctx, inputs, output):
    pred, noise, _, _, weight, _ = inputs
    ctx.save_for_backward(pred, noise, weight, *output[1:])


def _op_backward(ctx, grad_loss, grad_margin, _):
    return _backward_op(*ctx.saved_tensors, grad_loss, grad_margin), *(None,) * 5


_forward_op.register_autograd(_op_backward, setup_context=_op_setup)


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
    if use_triton(backend, pred, noise, ref_pred, advantage, weight):
        inputs = pred, noise, ref_pred, advantage, weight, float(beta)
        return _forward_op(*inputs)[:2] if torch.compiler.is_compiling() else _GdpoLoss.apply(*inputs)
    return gdpo_loss_reference(pred, noise, ref_pred, advantage, float(beta), weight)
