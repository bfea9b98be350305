"""Errors and detail of a group of samples against their target, by smooth and textured area, in one pass.

Luma is BT.601 as in the PSNR-Y of super-resolution papers: Y = (65.481 R + 128.553 G + 24.966 B + 16) / 255 for RGB in
[0,1]. Detail is the mean magnitude of the luma's forward differences (0 beyond the last row and column).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .dispatch import jit, tl, use_triton
from .launch import options

# For RGB in [-1,1], x = 2 rgb - 1: half of each coefficient; the constant falls out of every difference.
LUMA = (65.481 / 510, 128.553 / 510, 24.966 / 510)
MSE_FLOOR = 1e-10  # 100 dB: a perfect copy must not be infinitely good
DETAIL_FLOOR = 1e-4  # a fortieth of an 8-bit step: below it detail is noise


class AttributeStatistics(NamedTuple):
    """Per sample, [B,G] fp32 (fp64 for fp64 samples). Where a picture has no smooth (or no textured) pixel, the fields
    of that kind hold the whole picture's value, so that scores made of them stay comparable."""

    mse: Tensor
    """Mean squared luma error over all pixels, luma in [0,1]."""
    mse_smooth: Tensor
    """The same over smooth pixels (mask False)."""
    mse_texture: Tensor
    """The same over textured pixels (mask True)."""
    detail_smooth: Tensor
    """Mean gradient magnitude of the sample's luma over smooth pixels."""
    detail_texture: Tensor
    """The same over textured pixels."""
    target_detail_smooth: Tensor
    """The target's, over smooth pixels; equal for all samples of a group."""
    target_detail_texture: Tensor
    """The target's, over textured pixels."""

    @property
    def psnr_y(self) -> Tensor:
        """PSNR of the luma over the whole picture in dB, [B,G]; 100 at most."""
        return _psnr(self.mse)

    @property
    def fidelity(self) -> Tensor:
        """PSNR of the luma where the picture is smooth (the whole picture where nothing is), dB, [B,G]."""
        return _psnr(self.mse_smooth)

    @property
    def detail(self) -> Tensor:
        """Closeness of the detail to the target's where the picture is textured (everywhere where nothing is), [B,G].

        -|log(detail / target detail)|: 0 is best, and half or twice the target's detail are equally bad.
        """
        return -((self.detail_texture + DETAIL_FLOOR) / (self.target_detail_texture + DETAIL_FLOOR)).log().abs()


def _psnr(mse: Tensor) -> Tensor:
    return -10 * mse.clamp_min(MSE_FLOOR).log10()


def _luma(rgb: Tensor) -> Tensor:
    """[...,3,H,W] in [-1,1] -> [...,H,W], without the constant."""
    r, g, b = rgb.unbind(-3)
    return LUMA[0] * r + LUMA[1] * g + LUMA[2] * b


def _detail(luma: Tensor) -> Tensor:
    """[...,H,W] -> [...,H,W]: the magnitude of the forward differences."""
    dx, dy = torch.zeros_like(luma), torch.zeros_like(luma)
    dx[..., :, :-1] = luma[..., :, 1:] - luma[..., :, :-1]
    dy[..., :-1, :] = luma[..., 1:, :] - luma[..., :-1, :]
    return (dx.square() + dy.square()).sqrt()


def attribute_statistics_reference(samples: Tensor, target: Tensor, mask: Tensor) -> AttributeStatistics:
    """The definition, in fp64 for fp64 samples and in fp32 otherwise. Arguments as in `attribute_statistics`."""
    dtype = torch.promote_types(torch.promote_types(samples.dtype, target.dtype), torch.float32)
    sample_luma, target_luma = _luma(samples.to(dtype)), _luma(target.to(dtype))[:, None]
    textured = mask[:, None].to(dtype)

    def means(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B,G,H,W] -> means over all, smooth, textured pixels."""
        n, n_texture = textured[0].numel(), textured.sum((2, 3))
        in_texture, in_smooth = (values * textured).sum((2, 3)), (values * (1 - textured)).sum((2, 3))
        whole = (in_texture + in_smooth) / n
        texture = torch.where(n_texture > 0, in_texture / n_texture.clamp_min(1), whole)
        smooth = torch.where(n_texture < n, in_smooth / (n - n_texture).clamp_min(1), whole)
        return whole, smooth, texture

    mse, mse_smooth, mse_texture = means((sample_luma - target_luma).square())
    _, detail_smooth, detail_texture = means(_detail(sample_luma))
    _, target_smooth, target_texture = (m.expand_as(mse) for m in means(_detail(target_luma)))
    return AttributeStatistics(
        mse, mse_smooth, mse_texture, detail_smooth, detail_texture, target_smooth, target_texture
    )


@jit
def _luma_at(ptr, offset, stride_c, inside, R: tl.constexpr, G: tl.constexpr, B: tl.constexpr):
    r = tl.load(ptr + offset, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(ptr + offset + stride_c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(ptr + offset + 2 * stride_c, mask=inside, other=0.0).to(tl.float32)
    return R * r + G * g + B * b


@jit
def _right_neighbours(luma, following, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Each column's right neighbour, given `following`, the column right of every four. Stays in registers."""
    even, odd = tl.split(tl.reshape(luma, (ROWS, COLUMNS // 4, 2, 2)))
    _, second = tl.split(even)
    first, third = tl.split(odd)
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, following)), (ROWS, COLUMNS))


