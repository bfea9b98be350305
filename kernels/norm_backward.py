"""The gradient of group_norm's features, of planes that are split over programs: x and the gradient are read twice.

With g the gradient ahead of the SiLU, times rstd * weight: g - mean(g) - (x - mean) * rstd^2 * mean(g * (x - mean)).
"""

from __future__ import annotations

from .dispatch import jit, tl


@jit
def _before_silu(grad, y, SILU: tl.constexpr):
    """The gradient ahead of the SiLU."""
    if SILU:
        share = 1.0 / (1.0 + tl.exp(-y))
        grad *= share * (1.0 + y * (1.0 - share))
    return grad


@jit
def _group_norm_partial_bwd_kernel(
    grad_ptr,
    x_ptr,
    coefficient_ptr,
    bias_ptr,
    partial_ptr,
    length,
    channels,
    chunks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    SILU: tl.constexpr,
):
    """Of each channel over a chunk of pixels: sums of the gradient g ahead of the SiLU, and of g * (x - mean)."""
    chunk, n = tl.program_id(0), tl.program_id(2).to(tl.int64)
    r, c = tl.arange(0, ROWS)[:, None], tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = c < channels
    first = chunk * ROWS * STEPS
    mean = tl.load(coefficient_ptr + 3 * n * channels + c, mask=there, other=0.0)[None, :]
    scale = tl.load(coefficient_ptr + (3 * n + 1) * channels + c, mask=there, other=0.0)[None, :]
    bias = tl.load(bias_ptr + c, mask=there, other=0.0).to(tl.float32)[None, :]
    offset = (n * length + first) * channels + r * channels + c[None, :]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(0, STEPS):
        inside = (r + step * ROWS < length - first) & there[None, :]
        grad = tl.load(grad_ptr + offset + step * ROWS * channels, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(x_ptr + offset + step * ROWS * channels, mask=inside, other=0.0).to(tl.float32) - mean
        grad = _before_silu(grad, d * scale + bias, SILU)
        sums += grad
        products += grad * d
    tl.store(partial_ptr + (2 * n * channels + c) * chunks + chunk, tl.sum(sums, 0), mask=there)
    tl.store(partial_ptr + ((2 * n + 1) * channels + c) * chunks + chunk, tl.sum(products, 0), mask=there)


@jit
def _group_norm_reduce_bwd_kernel(
    partial_ptr,
    coefficient_ptr,
    sums_ptr,
    length,
    channels,
    per_group,
    chunks,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Both sums over a group, weighted, in a fixed order: what is taken off every g, and off it for each x - mean."""
    g, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = partial_ptr + (2 * n * channels + g * per_group) * chunks
    second = partial_ptr + ((2 * n + 1) * channels + g * per_group) * chunks
    scales = coefficient_ptr + (3 * n + 1) * channels + g * per_group
    lane = tl.arange(0, BLOCK)
    sums, products = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, per_group * chunks, BLOCK):
        i = start + lane
        inside = i < per_group * chunks
        scale = tl.load(scales + i // chunks, mask=inside, other=0.0)
        sums += scale * tl.load(first + i, mask=inside, other=0.0)
        products += scale * tl.load(second + i, mask=inside, other=0.0)
    size = 1.0 * length * per_group
    c = tl.arange(0, COLUMNS)
    there = c < per_group
    rstd = tl.load(scales + channels + c, mask=there, other=0.0)
    target = sums_ptr + 2 * n * channels + g * per_group + c
    tl.store(target, tl.zeros((COLUMNS,), tl.float32) + tl.div_rn(tl.sum(sums, 0), size), mask=there)
    tl.store(target + channels, tl.div_rn(tl.sum(products, 0), size) * rstd * rstd, mask=there)


@jit
def _group_norm_apply_bwd_kernel(
    grad_ptr,
    x_ptr,
    coefficient_ptr,
    bias_ptr,
    sums_ptr,
    out_ptr,
    length,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    SILU: tl.constexpr,
):
    """A chunk of pixels a program: scale * g less the group's two sums."""
    n = tl.program_id(2).to(tl.int64)
    r, c = tl.arange(0, ROWS)[:, None], tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    there = c < channels
    first = tl.program_id(0) * ROWS * STEPS
    mean = tl.load(coefficient_ptr + 3 * n * channels + c, mask=there, other=0.0)
    scale = tl.load(coefficient_ptr + (3 * n + 1) * channels + c, mask=there, other=0.0)
    bias = tl.load(bias_ptr + c, mask=there, other=0.0).to(tl.float32)
    level = tl.load(sums_ptr + 2 * n * channels + c, mask=there, other=0.0)
    slope = tl.load(sums_ptr + (2 * n + 1) * channels + c, mask=there, other=0.0)
    offset = (n * length + first) * channels + r * channels + c
    for step in tl.static_range(0, STEPS):
        inside = (r + step * ROWS < length - first) & there
        grad = tl.load(grad_ptr + offset + step * ROWS * channels, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(x_ptr + offset + step * ROWS * channels, mask=inside, other=0.0).to(tl.float32) - mean
        y = _before_silu(grad, d * scale + bias, SILU) * scale - level - d * slope
        tl.store(out_ptr + offset + step * ROWS * channels, y.to(out_ptr.dtype.element_ty), mask=inside)
