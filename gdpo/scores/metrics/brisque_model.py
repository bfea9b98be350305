"""BRISQUE (Mittal, Moorthy, Bovik 2012): natural scene statistics of a picture, and a regression on them.

The model is the authors' (LIVE), as the package `brisque` ships it (extra `brisque`). Its svm.txt is parsed as text;
the ranges of the features, which it has as a pickle, are read from the pickle's opcodes: nothing in it is executed.
"""

from __future__ import annotations

import math
import pickletools
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gdpo.scores.luma import RGB2GRAY, weighted
from gdpo.scores.metrics.common import SCENE_WINDOW, check_images, in_slices, smooth, to_8bit
from gdpo.scores.metrics.niqe_model import fit, half, shape_of, spread_of

SMALLEST = 32
FEATURES = 36
_NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (-1, 1))
_HARMLESS = {"PROTO", "FRAME", "MEMOIZE", "MARK", "STOP"}
_HARMLESS |= {"EMPTY_DICT", "EMPTY_LIST", "APPEND", "APPENDS", "SETITEM", "SETITEMS"}


class BrisqueModel(NamedTuple):
    """`low`, `high` [36]: ranges of the features; `vectors` [S,36] with `weights` [S]: the regression. All fp64."""

    low: Tensor
    high: Tensor
    vectors: Tensor
    weights: Tensor
    gamma: float
    rho: float

    def to(self, device: torch.device) -> BrisqueModel:
        """The same on a device."""
        low, high, vectors, weights = (v.to(device) for v in (self.low, self.high, self.vectors, self.weights))
        return BrisqueModel(low, high, vectors, weights, self.gamma, self.rho)


def brisque(x: Tensor, model: BrisqueModel | None = None) -> Tensor:
    """Score of [N,3,H,W] in [0,1], sides of at least 32 -> [N] fp64; less is better; 0 to 100, and below for the clean.

    Raises:
        FileNotFoundError: no model given, and the package `brisque` is not installed.
    """
    check_images(SMALLEST, x=x)
    model = (model or load_brisque()).to(x.device)

    def score(part: Tensor) -> Tensor:
        scaled = 2 * (features(part) - model.low) / (model.high - model.low) - 1
        distance = torch.cdist(scaled, model.vectors).square()
        return torch.exp(-model.gamma * distance) @ model.weights - model.rho

    return in_slices(score, x)


def features(x: Tensor) -> Tensor:
    """[N,3,H,W] in [0,1] -> [N,36]: 18 of the picture and 18 of its half; flat pictures have the lowest there are."""
    y = weighted(to_8bit(x.double()), RGB2GRAY)
    out = []
    for luma in (y, half(y)):
        mean = smooth(luma, SCENE_WINDOW, "constant")  # MATLAB's filter2 pads with zeros
        deviation = (smooth(luma * luma, SCENE_WINDOW, "constant") - mean * mean).abs().sqrt()
        mscn = ((luma - mean) / (deviation + 1))[:, None]
        square = (mscn * mscn).mean((2, 3))
        out += [shape_of(mscn.abs().mean((2, 3)).square() / square), square]
        for shift in _NEIGHBOURS:
            shape, left, right = fit(mscn * mscn.roll(shift, (2, 3)))
            mean = (right - left) * spread_of(shape) * torch.exp(torch.lgamma(2 / shape) - torch.lgamma(1 / shape))
            out += [shape, mean, left.square(), right.square()]
    return torch.cat(out, dim=1).nan_to_num(0)


@lru_cache(maxsize=1)
def load_brisque(folder: Path | None = None) -> BrisqueModel:
    """The model in a folder with svm.txt and normalize.pickle; None looks into the package, which is not imported.

    Raises:
        FileNotFoundError: there is none. ValueError: a file that is no such model.
    """
    if folder is None:
        spec = find_spec("brisque")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError("brisque needs its model; pip install --no-deps brisque")
        folder = Path(spec.submodule_search_locations[0]) / "models"
    head, _, body = (folder / "svm.txt").read_text("ascii").partition("\nSV\n")
    facts = dict(line.split(maxsplit=1) for line in head.splitlines())
    rows = [line.split() for line in body.splitlines() if line.strip()]
    wanted = {"svm_type": "epsilon_svr", "kernel_type": "rbf", "total_sv": str(len(rows))}
    if any(facts.get(k) != v for k, v in wanted.items()):
        raise ValueError(f"{folder / 'svm.txt'} is not a regression of libsvm: expected {wanted}")
    vectors = torch.zeros(len(rows), FEATURES, dtype=torch.float64)
    for vector, row in zip(vectors, rows):
        for entry in row[1:]:
            place, _, value = entry.partition(":")
            vector[int(place) - 1] = float(value)
    weights = torch.tensor([float(row[0]) for row in rows], dtype=torch.float64)
    low, high = _ranges(folder / "normalize.pickle")
    return BrisqueModel(low, high, vectors, weights, float(facts["gamma"]), float(facts["rho"]))


def _ranges(path: Path) -> tuple[Tensor, Tensor]:
    """The lists min_ and max_ of 36 numbers, of opcodes that hold numbers and names alone."""
    found: dict[str, list[float]] = {}
    for opcode, value, _ in pickletools.genops(path.read_bytes()):
        if opcode.name == "SHORT_BINUNICODE":
            numbers = found.setdefault(str(value), [])
        elif opcode.name == "BINFLOAT" and found:
            numbers.append(float(value))  # type: ignore[arg-type]
        elif opcode.name not in _HARMLESS:
            raise ValueError(f"{path} holds more than numbers ({opcode.name})")
    low, high = (torch.tensor(found.get(k, []), dtype=torch.float64) for k in ("min_", "max_"))
    if low.shape != (FEATURES,) or high.shape != (FEATURES,) or not (low < high).all() or not math.isfinite(high.sum()):
        raise ValueError(f"{path} must hold min_ and max_ of {FEATURES} features")
    return low, high
