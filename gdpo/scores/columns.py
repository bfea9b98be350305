"""The columns: this project's metrics, and those of pyiqa where it and its weights are to be had."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gdpo.scores import metrics


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


_ARTEFACTS = ("grid_artefact", "lattice_artefact", "oversharpening")
OFFLINE = ("psnr_y", "ssim_y", "vgg", "niqe", "piqe", "naturalness", *_ARTEFACTS)
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
# pyiqa's name -> the file of its weights as pyiqa 0.1.14 calls it, and its backbone's in torch's own folder.
WEIGHTS = {
    "lpips": ("LPIPS_v0.1_alex-df73285e.pth", "alexnet-owt-7be5be79.pth"),
    "dists": ("DISTS_weights-f5e65c96.pth", "vgg16-397923af.pth"),
    "clipiqa": ("RN50.pt", None),
    "musiq": ("musiq_koniq_ckpt-e95806b9.pth", None),
    "maniqa": ("ckpt_koniq10k.pt", None),
    "maniqa-pipal": ("MANIQA_PIPAL-ae6d356b.pth", None),
    "niqe": ("niqe_modelparameters.mat", None),
    "fid": ("pt_inception-2015-12-05-6726825d.pth", None),
}


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
        from gdpo.scores.features import PerceptualDistance

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
    """(metric, "") or (None, the reason, the remedy and where the weights go)."""
    try:
        pyiqa = importlib.import_module("pyiqa")
    except Exception as error:  # pyiqa needs torchvision, timm and more, which fail in ways of their own
        return None, f"pyiqa cannot be imported ({_line(error)}); pip install 'gdpo-sr[iqa]'{PLACE}{_place(name)}"
    try:
        return pyiqa.create_metric(name, device=device, as_loss=False), ""
    except Exception as error:
        return None, f"pyiqa could not load {name} ({_line(error)}){PLACE}{_place(name)}"


PLACE = "; its weights go to "


def _place(name: str) -> str:
    hub, (file, backbone) = Path(torch.hub.get_dir()), WEIGHTS[name]
    return str(hub / "pyiqa" / file) + (f" and {hub / 'checkpoints' / backbone}" if backbone else "")


def _through_pyiqa(name: str, metric: Callable) -> Metric:
    _, better, reference = PYIQA[name]

    def score(x: Tensor, y: Tensor) -> Tensor:
        if reference:
            return metric(x, y.expand_as(x)).flatten()
        return torch.cat([metric(p[None]).flatten() for p in x])  # one by one, as the papers' scripts do

    return Metric(name, better, reference, score)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
