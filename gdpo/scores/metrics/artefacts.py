"""Faults that preference tuning is known to bring, as figures with a unit: a grid, dots in textures, oversharpening.

All are 0 for a picture that equals its reference; without a reference they are small for photos.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gdpo.scores.luma import luma_255
from gdpo.scores.metrics.common import check_images, gaussian, in_slices, smooth

_PERIOD, _BLOCK = 8, 32  # whatever repeats every 2 or 4 pixels repeats every 8
_LATTICE, _WINDOW = 4, 32  # what a pixel shuffle by 4 leaves: every 8th frequency of a window's 32
_TAPS = torch.tensor([0.5, 1, 1, 1, 1, 1, 1, 1, 0.5]) / _PERIOD  # averages over one period: blind to the grid


def grid_artefact(x: Tensor, reference: Tensor | None = None) -> Tensor:
    """RMS amplitude in flat areas, in 8-bit luma levels, of whatever repeats every 2, 4 or 8 pixels.

    A pixel shuffle or a patch-wise network leaves such a pattern at a fixed place; noise and texture do not. Luma less
    its mean over a period is folded to 8x8 in blocks of 32x32 (a median over the 16 repeats, so that an edge through
    the block counts little). The product of the patterns of two neighbouring blocks keeps what they share; its mean
    over the flattest quarter of all pairs is the squared amplitude.

    Args:
        x: [N,3,H,W] in [0,1], sides of at least 32, one of at least 64.
        reference: the same shape; what it has of such structure in the same blocks (bricks, print) is taken off.

    Returns: [N] fp32, >= 0. Visible from about 1 on.
    """
    check_images(_BLOCK, **({"x": x} if reference is None else {"x": x, "reference": reference}))
    if max(x.shape[2:]) < 2 * _BLOCK:
        raise ValueError(f"x must be [N,3,H,W] with a side of at least {2 * _BLOCK}; got {tuple(x.shape)}")
    squared, roughness = (torch.cat(parts) for parts in zip(*(_shared_patterns(p) for p in x.split(4))))
    if reference is not None:
        own, roughness = (torch.cat(parts) for parts in zip(*(_shared_patterns(p) for p in reference.split(4))))
        squared = squared - own
    flattest = roughness.topk(max(1, roughness.shape[1] // 4), dim=1, largest=False).indices
    return squared.gather(1, flattest).mean(1).clamp_min(0).sqrt()


def _shared_patterns(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each pair of neighbouring blocks, [N,pairs]: the product of their patterns, and how rough they are."""
    y = luma_255(x.float())
    y = y - smooth(y, _TAPS)
    rows, columns, repeats = y.shape[1] // _BLOCK, y.shape[2] // _BLOCK, _BLOCK // _PERIOD
    y = y[:, : rows * _BLOCK, : columns * _BLOCK].reshape(len(y), rows, repeats, _PERIOD, columns, repeats, _PERIOD)
    folded = y.permute(0, 1, 4, 2, 5, 3, 6).reshape(len(y), rows, columns, repeats**2, _PERIOD**2)
    pattern = folded.median(dim=3).values
    rough = (folded - pattern.unsqueeze(3)).abs().mean((3, 4))
    pattern = pattern - pattern.mean(-1, keepdim=True)
    pairs = [
        ((pattern[:, 1:] * pattern[:, :-1]).mean(-1), torch.maximum(rough[:, 1:], rough[:, :-1])),
        ((pattern[:, :, 1:] * pattern[:, :, :-1]).mean(-1), torch.maximum(rough[:, :, 1:], rough[:, :, :-1])),
    ]
    products, roughness = (torch.cat([p.flatten(1) for p in side], dim=1) for side in zip(*pairs))
    return products, roughness


def lattice_artefact(x: Tensor, reference: Tensor | None = None) -> Tensor:
    """Height in dB of the spectrum's peaks at periods of 2 and 4 pixels, also in textures: the dots of a pixel shuffle.

    grid_artefact is an amplitude in flat areas; this is a ratio to what the picture has at the frequencies beside, so
    that faint dots count the same in every texture.

    Args:
        x: [N,3,H,W] in [0,1], sides of at least 32.
        reference: the same shape; the height of its peaks is taken off.

    Returns: [N] fp32, >= 0: the mean over 15 frequencies. With a reference, dots can be seen from about 2 on; photos
        without one score about 1 for their upright and level edges.
    """
    check_images(_WINDOW, **({"x": x} if reference is None else {"x": x, "reference": reference}))
    height = _heights(x) if reference is None else _heights(x) - _heights(reference)
    return height.clamp_min(0).mean(1) * 10 / math.log(10)


def _heights(x: Tensor) -> Tensor:
    peaks, around = (torch.cat(parts) for parts in zip(*(lattice_peaks(p.float() * 255) for p in x.split(1))))
    return peaks - around


