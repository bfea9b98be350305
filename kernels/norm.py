"""Group normalisation with SiLU behind it, for channels-last features: read twice, written once; as much each way back.

Paper: Wu and He, "Group Normalization" (arXiv 1803.08494), equations 1 to 3 and 7. Statistics are in fp32 and do not
cancel: whatever the mean, they are sums about a point near it, merged pairwise (Chan et al. 1983). The gradient is that
of the features: weight and bias are frozen.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .dispatch import jit, tl, use_triton
from .launch import channels_innermost, is_channels_last, options, power_of_two
from .norm_split import (
    _before_silu,
    _group_norm_apply_bwd_kernel,
    _group_norm_apply_kernel,
    _group_norm_partial_bwd_kernel,
    _group_norm_partial_kernel,
    _group_norm_reduce_bwd_kernel,
    _group_norm_reduce_kernel,
    _silu,
)


def group_norm_reference(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    silu: bool = False,
    shift: Tensor | None = None,
) -> Tensor:
    """The definition, in fp64 for fp64 and in fp32 otherwise. Arguments as in `group_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(wide) if shift is None else x.to(wide) + shift.to(wide)[:, *(None,) * (x.ndim - 2)]
    out = F.group_norm(x_wide, groups, weight.to(wide), bias.to(wide), eps)
    return (F.silu(out) if silu else out).to(x.dtype)


@jit
def _group_norm_small_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    shift_ptr,
    out_ptr,
    length,
    eps,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SILU: tl.constexpr,
    SHIFTED: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """A group of a picture a program, all of it in registers: the variance is taken about the mean itself.

    The model's sizes are constants, so that loads are as wide as the start of a group allows. BACKWARD: the gradient of
    x, rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = weight * the gradient ahead of the SiLU.
    """
    g, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (r < length) & (c < PER_GROUP)
    base = n * length * CHANNELS + g * PER_GROUP
    offset = r * CHANNELS + c
    x = tl.load(x_ptr + base + offset, mask=inside, other=0.0).to(tl.float32)
    there = c < PER_GROUP
    if SHIFTED:
        x += tl.load(shift_ptr + g * PER_GROUP + c, mask=there, other=0.0).to(tl.float32)
    size = 1.0 * length * PER_GROUP
    d = tl.where(inside, x - tl.div_rn(tl.sum(x), size), 0.0)
    d = tl.where(inside, d - tl.div_rn(tl.sum(d), size), 0.0)  # what rounding left of the mean
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(d * d), size) + eps))
    weight = tl.load(weight_ptr + g * PER_GROUP + c, mask=there, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + g * PER_GROUP + c, mask=there, other=0.0).to(tl.float32)
    y = d * (rstd * weight) + bias
    if BACKWARD:
        grad = tl.load(grad_ptr + base + offset, mask=inside, other=0.0).to(tl.float32)
        grad = _before_silu(grad, y, SILU) * (rstd * weight)
        slope = tl.div_rn(tl.sum(grad * d), size) * rstd * rstd
        y = grad - tl.div_rn(tl.sum(grad), size) - d * slope
    elif SILU:
        y = _silu(y)
    tl.store(out_ptr + base + offset, y.to(out_ptr.dtype.element_ty), mask=inside)


TILE = 4096  # elements a tile, with 8 warps
SMALL = 16384  # elements of a group, rounded up, that one program keeps in registers; half with a gradient beside
BUSY = 1024  # programs that keep a GPU busy


def _tiling(images: int, length: int, channels: int) -> tuple[int, int, int]:
    """(rows, columns, steps) of a program. Columns divide the channels where they can: then no load is masked."""
    columns = min(max(channels & -channels, 32), 128)
    rows = TILE // columns
    tiles = images * -(-length // rows) * -(-channels // columns)
    steps = next(s for s in (8, 4, 2, 1) if s == 1 or tiles >= s * BUSY)
    return rows, columns, steps


def _statistics(x: Tensor, other: Tensor | None = None, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [N,C,...], or x + other + shift, and what `_launch` begins with: mean and deviations, [N,2,C,chunks].

    The channels of x and other are innermost in memory.
    """
    images, channels, length = len(x), x.shape[1], math.prod(x.shape[2:])
    rows, columns, steps = _tiling(images, length, channels)
    chunks = -(-length // (rows * steps))
    partial = x.new_empty(images, 2, channels, chunks, dtype=torch.float32)
    out = x if other is None else torch.empty_like(x)
    _group_norm_partial_kernel[(chunks, -(-channels // columns), images)](
        x, x if other is None else other, x if shift is None else shift, out, partial, length, channels, chunks,
        ROWS=rows, COLUMNS=columns, STEPS=steps, SUM=other is not None, SHIFTED=shift is not None, **options(8),
    )  # fmt: skip
    return out, partial


def _launch(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    shift: Tensor | None = None,
    statistics: Tensor | None = None,
    *,
    grad: Tensor | None = None,
    coefficient: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x [N,C,...] -> the same shape, channels-last, and a plane's coefficients [N,3,C] where it is split over programs.

    With grad, and those coefficients if there were any: the gradient of x instead.
    """
    x = channels_innermost(x)
    upstream = x if grad is None else channels_innermost(grad)
    out = torch.empty_like(x)
    images, channels, length = len(x), x.shape[1], math.prod(x.shape[2:])
    per_group, weight, bias = channels // groups, weight.contiguous(), bias.contiguous()
    shifted, shift = shift is not None, bias if shift is None else shift.contiguous()
    height, width = power_of_two(length), power_of_two(per_group)
    with torch.cuda.device_of(x):
        if height * width <= (SMALL if grad is None else SMALL // 2):
            warps = min(max(height * width // (1024 if grad is None else 512), 1), 16)
            _group_norm_small_kernel[(groups, images)](
                upstream, x, weight, bias, shift, out, length, eps, CHANNELS=channels, PER_GROUP=per_group,
                ROWS=height, COLUMNS=width, SILU=silu, SHIFTED=shifted, BACKWARD=grad is not None,
                **options(warps, registers=128),
            )  # fmt: skip
            return out, None
        rows, columns, steps = _tiling(images, length, channels)
        chunks = -(-length // (rows * steps))
        grid, each = (chunks, -(-channels // columns), images), {"ROWS": rows, "COLUMNS": columns, "STEPS": steps}
        if coefficient is None:
            partial = _statistics(x)[1] if statistics is None else statistics
            if partial.shape[-1] != chunks:
                raise ValueError(f"statistics must be of x, [N,2,C,{chunks}]; got {tuple(partial.shape)}")
            coefficient = x.new_empty(images, 3, channels, dtype=torch.float32)
            _group_norm_reduce_kernel[(groups, images)](
                partial, weight, shift, coefficient, length, channels, per_group, chunks, rows * steps, eps,
                COLUMNS=width, BLOCK=1024, SHIFTED=shifted, **options(8),
            )  # fmt: skip
        if grad is None:
            _group_norm_apply_kernel[grid](
                x, coefficient, bias, out, length, channels, **each, SILU=silu, **options(8)
            )  # fmt: skip
        else:
            partial = x.new_empty(images, 2, channels, chunks, dtype=torch.float32)
            sums = x.new_empty(images, 2, channels, dtype=torch.float32)
            _group_norm_partial_bwd_kernel[grid](
                upstream, x, coefficient, bias, partial, length, channels, chunks, **each, SILU=silu, **options(8)
            )
            _group_norm_reduce_bwd_kernel[(groups, images)](
                partial, coefficient, sums, length, channels, per_group, chunks, COLUMNS=width, BLOCK=1024, **options(8)
            )
            _group_norm_apply_bwd_kernel[grid](
                upstream, x, coefficient, bias, sums, out, length, channels, **each, SILU=silu, **options(8)
            )
    return out, coefficient


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, groups, weight, bias, eps, silu, shift, statistics):
        out, coefficient = _launch(x, groups, weight, bias, eps, silu, shift, statistics)
        ctx.save_for_backward(x, weight, bias, shift, coefficient)
        ctx.how = groups, eps, silu
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x, weight, bias, shift, coefficient), (groups, eps, silu) = ctx.saved_tensors, ctx.how
        how = groups, weight, bias, eps, silu, shift
        return _launch(x, *how, grad=grad, coefficient=coefficient)[0], *(None,) * 7


# An operator that torch.compile does not look into.
@torch.library.custom_op("gdpo::group_norm", mutates_args=())
def _group_norm_op(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, shift: Tensor | None = None
) -> Tensor:
    return _launch(x, groups, weight, bias, eps, silu, shift)[0]


@_group_norm_op.register_fake
def _(x, groups, weight, bias, eps, silu, shift=None):
    return torch.empty_like(channels_innermost(x))


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    silu: bool = False,
    shift: Tensor | None = None,
    statistics: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias over each group of channels, then y * sigmoid(y) if `silu`.

    Args:
        x: [N,C,H,W], or [N,C,L]; channels-last is fastest (C innermost in memory).
        groups: divides C.
        weight, bias: [C].
        eps: > 0.
        silu: apply SiLU to the result, before it is rounded to the type of x.
        shift: [C], added to x first: the bias of the convolution before it, without a pass of its own.
        statistics: [N,2,C,chunks], of x, from `residual_sum`: one pass over x less.
        backend: "auto" (Triton for channels-last features on a GPU, where it has every gradient that is needed),
            "torch" (the definition) or "triton" (with a gradient of x alone, outside torch.compile; other layouts are
            copied first).

    Returns:
        Like x; from Triton channels-last.

    Raises:
        TypeError, ValueError: a wrong type, rank, size or device, groups that do not divide C, a gradient
            that backend="triton" does not have.
        RuntimeError: backend="triton" where it cannot run.
    """
    axes = "N,C,L" if isinstance(x, Tensor) and x.ndim == 3 else "N,C,H,W"
    sizes = checks.tensor("x", x, axes)
    checks.tensor("weight", weight, "C", {"C": sizes["C"]})
    checks.tensor("bias", bias, "C", {"C": sizes["C"]})
    if shift is not None:
        checks.tensor("shift", shift, "C", {"C": sizes["C"]})
        checks.same_device(x=x, shift=shift)
    if statistics is not None:
        checks.tensor("statistics", statistics, "N,2,C,chunks", {key: sizes[key] for key in "NC"})
    if not (isinstance(groups, int) and groups > 0 and sizes["C"] % groups == 0):
        raise ValueError(f"groups must divide the {sizes['C']} channels of x; got {groups!r}")
    if not eps > 0:
        raise ValueError(f"eps must be a number > 0; got {eps!r}")
    checks.same_device(x=x, weight=weight, bias=bias)
    tensors = (x, weight, bias) if shift is None else (x, weight, bias, shift)
    compiling, learning = torch.compiler.is_compiling(), torch.is_grad_enabled()
    missing = learning and (any(t.requires_grad for t in tensors[1:]) or (compiling and x.requires_grad))
    if missing and backend == "triton":
        raise ValueError(
            "backend='triton' has a gradient of x alone, outside torch.compile: freeze the rest, or pass "
            "backend='torch'"
        )
    if backend == "auto" and (missing or not is_channels_last(x, 1)):
        backend = "torch"
    if not use_triton(backend, *tensors):
        return group_norm_reference(x, groups, weight, bias, eps, silu, shift)
    how = groups, weight, bias, float(eps), silu, shift
    if compiling:
        return _group_norm_op(x, *how)
    if learning and x.requires_grad:
        return _GroupNorm.apply(x, *how, statistics)
    return _launch(x, *how, statistics)[0]
