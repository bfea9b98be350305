"""Score pictures one by one: a failure leaves an empty cell and a message; finished scores are kept."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine.io.files import naming
from gdpo.evaluation.columns import Metric
from gdpo.evaluation.sources import Source
from gdpo.model.parts import first_line


class Rows:
    """per_image.csv, a row for each picture and model: image, model, then the metrics at full precision; an undefined
    or failed one is empty. Rows are in the file as soon as they are known.

    Attributes:
        found: the rows so far.
        failures: a line for each thing that failed.
    """

    def __init__(self, path: Path, columns: list[Metric]) -> None:
        self.found: list[dict] = []
        self.failures: list[str] = []
        self._path, self._names = path, ["image", "model", *(m.name for m in columns)]
        with naming(path), open(path, "w", newline="") as f:
            self._writer(f).writeheader()

    def add(self, rows: list[dict]) -> None:
        self.found += rows
        with naming(self._path), open(self._path, "a", newline="") as f:
            for row in rows:
                empty = {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
                self._writer(f).writerow(empty)

    def _writer(self, file: TextIO) -> csv.DictWriter:
        return csv.DictWriter(file, self._names, lineterminator="\n")

    def fail(self, line: str) -> None:
        self.failures.append(line)
        tqdm.write(f"left empty: {line}", file=sys.stderr)

    def column(self, model: str, metric: str) -> np.ndarray:
        """The values of a model, [pictures]."""
        return np.array([row.get(metric, float("nan")) for row in self.found if row["model"] == model])


def draw(source: Source, name: str, lr: np.ndarray, size: tuple[int, int], seed: int, rows: Rows) -> np.ndarray | None:
    """A source's picture [H,W,3] uint8 of this (H, W), or None where it has none."""
    try:
        return source.picture(name, lr, size, seed)
    except (ValueError, RuntimeError, OSError) as error:
        rows.fail(f"{source.name} of {name}: {first_line(error)}")
        return None


@torch.inference_mode()
def score(
    image: str,
    pictures: dict[str, np.ndarray | None],
    hr: np.ndarray | None,
    columns: list[Metric],
    device: torch.device,
    border: int,
    rows: Rows,
) -> None:
    """Add the rows of a picture: of each model, and of the HR picture itself (which has no full-reference scores).

    Args:
        pictures: by row, [H,W,3] uint8.
        border: pixels at each side that full-reference metrics leave out.
    """
    out: dict[str, dict] = {name: {"image": image, "model": name} for name in [*pictures, "hr"]}
    drawn = {name: pixels for name, pixels in {**pictures, "hr": hr}.items() if pixels is not None}
    if hr is not None and 2 * border >= min(hr.shape[:2]):
        rows.fail(f"{image}: a border of {border} pixels leaves nothing of {hr.shape[1]}x{hr.shape[0]} (--crop-border)")
    elif hr is not None:
        target = tensor(hr, device=device)
        inner = (..., slice(border, -border), slice(border, -border)) if border else (...,)
        for metric in columns:
            names = [name for name in drawn if not (metric.reference and name == "hr")]
            x = tensor(*(drawn[name] for name in names), device=device)
            x, y = (x[inner], target[inner]) if metric.reference else (x, target)
            for name, value in zip(names, _values(metric, x, y, names, image, rows)):
                out[name][metric.name] = value
    rows.add([{**dict.fromkeys((m.name for m in columns), float("nan")), **row} for row in out.values()])


def _values(metric: Metric, x: Tensor, y: Tensor, names: list[str], image: str, rows: Rows) -> list[float]:
    """All at once; where that fails, one by one, so that one picture's failure is its own."""
    if not names:
        return []
    try:
        return metric.score(x, y).double().tolist()
    except (ValueError, RuntimeError) as error:
        if len(names) > 1:
            return [_values(metric, x[i : i + 1], y, [name], image, rows)[0] for i, name in enumerate(names)]
        rows.fail(f"{metric.name} of {names[0]} of {image}: {first_line(error)}")
        return [float("nan")]


def tensor(*pictures: np.ndarray, device: torch.device) -> Tensor:
    """[H,W,3] uint8 each -> [M,3,H,W] in [0,1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(device).float() / 255
