"""Kernels of group_norm for planes that are split over programs: three launches forward, three back.

Forward: each channel's mean and deviations over a chunk of pixels, merged over a group, applied. Backward, with g the
gradient ahead of the SiLU, times rstd * weight, two sums are merged and applied likewise:
g - mean(g) - (x - mean) * rstd^2 * mean(g * (x - mean)). A program has ROWS pixels of COLUMNS channels at a time, STEPS
times.
"""

from __future__ import annotations

from .dispatch import jit, tl


@jit
def _silu(y):
    return y / (1.0 + tl.exp(-y))


@jit
def _before_silu(grad, y, SILU: tl.constexpr):
    """The gradient ahead of the SiLU."""
    if SILU:
        share = 1.0 / (1.0 + tl.exp(-y))
        grad *= share * (1.0 + y * (1.0 - share))
    return grad


@jit
def _place(length, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr):
    """A program's picture and first pixel; the rows and channels of a tile, and where the first tile is in memory."""
    n = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * ROWS * STEPS
    r, c = tl.arange(0, ROWS)[:, None], tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return n, first, r, c, (n * length + first) * channels + r * channels + c


@jit
def _coefficients(coefficient_ptr, bias_ptr, n, channels, c):
    """Mean, rstd * weight and bias of the channels c."""
    there = c < channels
    mean = tl.load(coefficient_ptr + 3 * n * channels + c, mask=there, other=0.0)
    scale = tl.load(coefficient_ptr + (3 * n + 1) * channels + c, mask=there, other=0.0)
    return mean, scale, tl.load(bias_ptr + c, mask=there, other=0.0).to(tl.float32)


@jit
def _keep(partial_ptr, n, channels, chunks, c, first, second):
    """Two numbers of each of the channels c, [1,COLUMNS], into this chunk's place in [N,2,C,chunks]."""
    there = c < channels
    target = partial_ptr + (2 * n * channels + c) * chunks + tl.program_id(0)
    tl.store(target, first, mask=there)
    target = partial_ptr + ((2 * n + 1) * channels + c) * chunks + tl.program_id(0)
    tl.store(target, second, mask=there)


# ---- forward


@jit
def _features(x_ptr, other_ptr, shift, out_ptr, offset, mask, SUM: tl.constexpr):
    """x; or x + other + shift, stored, and then as those who read it see it."""
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if SUM:
        x += tl.load(other_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, x + shift, 0.0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offset, x, mask=mask)
        x = x.to(tl.float32)
    return x


@jit
def _group_norm_partial_kernel(
    x_ptr,
    other_ptr,
    shift_ptr,
    out_ptr,
    partial_ptr,
    length,
    channels,
    chunks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    SUM: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """Mean and sum of squared deviations of each channel over a chunk of pixels, [N,2,C,chunks]: of x, or of a sum.

    Sums are about the mean of the chunk's first tile, a STEPS-th of it, so at most log2(STEPS) bits cancel.
    """
    n, first, r, c, offset = _place(length, channels, ROWS, COLUMNS, STEPS)
    there = c < channels
    count = tl.minimum(length - first, ROWS * STEPS)
    shift = tl.zeros((1, COLUMNS), tl.float32)
    if SHIFTED:
        shift += tl.load(shift_ptr + c, mask=there, other=0.0).to(tl.float32)
    x = _features(x_ptr, other_ptr, shift, out_ptr, offset, (r < count) & there, SUM)
    centre = tl.div_rn(tl.sum(x, 0, keep_dims=True), tl.minimum(count, ROWS).to(tl.float32))
    total = tl.where(r < count, x - centre, 0.0)
    squares = total * total
    for step in range(1, STEPS):
        inside = r + step * ROWS < count
        here = offset + step * ROWS * channels
        d = tl.where(inside, _features(x_ptr, other_ptr, shift, out_ptr, here, inside & there, SUM) - centre, 0.0)
        total += d
        squares += d * d
    sums = tl.sum(total, 0, keep_dims=True)
    away = tl.div_rn(sums, count.to(tl.float32))
    squares = tl.sum(squares, 0, keep_dims=True) - sums * away
    _keep(partial_ptr, n, channels, chunks, c, centre + away, squares)


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
    """Chunks and channels of a group, merged in a fixed order: mean, rstd * weight and rstd of each channel, [N,3,C].

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
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(total, 0), size) + eps))
    c = tl.arange(0, COLUMNS)
    there = c < per_group
    weight = tl.load(weight_ptr + g * per_group + c, mask=there, other=0.0).to(tl.float32)
    target = coefficient_ptr + 3 * n * channels + g * per_group + c
    mean = tl.zeros((COLUMNS,), tl.float32) + centre
    if SHIFTED:
        mean -= tl.load(shifts + c, mask=there, other=0.0).to(tl.float32)
    tl.store(target, mean, mask=there)
    tl.store(target + channels, rstd * weight, mask=there)
    tl.store(target + 2 * channels, tl.zeros((COLUMNS,), tl.float32) + rstd, mask=there)


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
    """(x - mean) * scale + bias, SiLU."""
    n, first, r, c, offset = _place(length, channels, ROWS, COLUMNS, STEPS)
    mean, scale, bias = _coefficients(coefficient_ptr, bias_ptr, n, channels, c)
    for step in tl.static_range(0, STEPS):
        inside = (r + step * ROWS < length - first) & (c < channels)
        here = offset + step * ROWS * channels
        y = (tl.load(x_ptr + here, mask=inside, other=0.0).to(tl.float32) - mean) * scale + bias
        tl.store(out_ptr + here, (_silu(y) if SILU else y).to(out_ptr.dtype.element_ty), mask=inside)


# ---- backward


@jit
def _gradient(grad_ptr, x_ptr, offset, mask, mean, scale, bias, SILU: tl.constexpr):
    """The gradient ahead of the SiLU, and x - mean."""
    grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32) - mean
    return _before_silu(grad, d * scale + bias, SILU), d


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
    """Of each channel over a chunk of pixels, [N,2,C,chunks]: sums of the gradient, and of it times x - mean."""
    n, first, r, c, offset = _place(length, channels, ROWS, COLUMNS, STEPS)
    there = c < channels
    mean, scale, bias = _coefficients(coefficient_ptr, bias_ptr, n, channels, c)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(0, STEPS):
        inside = (r + step * ROWS < length - first) & there
        here = offset + step * ROWS * channels
        grad, d = _gradient(grad_ptr, x_ptr, here, inside, mean, scale, bias, SILU)
        sums += grad
        products += grad * d
    sums, products = tl.sum(sums, 0, keep_dims=True), tl.sum(products, 0, keep_dims=True)
    _keep(partial_ptr, n, channels, chunks, c, sums, products)


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
    """g less the group's two sums."""
    n, first, r, c, offset = _place(length, channels, ROWS, COLUMNS, STEPS)
    there = c < channels
    mean, scale, bias = _coefficients(coefficient_ptr, bias_ptr, n, channels, c)
    level = tl.load(sums_ptr + 2 * n * channels + c, mask=there, other=0.0)
    slope = tl.load(sums_ptr + (2 * n + 1) * channels + c, mask=there, other=0.0)
    for step in tl.static_range(0, STEPS):
        inside = (r + step * ROWS < length - first) & there
        here = offset + step * ROWS * channels
        grad, d = _gradient(grad_ptr, x_ptr, here, inside, mean, scale, bias, SILU)
        tl.store(out_ptr + here, (grad * scale - level - d * slope).to(out_ptr.dtype.element_ty), mask=inside)
