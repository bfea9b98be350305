"""Every score by its name: what it measures, which way is better, how it is computed.

The rewards of training and the columns of an evaluation are chosen from these.

A score is "fidelity" when it compares with the HR picture and "perceptual" when it does not (region_detail, which
compares the amount of detail, counts as perceptual). The kind decides the weight in the attribute-aware reward:
fidelity counts by the smooth share of the picture, perceptual by the textured share (paper, section 3.3).

To add a score, add a row to SCORES; the functions themselves are in gdpo.scores.metrics.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["fidelity", "perceptual"]
PerPicture = Callable[[Tensor, Tensor], Tensor]
"""Pictures [N,3,H,W] in [0,1], their HR [N,3,H,W] or one for all [1,3,H,W] in [0,1] -> [N]."""


@dataclass(frozen=True)
class Score:
    """An entry of the registry.

    Attributes:
        kind: "fidelity" or "perceptual".
        better: +1 where more is better, -1 where less is.
        about: what it is, in a few words.
        build: device -> the score of pictures; None where it needs a group's statistics.
        statistic: the field of gdpo.kernels.AttributeStatistics that holds it for a whole group, if one does; then
            the reward is taken from there, and `build` is for evaluations.
        weights: of a score of pyiqa, the files of its weights (PyiqaWeights); None for scores of this project.
    """

    kind: Kind
    better: int
    about: str
    build: Callable[[torch.device], PerPicture] | None = None
    statistic: str | None = None
    weights: PyiqaWeights | None = None


@dataclass(frozen=True)
class PyiqaWeights:
    """pyiqa's name of a metric, its file as pyiqa 0.1.14 calls it, and its backbone's in torch's own folder."""

    metric: str
    file: str
    backbone: str | None = None


class Unavailable(RuntimeError):
    """A score whose package or weights are missing; the message says what to do."""


def _own(name: str, reference: bool = False, **options: str) -> Callable[[torch.device], PerPicture]:
    """A function of gdpo.scores.metrics."""

    def build(device: torch.device) -> PerPicture:
        metric = getattr(importlib.import_module("gdpo.scores.metrics"), name)
        if reference:
            return lambda x, y: metric(x, y.expand_as(x), **options)
        return lambda x, y: metric(x, **options)

    return build


def _vgg(device: torch.device) -> PerPicture:
    from gdpo.scores.features import PerceptualDistance

    distance = PerceptualDistance().to(device)
    return lambda x, y: distance(x * 2 - 1, y * 2 - 1)


def _brisque(device: torch.device) -> PerPicture:
    from gdpo.scores.metrics.brisque_model import brisque, load_brisque

    try:
        load_brisque()
    except FileNotFoundError as error:
        raise Unavailable(str(error)) from error
    return lambda x, y: brisque(x)


def load_pyiqa(weights: PyiqaWeights, device: torch.device) -> Callable:
    """A metric of the optional package pyiqa.

    Raises:
        Unavailable: the package or the weights are missing; it says where the weights go, behind PLACE.
    """
    hub = Path(torch.hub.get_dir())
    backbone = f" and {hub / 'checkpoints' / weights.backbone}" if weights.backbone else ""
    place = f"{PLACE}{hub / 'pyiqa' / weights.file}{backbone}"
    try:
        pyiqa = importlib.import_module("pyiqa")
    except Exception as error:  # pyiqa needs torchvision, timm and more, which fail in ways of their own
        raise Unavailable(f"pyiqa cannot be imported ({one_line(error)}); pip install 'gdpo-sr[iqa]'{place}") from error
    try:
        return pyiqa.create_metric(weights.metric, device=device, as_loss=False)
    except Exception as error:
        raise Unavailable(f"pyiqa could not load {weights.metric} ({one_line(error)}){place}") from error


PLACE = "; its weights go to "


