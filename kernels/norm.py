"""Group normalisation with SiLU behind it, forward only, for channels-last features: read twice, written once.

Paper: Wu and He, "Group Normalization" (arXiv 1803.08494), equations 1 to 3 and 7. Statistics are in fp32 and do not
cancel: whatever the mean, they are sums about a point near it, merged pairwise (Chan et al. 1983).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .dispatch import jit, tl, use_triton
from .launch import is_channels_last, options, power_of_two


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
def _silu(y):
    return y / (1.0 + tl.exp(-y))


@jit
def _group_norm_small_kernel(
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
):
    """A group of a picture a program, all of it in registers: the variance is taken about the mean itself.

    The model's sizes are constants, so that loads are as wide as the start of a group allows.
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
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(d * d), size) + eps))
    weight = tl.load(weight_ptr + g * PER_GROUP + c, mask=there, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + g * PER_GROUP + c, mask=there, other=0.0).to(tl.float32)
    y = d * (scale * weight) + bias
    tl.store(out_ptr + base + offset, (_silu(y) if SILU else y).to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _group_norm_partial_kernel(
    x_ptr,
    partial_ptr,
    length,
    channels,
    chunks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Mean and sum of squared deviations of each channel over a chunk of pixels: [N,2,C,chunks].

    Sums are about the mean of the chunk's first tile, a STEPS-th of it, so at most log2(STEPS) bits cancel.
    """
    chunk, n = tl.program_id(0), tl.program_id(2).to(tl.int64)
    r, c = tl.arange(0, ROWS)[:, None], tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = c < channels
    first = chunk * ROWS * STEPS
    count = tl.minimum(length - first, ROWS * STEPS)
    source = x_ptr + (n * length + first) * channels + r * channels + c[None, :]
    x = tl.load(source, mask=(r < count) & there[None, :], other=0.0).to(tl.float32)
    centre = tl.div_rn(tl.sum(x, 0), tl.minimum(count, ROWS).to(tl.float32))
    total = tl.where(r < count, x - centre[None, :], 0.0)
    squares = total * total
    for step in range(1, STEPS):
        inside = r + step * ROWS < count
        x = tl.load(source + step * ROWS * channels, mask=inside & there[None, :], other=0.0).to(tl.float32)
        d = tl.where(inside, x - centre[None, :], 0.0)
        total += d
        squares += d * d
    sums = tl.sum(total, 0)
    away = tl.div_rn(sums, count.to(tl.float32))
    means = partial_ptr + (2 * n * channels + c) * chunks + chunk
    deviations = partial_ptr + ((2 * n + 1) * channels + c) * chunks + chunk
    tl.store(means, centre + away, mask=there)
    tl.store(deviations, tl.sum(squares, 0) - sums * away, mask=there)


@jit
def _group_norm_reduce_kernel(
    partial_ptr,
    weight_ptr,
    shift_ptr,
    coefficient_ptr,
    length,
    channels,
    per_group,
    chunks,
    rows,
    eps,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """Chunks and channels of a group, merged in a fixed order: the mean and rstd * weight of each channel, [N,2,C].

    A shift moves the channels' means, and nothing else; of what is read again it is not a part yet.
    """
    g, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    means = partial_ptr + (2 * n * channels + g * per_group) * chunks
    deviations = partial_ptr + ((2 * n + 1) * channels + g * per_group) * chunks
    shifts = shift_ptr + g * per_group
    entries = per_group * chunks
    lane = tl.arange(0, BLOCK)
    size = 1.0 * length * per_group
    centre = tl.load(means)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, entries, BLOCK):
        i = start + lane
        count = tl.minimum(length - i % chunks * rows, rows).to(tl.float32)
        mean = tl.load(means + i, mask=i < entries, other=0.0)
        if SHIFTED:
            mean += tl.load(shifts + i // chunks, mask=i < entries, other=0.0).to(tl.float32)
        total += tl.where(i < entries, (mean - centre) * count, 0.0)
    centre += tl.div_rn(tl.sum(total, 0), size)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, entries, BLOCK):
        i = start + lane
        count = tl.minimum(length - i % chunks * rows, rows).to(tl.float32)
        d = tl.load(means + i, mask=i < entries, other=0.0) - centre
        if SHIFTED:
            d += tl.load(shifts + i // chunks, mask=i < entries, other=0.0).to(tl.float32)
        own = tl.load(deviations + i, mask=i < entries, other=0.0)
        total += tl.where(i < entries, own + count * d * d, 0.0)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(total, 0), size) + eps))
    c = tl.arange(0, COLUMNS)
    there = c < per_group
    weight = tl.load(weight_ptr + g * per_group + c, mask=there, other=0.0).to(tl.float32)
    target = coefficient_ptr + 2 * n * channels + g * per_group + c
    mean = tl.zeros((COLUMNS,), tl.float32) + centre
    if SHIFTED:
        mean -= tl.load(shifts + c, mask=there, other=0.0).to(tl.float32)
    tl.store(target, mean, mask=there)
    tl.store(target + channels, scale * weight, mask=there)


@jit
def _group_norm_apply_kernel(
    x_ptr,
    coefficient_ptr,
    bias_ptr,
    out_ptr,
    length,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    SILU: tl.constexpr,
):
    """A chunk of pixels a program: (x - mean) * scale + bias, SiLU."""
    n = tl.program_id(2).to(tl.int64)
    r, c = tl.arange(0, ROWS)[:, None], tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    there = c < channels
    first = tl.program_id(0) * ROWS * STEPS
    mean = tl.load(coefficient_ptr + 2 * n * channels + c, mask=there, other=0.0)
    scale = tl.load(coefficient_ptr + (2 * n + 1) * channels + c, mask=there, other=0.0)
    bias = tl.load(bias_ptr + c, mask=there, other=0.0).to(tl.float32)
    offset = (n * length + first) * channels + r * channels + c
    for step in tl.static_range(0, STEPS):
        inside = (r + step * ROWS < length - first) & there
        x = tl.load(x_ptr + offset + step * ROWS * channels, mask=inside, other=0.0).to(tl.float32)
        y = (x - mean) * scale + bias
        y = (_silu(y) if SILU else y).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offset + step * ROWS * channels, y, mask=inside)


TILE = 4096  # elements a tile, with 8 warps
SMALL = 16384  # elements of a group, rounded up, that one program keeps in registers
BUSY = 1024  # programs that keep a GPU busy


def _tiling(images: int, length: int, channels: int) -> tuple[int, int, int]:
    """(rows, columns, steps) of a program. Columns divide the channels where they can: then no load is masked."""
    columns = min(max(channels & -channels, 32), 128)
    rows = TILE // columns
    tiles = images * -(-length // rows) * -(-channels // columns)
    steps = next(s for s in (8, 4, 2, 1) if s == 1 or tiles >= s * BUSY)
    return rows, columns, steps


def _launch(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, shift: Tensor | None = None
) -> Tensor:
    """x [N,C,...] -> the same shape, channels-last."""
    rows_last = x.movedim(1, -1).contiguous()
    images, channels = x.shape[:2]
    length, per_group = math.prod(x.shape[2:]), channels // groups
    out = torch.empty_like(rows_last)
    weight, bias = weight.contiguous(), bias.contiguous()
    shifted, shift = shift is not None, bias if shift is None else shift.contiguous()
    height, width = power_of_two(length), power_of_two(per_group)
    with torch.cuda.device_of(x):
        if height * width <= SMALL:
            warps = min(max(height * width // 1024, 1), 16)
            _group_norm_small_kernel[(groups, images)](
                rows_last, weight, bias, shift, out, length, eps, CHANNELS=channels, PER_GROUP=per_group,
                ROWS=height, COLUMNS=width, SILU=silu, SHIFTED=shifted, **options(warps, registers=128),
            )  # fmt: skip
            return out.movedim(-1, 1)
        rows, columns, steps = _tiling(images, length, channels)
        chunks = -(-length // (rows * steps))
        partial = x.new_empty(images, 2, channels, chunks, dtype=torch.float32)
        coefficient = x.new_empty(images, 2, channels, dtype=torch.float32)
        grid = (chunks, -(-channels // columns), images)
        _group_norm_partial_kernel[grid](
            rows_last, partial, length, channels, chunks, ROWS=rows, COLUMNS=columns, STEPS=steps, **options(8)
        )
        _group_norm_reduce_kernel[(groups, images)](
            partial, weight, shift, coefficient, length, channels, per_group, chunks, rows * steps, eps,
            COLUMNS=width, BLOCK=1024, SHIFTED=shifted, **options(8),
        )  # fmt: skip
        _group_norm_apply_kernel[grid](
            rows_last, coefficient, bias, out, length, channels,
            ROWS=rows, COLUMNS=columns, STEPS=steps, SILU=silu, **options(8),
        )  # fmt: skip
    return out.movedim(-1, 1)


# An operator that torch.compile does not look into.
@torch.library.custom_op("gdpo::group_norm", mutates_args=())
def _group_norm_op(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, shift: Tensor | None = None
) -> Tensor:
    return _launch(x, groups, weight, bias, eps, silu, shift)


@_group_norm_op.register_fake
def _(x, groups, weight, bias, eps, silu, shift=None):
    return torch.empty_like(x.movedim(1, -1).contiguous()).movedim(-1, 1)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    silu: bool = False,
    shift: Tensor | None = None,
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
        backend: "auto" (Triton for channels-last features on a GPU that need no gradient), "torch" (the definition) or
            "triton" (forward only; other layouts are copied first).

    Returns:
        Like x; from Triton channels-last.

    Raises:
        TypeError, ValueError: a wrong type, rank, size or device, groups that do not divide C, a gradient
            asked of backend="triton".
        RuntimeError: backend="triton" where it cannot run.
    """
    axes = "N,C,L" if isinstance(x, Tensor) and x.ndim == 3 else "N,C,H,W"
    sizes = checks.tensor("x", x, axes)
    checks.tensor("weight", weight, "C", {"C": sizes["C"]})
    checks.tensor("bias", bias, "C", {"C": sizes["C"]})
    if shift is not None:
        checks.tensor("shift", shift, "C", {"C": sizes["C"]})
        checks.same_device(x=x, shift=shift)
    if not (isinstance(groups, int) and groups > 0 and sizes["C"] % groups == 0):
        raise ValueError(f"groups must divide the {sizes['C']} channels of x; got {groups!r}")
    if not eps > 0:
        raise ValueError(f"eps must be a number > 0; got {eps!r}")
    checks.same_device(x=x, weight=weight, bias=bias)
    tensors = (x, weight, bias) if shift is None else (x, weight, bias, shift)
    learning = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if learning and backend == "triton":
        raise ValueError("backend='triton' has no backward pass: use torch.no_grad(), or pass backend='torch'")
    if backend == "auto" and (learning or not is_channels_last(x, 1)):
        backend = "torch"
    if use_triton(backend, *tensors):
        run = _group_norm_op if torch.compiler.is_compiling() else _launch
        return run(x, groups, weight, bias, float(eps), silu, shift)
    return group_norm_reference(x, groups, weight, bias, eps, silu, shift)
