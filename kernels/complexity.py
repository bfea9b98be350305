"""The complexity map: which patches of a picture are textured (arXiv 2603.16769, the attribute-aware reward).

Per patch (10x10; the remainder rows and columns form smaller ones): bilinear resize to 64x64 (half-pixel centres, edges
replicated), Sobel 3x3 with replicated border, gradient magnitude, histogram of 512 bins over [-5.5, 5.5], entropy in
bits, times the patch's area. A patch is textured where that exceeds 50.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .dispatch import jit, tl, use_triton
from .launch import options, power_of_two

try:
    from . import _complexity_cpu  # type: ignore[attr-defined]  # complexity_cpu.cpp
except ImportError:  # not built: matrix products do the same, at a third of the speed
    _complexity_cpu = None

SIDE = 64  # of the resized patch
BINS = 256  # the upper half of the 512: a magnitude is not negative
BINS_PER_UNIT = 512 / 11


def _groups(height: int, width: int, patch: int) -> Iterator[tuple[slice, slice, int, int]]:
    """Regions of equally large patches: (rows, columns, patch height, patch width); at most four."""

    def axis(size: int) -> list[tuple[slice, int]]:
        whole = size - size % patch
        return [(slice(a, b), min(patch, b - a)) for a, b in ((0, whole), (whole, size)) if b > a]

    for rows, ph in axis(height):
        for columns, pw in axis(width):
            yield rows, columns, ph, pw


def _to_patches(region: Tensor, ph: int, pw: int) -> Tensor:
    """[B, m*ph, n*pw] -> [B*m*n, ph, pw]."""
    b, h, w = region.shape
    return region.reshape(b, h // ph, ph, w // pw, pw).transpose(2, 3).reshape(-1, ph, pw)


def _entropy(histogram: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, BINS] counts -> [n] bits. The empty lower half of the 512 bins adds nothing."""
    p = histogram.to(dtype)
    p = p / (p.sum(1, keepdim=True) + 1e-5)
    return -(p * (p + 1e-10).log2()).sum(1)


