"""PIQE (Venkatanath et al. 2015): how much of a picture's active area looks impaired or noisy. No parameters.

As MATLAB's `piqe` has it (its thresholds, its column counts in the noise test), batched. Beware: it takes a fine
regular grid for detail and scores it well; never read it without `grid_artefact` and without looking.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gdpo.scores.luma import RGB2GRAY
from gdpo.scores.metrics.common import SCENE_WINDOW, check_images, in_slices, smooth, to_8bit

_BLOCK, _SEGMENT, _ACTIVE, _IMPAIRED = 16, 6, 0.1, 0.1


def piqe(x: Tensor) -> Tensor:
    """PIQE of [N,3,H,W] in [0,1], sides of at least 16, rounded to 8 bits -> [N] fp64, 0 (best) to 100.

    A picture without any active block has 100, as in MATLAB.
    """
    check_images(_BLOCK, x=x)
    return in_slices(_piqe, x)


def _piqe(x: Tensor) -> Tensor:
    gray = torch.einsum("nchw,c->nhw", to_8bit(x.double()), x.new_tensor(RGB2GRAY, dtype=torch.float64)).round()
    h, w = gray.shape[1:]
    gray = F.pad(gray[:, None], (0, -w % _BLOCK, 0, -h % _BLOCK), mode="replicate")[:, 0]
    mean = smooth(gray, SCENE_WINDOW)
    deviation = (smooth(gray * gray, SCENE_WINDOW) - mean * mean).abs().sqrt()
    blocks = ((gray - mean) / (deviation + 1)).unfold(1, _BLOCK, _BLOCK).unfold(2, _BLOCK, _BLOCK).flatten(1, 2)

    variance = blocks.var((2, 3))
    active = variance > _ACTIVE
    score = _impaired(blocks) * (1 - variance) + _noisy(blocks, variance) * variance
    return 100 * ((score * active).sum(1) + 1) / (active.sum(1) + 1)


def _impaired(blocks: Tensor) -> Tensor:
    """[N,K,16,16] -> [N,K]: a run of 6 pixels on one of the block's four sides hardly varies."""
    sides = torch.stack([blocks[..., 0, :], blocks[..., -1, :], blocks[..., :, 0], blocks[..., :, -1]], dim=-2)
    return (sides.unfold(-1, _SEGMENT, 1).std(-1) < _IMPAIRED).flatten(2).any(-1)


def _noisy(blocks: Tensor, variance: Tensor) -> Tensor:
    """[N,K,16,16] -> [N,K]: the middle columns vary as the rest does (MATLAB leaves out columns 8 and 10 there)."""
    sigma = variance.sqrt()
    rest = [i for i in range(_BLOCK) if i not in (7, 9)]
    ratio = (blocks[..., 7:9].flatten(2).std(-1) / blocks[..., rest].flatten(2).std(-1)).nan_to_num(0)
    beta = (sigma - ratio).abs() / torch.maximum(sigma, ratio)
    return sigma > 2 * beta
