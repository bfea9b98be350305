"""The columns of a report: scores of the registry, if they and their weights are available."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gdpo.scores import metrics
from gdpo.scores.registry import SCORES, PerPicture, Score, Unavailable, find

_ARTEFACTS = ("grid_artefact", "lattice_artefact", "oversharpening")
OFFLINE = ("psnr_y", "ssim_y", "vgg", "niqe", "piqe", "naturalness", *_ARTEFACTS)
NAMES = (*OFFLINE, *(name for name, score in SCORES.items() if score.weights), "fid")


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


def build_metrics(names: list[str], niqe_model: str, device: torch.device) -> tuple[list[Metric], dict[str, str]]:
    """The columns that can be computed here, and for each that cannot the reason and what to do.

    Args:
        names: of the registry; "fid", which compares folders, is skipped.
        niqe_model: of the column niqe; see gdpo.scores.metrics.load_niqe.

    Raises:
        ValueError: an unknown name or NIQE model, or a score of groups.
    """
    entries = dict(find(name, "metric") for name in names if name != "fid").items()  # each once
    columns: list[Metric] = []
    missing: dict[str, str] = {}
    for name, entry in entries:
        if entry.build is None:
            raise ValueError(f"metric {name!r} compares the samples of a group, so it can only be a reward")
        try:
            score = _niqe(niqe_model) if name == "niqe" else entry.build(device)
        except (Unavailable, FileNotFoundError) as error:  # pyiqa; the VGG16 weights
            missing[name] = str(error)
            continue
        columns.append(Metric(name, entry.better, entry.kind == "fidelity", _one_by_one(entry, score)))
    return columns, missing


def _niqe(model: str) -> PerPicture:
    loaded = metrics.load_niqe(model)
    return lambda x, _: metrics.niqe(x, loaded)


def _one_by_one(entry: Score, score: PerPicture) -> PerPicture:
    """No-reference metrics of pyiqa take a picture at a time, as the papers' scripts do."""
    if entry.weights is None or entry.kind == "fidelity":
        return score
    return lambda x, y: torch.cat([score(p[None], y) for p in x])
