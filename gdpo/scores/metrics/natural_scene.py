"""Naturalness: a no-reference score for small crops that works offline and is meant to be optimised against.

The features are those that NIQE and its relatives look at, per block of about 64 pixels: luma with the local mean
removed and divided by the local deviation (MSCN, Mittal et al. 2013), its energy, its peakedness and its
autocorrelation at several lags (a blur raises the short lags, a grid of period p the lag p, sharpening digs a trough
beside the centre), at two scales; and the energy of luma and chroma differences in octaves. The score of a block is

    -|A (f - m)| / sqrt(F)        0 is best, higher is better

with one target m and one metric A for all pictures, so it has a single maximum and falls in every direction away from
it: more contrast, more sharpness or more texture than photos have scores worse again. A and m start as the mean and the
whitening of pristine photos (that is NIQE's Mahalanobis distance) and are then trained so that a photo ranks above its
own copy with noise, blur, sharpening, a fixed pattern, JPEG or a lost octave (`python -m gdpo.scores.metrics.fit`).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gdpo.scores.luma import luma_255
from gdpo.scores.metrics.common import SCENE_WINDOW, check_images, halve, in_slices, smooth

PARAMETERS = Path(__file__).resolve().parents[2] / "resources" / "naturalness.safetensors"
BLOCK = 64
_AXIS = ((0, 1), (1, 0))
_DIAGONAL = ((1, 1), (1, -1))
_LAGS = [(dy * k, dx * k) for k in (1, 2, 3, 4, 5, 6, 8) for dy, dx in _AXIS] + [*_DIAGONAL, (2, 2)]
_LAGS_HALF = [(dy * k, dx * k) for k in (1, 2, 3, 4) for dy, dx in _AXIS] + [*_DIAGONAL]
FEATURES = 2 * 4 + len(_LAGS) + len(_LAGS_HALF) + 3 + 4


def naturalness(x: Tensor) -> Tensor:
    """Score of [N,3,H,W] in [0,1], sides of at least 64 -> [N] fp32, at most 0; photos lie near -1."""
    check_images(BLOCK, x=x)
    metric, target = _parameters(x.device)
    return in_slices(lambda part: block_scores(features(part.float()), metric, target).mean(1), x)


def block_scores(f: Tensor, metric: Tensor, target: Tensor) -> Tensor:
    """Features [N,K,F] -> scores [N,K], with metric [F,F] and target [F]."""
    return -((f - target) @ metric.T).square().mean(-1).sqrt()


@lru_cache(maxsize=4)
def _parameters(device: torch.device) -> tuple[Tensor, Tensor]:
    from safetensors.torch import load_file

    stored = load_file(PARAMETERS)
    return stored["metric"].to(device), stored["target"].to(device)


def features(x: Tensor) -> Tensor:
    """[N,3,H,W] in [0,1] -> [N,K,F]: the features of each of the K = (H // 64) * (W // 64) blocks.

    Blocks cover every pixel: a side that is no multiple of 64 has somewhat larger blocks.
    """
    blocks = (x.shape[2] // BLOCK, x.shape[3] // BLOCK)
    y = luma_255(x)
    half = halve(y)
    red, blue = (x[:, 0] - x[:, 1]) * 255, (x[:, 2] - x[:, 1]) * 255
    out = [*_structure(y, blocks, _LAGS), *_structure(half, blocks, _LAGS_HALF)]
    out += [_difference_energy(p, blocks) for p in (y, half, halve(half), red, halve(red), blue, halve(blue))]
    return torch.stack(out, dim=-1)


def _structure(y: Tensor, blocks: tuple[int, int], lags: list[tuple[int, int]]) -> list[Tensor]:
    """Energy, peakedness and autocorrelation of the MSCN map; mean and spread of the local log deviation."""
    mean = smooth(y, SCENE_WINDOW)
    deviation = (smooth(y * y, SCENE_WINDOW) - mean * mean).clamp_min(0).sqrt()
    mscn = (y - mean) / (deviation + 1)
    energy = _pool(mscn * mscn, blocks) + 1e-4
    out = [energy.log(), (_pool(mscn.abs(), blocks) + 1e-4).log() - energy.log() / 2]
    h, w = y.shape[1:]
    for dy, dx in lags:
        first = mscn[:, : h - dy, max(0, -dx) : w - max(0, dx)]
        second = mscn[:, dy:, max(0, dx) : w + min(0, dx)]
        out.append(_pool(first * second, blocks) / energy)
    contrast = (deviation + 1).log()
    level = _pool(contrast, blocks)
    spread = (_pool(contrast * contrast, blocks) - level * level).clamp_min(1e-4).sqrt()
    return [*out, level, spread]


def _difference_energy(y: Tensor, blocks: tuple[int, int]) -> Tensor:
    dx, dy = (y[:, :, 1:] - y[:, :, :-1]).abs(), (y[:, 1:] - y[:, :-1]).abs()
    return (_pool(dx, blocks) + _pool(dy, blocks) + 0.05).log()


def _pool(x: Tensor, blocks: tuple[int, int]) -> Tensor:
    """[N,H,W] -> [N,K]: the mean over each block."""
    return F.adaptive_avg_pool2d(x[:, None], blocks).flatten(1)