@jit
def _luma_and_detail(
    ptr,
    y,
    left,
    stride_c,
    stride_h,
    stride_w,
    height,
    width,
    R: tl.constexpr,
    G: tl.constexpr,
    B: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Luma of a tile and the magnitude of its forward differences. The row below comes from the cache."""
    x = left + tl.arange(0, COLUMNS)[None, :]
    offset = y * stride_h + x * stride_w
    inside = (y < height) & (x < width)
    luma = _luma_at(ptr, offset, stride_c, inside, R, G, B)
    next_x = left + 4 * tl.arange(0, COLUMNS // 4)[None, :] + 4
    following = _luma_at(ptr, y * stride_h + next_x * stride_w, stride_c, (y < height) & (next_x < width), R, G, B)
    dx = _right_neighbours(luma, following, ROWS, COLUMNS) - luma
    has_below = (y + 1 < height) & (x < width)
    dy = _luma_at(ptr, offset + stride_h, stride_c, has_below, R, G, B) - luma
    dx, dy = tl.where(x + 1 < width, dx, 0.0), tl.where(has_below, dy, 0.0)
    return luma, tl.sqrt(dx * dx + dy * dy)


@jit
def _sum_four(a, b, c, d, PIXELS: tl.constexpr):
    """Sums of four tiles, [4], in one reduction."""
    return tl.sum(tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (PIXELS, 4)), 0)


@jit
def _attribute_statistics_fwd_kernel(
    samples_ptr,
    target_ptr,
    mask_ptr,
    partial_ptr,
    group,
    height,
    width,
    tiles_x,
    sample_b,
    sample_g,
    sample_c,
    sample_h,
    sample_w,
    target_b,
    target_c,
    target_h,
    target_w,
    mask_b,
    mask_h,
    mask_w,
    R: tl.constexpr,
    G: tl.constexpr,
    B: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile a program: the target's luma stays in registers while the group's samples pass by, each read once."""
    tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles = tl.num_programs(0)
    y = (tile // tiles_x * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)  # offsets of rows pass 2^31
    left = tile % tiles_x * COLUMNS
    x = left + tl.arange(0, COLUMNS)[None, :]
    inside = (y < height) & (x < width)

    textured = tl.load(mask_ptr + b * mask_b + y * mask_h + x * mask_w, mask=inside, other=0).to(tl.float32)
    smooth = inside.to(tl.float32) - textured
    target, detail = _luma_and_detail(
        target_ptr + b * target_b, y, left, target_c, target_h, target_w, height, width, R, G, B, ROWS, COLUMNS
    )
    PIXELS: tl.constexpr = ROWS * COLUMNS
    partial = partial_ptr + b * (group + 1) * 4 * tiles + tl.arange(0, 4) * tiles + tile
    tl.store(partial, _sum_four(smooth, textured, detail * smooth, detail * textured, PIXELS))
    source = samples_ptr + b * sample_b
    for _ in range(0, group):
        luma, detail = _luma_and_detail(
            source, y, left, sample_c, sample_h, sample_w, height, width, R, G, B, ROWS, COLUMNS
        )
        error = (luma - target) * (luma - target)
        partial += 4 * tiles
        tl.store(partial, _sum_four(error * smooth, error * textured, detail * smooth, detail * textured, PIXELS))
        source += sample_g


@jit
def _attribute_statistics_reduce_kernel(partial_ptr, out_ptr, group, tiles, BLOCK: tl.constexpr):
    """One sample a program, in a fixed order: sums of tiles -> the seven fields, [7,B,G]."""
    g, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    field, i = tl.arange(0, 4)[:, None], tl.arange(0, BLOCK)[None, :]
    common = tl.zeros((4, BLOCK), tl.float32)
    own = tl.zeros((4, BLOCK), tl.float32)
    shared_ptr = partial_ptr + b * (group + 1) * 4 * tiles
    own_ptr = shared_ptr + (g + 1) * 4 * tiles
    for start in range(0, tiles, BLOCK):
        there = start + i < tiles
        common += tl.load(shared_ptr + field * tiles + start + i, mask=there, other=0.0)
        own += tl.load(own_ptr + field * tiles + start + i, mask=there, other=0.0)
    # Rows: smooth pixels, textured pixels, target detail there; and of the sample: errors there, detail there.
    common_sums, own_sums = tl.sum(common, 1), tl.sum(own, 1)
    k = tl.arange(0, 4)
    n_smooth = tl.sum(tl.where(k == 0, common_sums, 0.0))
    n_texture = tl.sum(tl.where(k == 1, common_sums, 0.0))
    out = out_ptr + b * group + g
    field_stride = tl.num_programs(1).to(tl.int64) * group
    _store_means(out, field_stride, own_sums, 0, n_smooth, n_texture, True)
    _store_means(out + 3 * field_stride, field_stride, own_sums, 2, n_smooth, n_texture, False)
    _store_means(out + 5 * field_stride, field_stride, common_sums, 2, n_smooth, n_texture, False)


@jit
def _store_means(out, field_stride, sums, FIRST: tl.constexpr, n_smooth, n_texture, WHOLE: tl.constexpr):
    """sums[FIRST], sums[FIRST + 1] over smooth and textured pixels -> their means, after the whole picture's (WHOLE).

    A kind without a pixel takes the whole picture's mean.
    """
    k = tl.arange(0, 4)
    in_smooth = tl.sum(tl.where(k == FIRST, sums, 0.0))
    in_texture = tl.sum(tl.where(k == FIRST + 1, sums, 0.0))
    whole = tl.div_rn(in_smooth + in_texture, n_smooth + n_texture)
    smooth = tl.where(n_smooth > 0, tl.div_rn(in_smooth, tl.maximum(n_smooth, 1.0)), whole)
    texture = tl.where(n_texture > 0, tl.div_rn(in_texture, tl.maximum(n_texture, 1.0)), whole)
    if WHOLE:
        tl.store(out, whole)
        out += field_stride
    tl.store(out, smooth)
    tl.store(out + field_stride, texture)


COLUMNS = 128


def _tile(images: int, height: int, width: int) -> tuple[int, int]:
    """(rows, warps), 8 pixels a thread. High tiles share more rows; low ones keep a GPU busy with few pictures."""
    return (8, 4) if images * height * width >= 8 * COLUMNS * 1024 else (4, 2)


def _launch(samples: Tensor, target: Tensor, mask: Tensor) -> AttributeStatistics:
    b, g, _, h, w = samples.shape
    rows, warps = _tile(b, h, w)
    tiles_x = -(-w // COLUMNS)
    tiles = -(-h // rows) * tiles_x
    partial = samples.new_empty(b, g + 1, 4, tiles, dtype=torch.float32)
    out = samples.new_empty(len(AttributeStatistics._fields), b, g, dtype=torch.float32)
    with torch.cuda.device_of(samples):
        _attribute_statistics_fwd_kernel[(tiles, b)](
            samples, target, mask.view(torch.uint8), partial, g, h, w, tiles_x,
            *samples.stride(), *target.stride(), *mask.stride(), *LUMA, ROWS=rows, COLUMNS=COLUMNS,
            **options(warps, registers=128),
        )  # fmt: skip
        _attribute_statistics_reduce_kernel[(g, b)](partial, out, g, tiles, BLOCK=256, **options(4))
    return AttributeStatistics(*out.unbind())


@torch.no_grad()
def attribute_statistics(
    samples: Tensor, target: Tensor, mask: Tensor, *, backend: str = "auto"
) -> AttributeStatistics:
    """Luma errors and detail of every sample, over all, smooth and textured pixels. No gradient flows.

    Args:
        samples: [B,G,3,H,W] RGB in [-1,1]; any strides, contiguous or channels-last are fastest.
        target: [B,3,H,W] RGB in [-1,1], the ground truth.
        mask: [B,H,W] bool, True where the target is textured (`attribute_ratios`).
        backend: "auto", "torch" (the definition) or "triton" (samples and target are read once).

    Returns:
        AttributeStatistics of [B,G]; `.psnr_y`, `.fidelity` and `.detail` are the scores made of it.

    Raises:
        TypeError, ValueError: a wrong type, rank, size or device, values far outside [-1,1], NaN (see `checks`).
        RuntimeError: backend="triton" where it cannot run.
    """
    sizes = checks.tensor("samples", samples, "B,G,3,H,W")
    checks.tensor("target", target, "B,3,H,W", sizes)
    checks.mask("mask", mask, "B,H,W", sizes)
    checks.same_device(samples=samples, target=target, mask=mask)
    checks.between("samples", samples, -1.0, 1.0, "clamp, or convert with 2 * rgb - 1")
    checks.between("target", target, -1.0, 1.0, "clamp, or convert with 2 * rgb - 1")
    if use_triton(backend, samples, target, mask):
        return _launch(samples, target, mask)
    return attribute_statistics_reference(samples, target, mask)
