"""The columns: this project's metrics, and those of pyiqa where it and its weights are to be had."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gdpo import metrics


@dataclass(frozen=True)
class Metric:
    """A column.

    Attributes:
        name: of the column.
        better: +1 where more is better, -1 where less is.
        reference: whether it compares with the HR picture (then the HR row has none).
        score: (pictures [M,3,H,W] in [0,1], HR [1,3,H,W] in [0,1]) -> [M].
    """

    name: str
    better: int
    reference: bool
    score: Callable[[Tensor, Tensor], Tensor]


OFFLINE = ("psnr_y", "ssim_y", "vgg", "niqe", "piqe", "naturalness", "grid_artefact", "oversharpening")
# Column -> pyiqa's name, better, needs a reference. KonIQ and PIPAL are two MANIQAs and differ by far.
PYIQA = {
    "lpips": ("lpips", -1, True),
    "dists": ("dists", -1, True),
    "clipiqa": ("clipiqa", 1, False),
    "musiq": ("musiq", 1, False),
    "maniqa-koniq": ("maniqa", 1, False),
    "maniqa-pipal": ("maniqa-pipal", 1, False),
    "niqe-paper": ("niqe", -1, False),
}
NAMES = (*OFFLINE, *PYIQA, "fid")


def build_metrics(names: list[str], niqe_model: str, device: torch.device) -> tuple[list[Metric], dict[str, str]]:
    """The columns that can be computed here, and for each that cannot the reason and what to do.

    Raises:
        ValueError: an unknown name or NIQE model.
    """
    unknown = [n for n in names if n not in NAMES]
    if unknown:
        raise ValueError(f"unknown metric {unknown[0]!r}; known are {', '.join(NAMES)}")
    columns: list[Metric] = []
    missing: dict[str, str] = {}
    for name in names:
        if name in OFFLINE:
            try:
                columns.append(_offline(name, niqe_model, device))
            except FileNotFoundError as error:  # the VGG16 weights
                missing[name] = str(error)
        elif name in PYIQA:
            metric, reason = create_pyiqa(PYIQA[name][0], device)
            if metric is None:
                missing[name] = reason
            else:
                columns.append(_through_pyiqa(name, metric))
    return columns, missing


def _offline(name: str, niqe_model: str, device: torch.device) -> Metric:
    if name == "vgg":
        from gdpo.features import PerceptualDistance

        distance = PerceptualDistance().to(device)
        return Metric("vgg", -1, True, lambda x, y: distance(x * 2 - 1, y * 2 - 1))
    if name == "niqe":
        model = metrics.load_niqe(niqe_model)
        return Metric("niqe", -1, False, lambda x, _: metrics.niqe(x, model))
    function = getattr(metrics, name)
    if name in ("piqe", "naturalness"):
        return Metric(name, 1 if name == "naturalness" else -1, False, lambda x, _: function(x))
    better = 1 if name in ("psnr_y", "ssim_y") else -1
    return Metric(name, better, True, lambda x, y: function(x, y.expand_as(x)))


def create_pyiqa(name: str, device: torch.device) -> tuple[Callable | None, str]:
    """(metric, "") or (None, the reason and the remedy)."""
    try:
        pyiqa = importlib.import_module("pyiqa")
    except Exception as error:  # pyiqa needs torchvision, timm and more, which fail in ways of their own
        return None, f"pyiqa cannot be imported ({_line(error)}); pip install 'gdpo-sr[iqa]'"
    try:
        return pyiqa.create_metric(name, device=device, as_loss=False), ""
    except Exception as error:
        hub = Path(torch.hub.get_dir())
        where = f"{hub / 'pyiqa'} (backbones: {hub / 'checkpoints'})"
        return None, f"pyiqa could not load {name} ({_line(error)}); its weights go to {where}"


def _through_pyiqa(name: str, metric: Callable) -> Metric:
    _, better, reference = PYIQA[name]

    def score(x: Tensor, y: Tensor) -> Tensor:
        if reference:
            return metric(x, y.expand_as(x)).flatten()
        return torch.cat([metric(p[None]).flatten() for p in x])  # one by one, as the papers' scripts do

    return Metric(name, better, reference, score)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