def flat_hatch(x: Tensor, smooth_input: Tensor) -> Tensor:
    """Height in dB of the sharpest peak that x has in flat areas and its input has not: hatching of any direction.

    Luma in windows of 32x32 where the input, upsampled, is flattest (an eighth of them); the mean of their power
    spectra; at each frequency with a period of 2 to 8 pixels the ratio to the median of the 7x7 around it. Grain and
    sharper edges raise neighbours together, a hatch or a grid raises one.

    Args:
        x: [N,3,H,W] in [0,1], sides of at least 64.
        smooth_input: the same shape: what x was made from, by bicubic, or another picture without such a pattern.

    Returns: [N] fp32, >= 0. HR pictures have 1 to 5, a faint diagonal hatch that is seen at 3x zoom 14 to 20.
    """
    check_images(2 * _WINDOW, x=x, smooth_input=smooth_input)
    return torch.cat([_hatch(a, b) for a, b in zip(x.split(1), smooth_input.split(1))])


def _hatch(x: Tensor, smooth_input: Tensor) -> Tensor:
    hann = torch.hann_window(_WINDOW + 2, periodic=False, device=x.device)[1:-1]
    window = hann[:, None] * hann
    cut = [
        luma_255(p.float())[0].unfold(0, _WINDOW, _WINDOW // 2).unfold(1, _WINDOW, _WINDOW // 2).flatten(0, 1)
        for p in (x, smooth_input)
    ]  # [windows,32,32] each
    roughness = cut[1].diff(dim=1).square().mean((1, 2)) + cut[1].diff(dim=2).square().mean((1, 2))
    flat = roughness.topk(max(4, len(roughness) // 8), largest=False).indices
    rounding = window.square().sum() / 12  # what rounding to 8 bits leaves at each frequency
    heights = []
    for windows in cut:
        centred = (windows[flat] - windows[flat].mean((1, 2), keepdim=True)) * window
        power = torch.fft.fft2(centred).abs().square().mean(0) + rounding
        around = F.pad(power[None, None], (3, 3, 3, 3), "circular").unfold(2, 7, 1).unfold(3, 7, 1)
        heights.append((power / around[0, 0].flatten(-2).median(-1).values).log10() * 10)
    frequency = torch.fft.fftfreq(_WINDOW, device=x.device).abs()
    fine = torch.maximum(frequency[:, None], frequency[None]) >= 1 / 8
    return (heights[0] - heights[1].clamp_min(0))[fine].amax().clamp_min(0)[None]


def lattice_peaks(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean log power at the 15 frequencies with a period of 2 or 4 pixels in x and y, and of those around each.

    The log, averaged over windows of 32x32 that lie 16 apart and over channels, weighs a faint window as much as a
    strong one.

    Args:
        x: [N,3,H,W] in 8-bit levels (any offset), sides of at least 32; differentiable.

    Returns: two [N,15] fp32 in nats: the peaks, and the mean of the frequencies 3 to 4 steps of 1/32 beside them.
    """
    step, half = _WINDOW // _LATTICE, _WINDOW // 2
    hann = torch.hann_window(_WINDOW + 2, periodic=False, device=x.device)[1:-1]
    windows = x.float().unfold(2, _WINDOW, half).unfold(3, _WINDOW, half)  # [N,3,rows,columns,32,32]
    windows = (windows - windows.mean((-2, -1), keepdim=True)) * (hann[:, None] * hann)
    rounding = hann.square().sum().square() / 12  # what rounding to 8 bits leaves at each frequency
    power = (torch.fft.fft2(windows).abs().square() + rounding).log().mean((1, 2, 3)).unsqueeze(1)  # [N,1,32,32]
    ring = torch.ones(9, 9, device=x.device)
    ring[2:7, 2:7] = 0
    around = F.conv2d(F.pad(power, (4, 4, 4, 4), "circular"), (ring / ring.sum())[None, None], stride=step)
    return power[:, 0, ::step, ::step].flatten(1)[:, 1:], around.flatten(1)[:, 1:]


def oversharpening(x: Tensor, reference: Tensor | None = None) -> Tensor:
    """How far luma overshoots at edges, in percent of the edge's height.

    With a reference: the part of x that leaves the range which the reference has within 5x5 pixels, over the quarter
    of the picture where that range is widest. Without: the part that leaves the 7x7 range of x itself blurred by
    sigma 1, over the tenth where that is widest (photos: about 1; sharpening at strength 1 doubles or triples it).

    Args:
        x, reference: [N,3,H,W] in [0,1].

    Returns: [N] fp32, >= 0.
    """
    if reference is not None:
        check_images(x=x, reference=reference)
        both = torch.cat([x, reference], dim=1)
        return in_slices(lambda p: _overshoot(luma_255(p[:, :3].float()), luma_255(p[:, 3:].float()), 5, 0.75), both)
    check_images(x=x)
    window = gaussian(1.0, 4)
    return in_slices(lambda p: _overshoot(y := luma_255(p.float()), smooth(y, window), 7, 0.9), x)


def _overshoot(y: Tensor, within: Tensor, size: int, quantile: float) -> Tensor:
    high = F.max_pool2d(within[:, None], size, 1, size // 2)[:, 0]
    low = -F.max_pool2d(-within[:, None], size, 1, size // 2)[:, 0]
    height = high - low
    rank = max(1, int(height[0].numel() * quantile))
    edges = height >= height.flatten(1).kthvalue(rank).values[:, None, None]
    beyond = (y - high).clamp_min(0) + (low - y).clamp_min(0)
    return 100 * (beyond * edges).sum((1, 2)) / ((height + 1) * edges).sum((1, 2))  # + 1 level: flat pictures have 0