def _patch_entropy_reference(patches: Tensor) -> Tensor:
    """[n,ph,pw] -> [n]: the definition, step by step."""
    n = len(patches)
    resized = F.interpolate(patches[:, None], size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    padded = F.pad(resized, (1, 1, 1, 1), mode="replicate")[:, 0]
    # [-1,0,1] and [1,2,1] by shifts: a convolution would be in TF32 on a GPU, and this takes half its time on a CPU.
    derived = padded[:, :, 2:] - padded[:, :, :-2]
    smoothed = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    dx = derived[:, :-2] + 2 * derived[:, 1:-1] + derived[:, 2:]
    dy = smoothed[:, 2:] - smoothed[:, :-2]
    scaled = (dx.square() + dy.square()).sqrt().reshape(n, -1) * BINS_PER_UNIT
    inside = scaled < BINS  # beyond 5.5 nothing is counted; it takes a gray outside [0,1]
    bins = torch.where(inside, scaled, 0).floor().long()
    histogram = torch.zeros(n, BINS, dtype=torch.long, device=patches.device)
    return _entropy(histogram.scatter_add_(1, bins, inside.long()), patches.dtype)


@functools.lru_cache(maxsize=64)
def _sobel_of_resize(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bilinear resize of `size` samples to 64, then [1,2,1] or [-1,0,1], as two matrices [64,size].

    Resize and Sobel are both separable and linear, so the gradient of a resized patch P is S P D^T and D P S^T.
    """
    source = ((torch.arange(SIDE, dtype=torch.float64) + 0.5) * size / SIDE - 0.5).clamp(0, size - 1)
    resize = (1 - (source[:, None] - torch.arange(size, dtype=torch.float64)).abs()).clamp_min(0)
    before, after = torch.cat((resize[:1], resize[:-1])), torch.cat((resize[1:], resize[-1:]))
    return (before + 2 * resize + after).to(device, dtype), (after - before).to(device, dtype)


CHUNK = 64  # patches at a time: 1 MiB of gradients stays in the cache


def _patch_entropy_fast(patches: Tensor) -> Tensor:
    """[n,ph,pw] -> [n]: the same by small matrix products, for the CPU without a compiler."""
    ph, pw = patches.shape[1:]
    smooth_y, derive_y = _sobel_of_resize(ph, patches.dtype, patches.device)
    smooth_x, derive_x = _sobel_of_resize(pw, patches.dtype, patches.device)
    first_bin = torch.arange(CHUNK, dtype=torch.int32, device=patches.device)[:, None] * (BINS + 1)
    entropies = []
    for chunk in patches.split(CHUNK):
        n = len(chunk)
        dx = smooth_y @ (chunk @ derive_x.T)
        dy = derive_y @ (chunk @ smooth_x.T)
        magnitude = dx.square_().addcmul_(dy, dy).sqrt_().mul_(BINS_PER_UNIT).reshape(n, -1)
        bins = magnitude.clamp_max_(BINS).int().add_(first_bin[:n])  # bin 256 collects what is not counted
        histogram = torch.bincount(bins.view(-1), minlength=n * (BINS + 1)).view(n, BINS + 1)[:, :BINS]
        entropies.append(_entropy(histogram, patches.dtype))
    return torch.cat(entropies)


def _complexity(gray: Tensor, patch_size: int, patch_entropy) -> Tensor:
    """[B,H,W] -> [B,H,W]: entropy times area, the same for all pixels of a patch."""
    gray = gray.to(torch.promote_types(gray.dtype, torch.float32))
    b, h, w = gray.shape
    out = torch.empty_like(gray, memory_format=torch.contiguous_format)
    for rows, columns, ph, pw in _groups(h, w, patch_size):
        region = gray[:, rows, columns]
        m, n = region.shape[1] // ph, region.shape[2] // pw
        patches = _to_patches(region, ph, pw)
        values = patch_entropy(patches) * (ph * pw) + 0 * patches.sum((1, 2))  # NaN stays NaN
        out[:, rows, columns].view(b, m, ph, n, pw).copy_(values.view(b, m, 1, n, 1))
    return out


def _complexity_native(gray: Tensor, patch_size: int) -> Tensor:
    """The same in C++, for fp32 on the CPU."""
    gray = gray.detach().float().contiguous()
    return torch.from_numpy(_complexity_cpu.complexity_map(gray.numpy(), patch_size, torch.get_num_threads()))


def complexity_map_reference(gray: Tensor, patch_size: int) -> Tensor:
    """The definition, in fp64 for fp64 gray and in fp32 otherwise. Arguments as in `complexity_map`."""
    return _complexity(gray, patch_size, _patch_entropy_reference)


def _ratios(complexity: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """[B,H,W] -> smooth [B], texture [B], mask: shares of the area in whole hundredths (ties to even), sum 1."""
    mask = complexity > threshold
    percent = (mask.sum((1, 2)).double() * 100 / mask[0].numel()).round() + 0 * complexity.sum((1, 2))  # NaN stays NaN
    return ((100 - percent) / 100).to(complexity.dtype), (percent / 100).to(complexity.dtype), mask


def attribute_ratios_reference(gray: Tensor, patch_size: int, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in fp64 for fp64 gray and in fp32 otherwise. Arguments as in `attribute_ratios`."""
    return _ratios(complexity_map_reference(gray, patch_size), threshold)


@jit
def _bilinear(position, sample, size):
    """Weight of `sample` in the pixel at `position` of `size` samples resized to 64."""
    source = (position + 0.5) * size * 0.015625 - 0.5
    source = tl.minimum(tl.maximum(source, 0.0), size - 1.0)
    return tl.maximum(1 - tl.abs(source - sample), 0.0)


@jit
def _sobel_pair(position, sample, size):
    """The two factors of Sobel after the resize: [1,2,1] and [-1,0,1], borders replicated."""
    before = _bilinear(tl.maximum(position - 1, 0), sample, size)
    here = _bilinear(position, sample, size)
    after = _bilinear(tl.minimum(position + 1, 63), sample, size)
    return before + 2 * here + after, after - before


@jit
def _complexity_fwd_kernel(
    gray_ptr,
    map_ptr,
    mask_ptr,
    area_ptr,
    stride_b,
    stride_h,
    stride_w,
    height,
    width,
    patches_x,
    threshold,
    PATCH: tl.constexpr,
    K: tl.constexpr,
    BINS_PER_UNIT: tl.constexpr,
    RATIOS: tl.constexpr,
):
    """One patch a program. Writes the map, or (RATIOS) the mask and the patch's textured area, -1 for NaN."""
    index, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    y0, x0 = index // patches_x * PATCH, index % patches_x * PATCH
    ph, pw = tl.minimum(height - y0, PATCH), tl.minimum(width - x0, PATCH)

    column, pixel = tl.arange(0, K), tl.arange(0, 64)
    inside = (column[:, None] < ph) & (column[None, :] < pw)
    rows, columns = (y0 + column).to(tl.int64)[:, None], (x0 + column).to(tl.int64)[None, :]
    source = gray_ptr + b * stride_b + rows * stride_h + columns * stride_w

    # Resize and Sobel are separable and linear: the gradient of the resized patch P is S P D^T and D P S^T. In fp32:
    # TF32's 10 bits would move magnitudes into other bins.
    if K == 16:
        patch = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        smooth_x, derive_x = _sobel_pair(pixel[None, :], column[:, None], pw)
        smooth_y, derive_y = _sobel_pair(pixel[:, None], column[None, :], ph)
        dx = tl.dot(smooth_y, tl.dot(patch, derive_x, input_precision="ieee"), input_precision="ieee")
        dy = tl.dot(derive_y, tl.dot(patch, smooth_x, input_precision="ieee"), input_precision="ieee")
    else:  # larger products spill: row by row, nothing but one row in registers
        smooth_x, derive_x = _sobel_pair(pixel[:, None], column[None, :], pw)
        dx = tl.zeros((64, 64), tl.float32)
        dy = tl.zeros((64, 64), tl.float32)
        for k in range(PATCH):
            there = column < tl.where(ph > k, pw, 0)
            row_ptr = gray_ptr + b * stride_b + (y0 + k).to(tl.int64) * stride_h
            row = tl.load(row_ptr + (x0 + column).to(tl.int64) * stride_w, mask=there, other=0.0).to(tl.float32)
            smooth_y, derive_y = _sobel_pair(pixel, k, ph)
            dx += smooth_y[:, None] * tl.sum(derive_x * row[None, :], 1)[None, :]
            dy += derive_y[:, None] * tl.sum(smooth_x * row[None, :], 1)[None, :]
    poison = tl.sum(0 * dx)  # NaN stays NaN
    scaled = tl.reshape(tl.sqrt(dx * dx + dy * dy) * BINS_PER_UNIT, (4096,))
    counted = scaled < 256
    histogram = tl.histogram(tl.where(counted, scaled, 0.0).to(tl.int32), 256, mask=counted).to(tl.float32)

    p = histogram / (tl.sum(histogram) + 1e-5)
    area = ph * pw
    complexity = -tl.sum(p * tl.log2(p + 1e-10)) * area.to(tl.float32) + poison
    out = b * height * width + rows * width + columns
    if RATIOS:
        textured = complexity > threshold
        tl.store(mask_ptr + out, tl.where(inside, textured.to(tl.int8), 0), mask=inside)
        area = tl.where(complexity == complexity, tl.where(textured, area, 0), -1)
        tl.store(area_ptr + b * tl.num_programs(0) + index, area)
    else:
        tl.store(map_ptr + out, tl.where(inside, complexity, 0.0), mask=inside)


@jit
def _ratios_fwd_kernel(area_ptr, smooth_ptr, texture_ptr, patches, pixels, BLOCK: tl.constexpr):
    """One picture a program: the patches' areas -> shares in whole hundredths, ties to even."""
    b = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.int64)
    least = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, patches, BLOCK):
        i = start + tl.arange(0, BLOCK)
        area = tl.load(area_ptr + b * patches + i, mask=i < patches, other=0)
        total += area
        least = tl.minimum(least, area)
    # Step j leads from j-1 to j hundredths; a tie takes it only where j is even. Without a division, which spills.
    step = 1 + tl.arange(0, 128)
    doubled, edge = 200 * tl.sum(total), (2 * step.to(tl.int64) - 1) * pixels
    taken = (doubled > edge) | ((doubled == edge) & (step % 2 == 0))
    percent = tl.sum(taken.to(tl.int32)).to(tl.float32)
    poison = tl.where(tl.min(least) < 0, float("nan"), 0.0)
    tl.store(smooth_ptr + b, tl.div_rn(100 - percent, 100.0) + poison)
    tl.store(texture_ptr + b, tl.div_rn(percent, 100.0) + poison)


