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
from .dispatch import use_triton

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
    sobel = torch.tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=patches.dtype, device=patches.device)
    kernels = torch.stack((sobel, sobel.T))[:, None]
    gradient = F.conv2d(F.pad(resized, (1, 1, 1, 1), mode="replicate"), kernels)
    magnitude = gradient.square().sum(1).sqrt().reshape(n, -1)
    bins = (magnitude * BINS_PER_UNIT).floor().long()
    inside = (bins < BINS).long()  # beyond 5.5 nothing is counted; it takes a gray outside [0,1]
    histogram = torch.zeros(n, BINS, dtype=torch.long, device=patches.device)
    histogram.scatter_add_(1, bins.clamp_max(BINS - 1), inside)
    return _entropy(histogram, patches.dtype)


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
    """[n,ph,pw] -> [n]: the same by small matrix products, for the CPU."""
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
        values = patch_entropy(_to_patches(region, ph, pw)) * (ph * pw)
        out[:, rows, columns].view(b, m, ph, n, pw).copy_(values.view(b, m, 1, n, 1))
    return out


def complexity_map_reference(gray: Tensor, patch_size: int) -> Tensor:
    """The definition, in fp64 for fp64 gray and in fp32 otherwise. Arguments as in `complexity_map`."""
    return _complexity(gray, patch_size, _patch_entropy_reference)


def _ratios(mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[B,H,W] -> smooth [B], texture [B]: shares of the area in whole hundredths (ties to even), which sum to 1."""
    percent = (mask.sum((1, 2)).double() * 100 / mask[0].numel()).round()
    return ((100 - percent) / 100).to(dtype), (percent / 100).to(dtype)


def attribute_ratios_reference(gray: Tensor, patch_size: int, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in fp64 for fp64 gray and in fp32 otherwise. Arguments as in `attribute_ratios`."""
    complexity = complexity_map_reference(gray, patch_size)
    mask = complexity > threshold
    return *_ratios(mask, complexity.dtype), mask


def _check(gray: Tensor, patch_size: int) -> None:
    checks.tensor("gray", gray, "B,H,W")
    if not isinstance(patch_size, int) or patch_size < 1:
        raise ValueError(f"patch_size must be an int >= 1; got {patch_size!r}")
    checks.between("gray", gray, 0.0, 1.0, "divide 8-bit values by 255")


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
    _check(gray, patch_size)
    if backend == "torch":
        return complexity_map_reference(gray, patch_size)
    use_triton(backend, gray)
    return _complexity(gray, patch_size, _patch_entropy_fast if gray.device.type == "cpu" else _patch_entropy_reference)


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
    _check(gray, patch_size)
    if backend == "torch":
        return attribute_ratios_reference(gray, patch_size, threshold)
    use_triton(backend, gray)
    mask = _complexity(gray, patch_size, _patch_entropy_fast) > threshold
    return *_ratios(mask, torch.promote_types(gray.dtype, torch.float32)), mask