def one_line(error: BaseException) -> str:
    """Its type and what it says, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _pyiqa(kind: Kind, better: int, about: str, *weights: str) -> Score:
    files = PyiqaWeights(*weights)

    def build(device: torch.device) -> PerPicture:
        metric = load_pyiqa(files, device)
        if kind == "fidelity":
            return lambda x, y: metric(x, y.expand_as(x)).flatten()
        return lambda x, y: metric(x).flatten()

    return Score(kind, better, f"{about}, through pyiqa", build, weights=files)


SCORES: dict[str, Score] = {
    # psnr_y of gdpo.scores.metrics, of 8-bit pictures, is the evaluations' and the guards'; the reward of that name is
    # AttributeStatistics.psnr_y, of the samples as they are.
    "psnr_y": Score("fidelity", 1, "PSNR of the luma, dB", _own("psnr_y", reference=True), "psnr_y"),
    "psnr_rgb": Score("fidelity", 1, "PSNR of the three channels, dB", _own("psnr_rgb", reference=True)),
    "region_fidelity": Score("fidelity", 1, "PSNR of the luma where the photo is smooth, dB", statistic="fidelity"),
    "region_detail": Score(
        "perceptual", 1, "how close the amount of detail is to the photo's, where it is textured", statistic="detail"
    ),
    "ssim_y": Score("fidelity", 1, "structural similarity of the luma", _own("ssim_y", reference=True)),
    "vgg": Score("fidelity", -1, "VGG16 feature distance", _vgg),
    "niqe": Score("perceptual", -1, "NIQE with blocks of 96, of pictures with two or more", _own("niqe")),
    "niqe-32": Score("perceptual", -1, "NIQE with blocks of 32, for crops", _own("niqe", model="photos-32")),
    "piqe": Score("perceptual", -1, "PIQE; it rewards fine grids, so never alone", _own("piqe")),
    "brisque": Score("perceptual", -1, "BRISQUE, a regression on scene statistics (extra brisque)", _brisque),
    "naturalness": Score("perceptual", 1, "no-reference, offline, made for crops of 64 and more", _own("naturalness")),
    "grid_artefact": Score("fidelity", -1, "grid in flat areas, 8-bit levels", _own("grid_artefact", reference=True)),
    "lattice_artefact": Score("fidelity", -1, "dots of a pixel shuffle, dB", _own("lattice_artefact", reference=True)),
    "oversharpening": Score("fidelity", -1, "overshoot at edges, percent", _own("oversharpening", reference=True)),
    "lpips": _pyiqa(
        "fidelity", -1, "LPIPS (AlexNet)", "lpips", "LPIPS_v0.1_alex-df73285e.pth", "alexnet-owt-7be5be79.pth"
    ),
    "dists": _pyiqa("fidelity", -1, "DISTS", "dists", "DISTS_weights-f5e65c96.pth", "vgg16-397923af.pth"),
    "clipiqa": _pyiqa("perceptual", 1, "CLIP-IQA", "clipiqa", "RN50.pt"),
    "musiq": _pyiqa("perceptual", 1, "MUSIQ (KonIQ)", "musiq", "musiq_koniq_ckpt-e95806b9.pth"),
    "maniqa": _pyiqa("perceptual", 1, "MANIQA (KonIQ)", "maniqa", "ckpt_koniq10k.pt"),
    "maniqa-pipal": _pyiqa("perceptual", 1, "MANIQA (PIPAL)", "maniqa-pipal", "MANIQA_PIPAL-ae6d356b.pth"),
    "niqe-paper": _pyiqa("perceptual", -1, "NIQE with the authors' parameters", "niqe", "niqe_modelparameters.mat"),
}
FID = PyiqaWeights("fid", "pt_inception-2015-12-05-6726825d.pth")  # of folders, so no Score
RENAMED = {"maniqa-koniq": "maniqa"}  # what evaluation called it before names meant one thing


def find(name: str, what: str) -> tuple[str, Score]:
    """The entry of a name, under the name that it has now.

    Args:
        what: what the caller calls it, for the message.

    Raises:
        ValueError: there is none; it lists those that are.
    """
    name = RENAMED.get(name, name)
    if name not in SCORES:
        raise ValueError(f"unknown {what} {name!r}; known are {', '.join(SCORES)}")
    return name, SCORES[name]