TRITON_PATCH_LIMIT = 64  # a larger patch's products do not fit a program


def _launch(gray: Tensor, patch_size: int, threshold: float | None) -> tuple[Tensor, ...]:
    """threshold None: (map,); else smooth, texture, mask."""
    b, h, w = gray.shape
    ratios = threshold is not None
    grid_y, grid_x = -(-h // patch_size), -(-w // patch_size)
    out = torch.empty(b, h, w, dtype=torch.bool if ratios else torch.float32, device=gray.device)
    raw = out.view(torch.int8) if ratios else out
    area = torch.empty(b, grid_y * grid_x, dtype=torch.int32, device=gray.device) if ratios else out
    with torch.cuda.device_of(gray):
        _complexity_fwd_kernel[(grid_y * grid_x, b)](
            gray, raw, raw, area, *gray.stride(), h, w, grid_x, threshold or 0.0,
            PATCH=patch_size, K=max(16, power_of_two(patch_size)), BINS_PER_UNIT=BINS_PER_UNIT,
            RATIOS=ratios, **options(8 if patch_size <= 16 else 16, registers=128),
        )  # fmt: skip
        if not ratios:
            return (out,)
        smooth, texture = torch.empty(2, b, dtype=torch.float32, device=gray.device).unbind()
        _ratios_fwd_kernel[(b,)](area, smooth, texture, grid_y * grid_x, h * w, BLOCK=1024, **options(4))
    return smooth, texture, out


def _plan(gray: Tensor, patch_size: int, backend: str) -> str:
    """Which implementation: "triton", "native" or "fast" (the CPU's), or "reference"."""
    checks.tensor("gray", gray, "B,H,W")
    if not isinstance(patch_size, int) or patch_size < 1:
        raise ValueError(f"patch_size must be an int >= 1; got {patch_size!r}")
    checks.between("gray", gray, 0.0, 1.0, "divide 8-bit values by 255")
    if backend == "triton" and patch_size > TRITON_PATCH_LIMIT:
        raise ValueError(f"patch_size must be at most {TRITON_PATCH_LIMIT} with backend='triton'; got {patch_size}")
    if use_triton(backend, gray) and patch_size <= TRITON_PATCH_LIMIT:
        return "triton"
    if backend == "torch" or gray.device.type != "cpu":
        return "reference"
    native = _complexity_cpu is not None and gray.dtype != torch.float64 and not torch.compiler.is_compiling()
    return "native" if native else "fast"


def _on_plan(plan: str, gray: Tensor, patch_size: int) -> Tensor:
    if plan == "native":
        return _complexity_native(gray, patch_size)
    return _complexity(gray, patch_size, _patch_entropy_fast if plan == "fast" else _patch_entropy_reference)


@torch.no_grad()
def complexity_map(gray: Tensor, patch_size: int = 10, *, backend: str = "auto") -> Tensor:
    """Complexity of the patch that each pixel lies in: gradient entropy in bits times the patch's area.

    Args:
        gray: [B,H,W] in [0,1], floating point.
        patch_size: side of the patches in pixels.
        backend: "auto", "torch" (the definition) or "triton".

    Returns:
        [B,H,W] fp32 (fp64 for fp64 gray), in [0, 8 * patch_size^2].

    Raises:
        TypeError, ValueError: a wrong type or rank, values outside [0,1], NaN (see `checks`).
        RuntimeError: backend="triton" where it cannot run.
    """
    plan = _plan(gray, patch_size, backend)
    if plan == "triton":
        return _launch(gray, patch_size, None)[0]
    return _on_plan(plan, gray, patch_size)


@torch.no_grad()
def attribute_ratios(
    gray: Tensor, patch_size: int = 10, threshold: float = 50.0, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Shares of smooth and textured area, and the texture mask. No host sync.

    Args:
        gray: [B,H,W] in [0,1], floating point (the luminance of the ground truth).
        patch_size: side of the patches in pixels.
        threshold: a patch whose complexity exceeds it is textured.
        backend: "auto", "torch" (the definition) or "triton".

    Returns:
        smooth: [B] fp32 (fp64 for fp64 gray), rounded to 2 decimals; texture: [B], 1 - smooth; mask: [B,H,W] bool, True
        where textured.

    Raises:
        TypeError, ValueError: a wrong type or rank, values outside [0,1], NaN (see `checks`).
        RuntimeError: backend="triton" where it cannot run.
    """
    plan = _plan(gray, patch_size, backend)
    if plan == "triton":
        smooth, texture, mask = _launch(gray, patch_size, float(threshold))
        return smooth, texture, mask
    return _ratios(_on_plan(plan, gray, patch_size), threshold)
