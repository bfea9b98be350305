"""Before/after sheets and training curves, as PNG; `gdpo.evaluate` draws its own in gdpo.evaluation.report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from engine.io.sink import atomic_file

_BAR = 18


def sheet(columns: list[tuple[str, torch.Tensor]], path: Path) -> Image.Image:
    """Write a sheet, and return it: a row per picture, a titled column per version.

    Args:
        columns: (title, images [B,3,H,W] in [-1,1]), all of one shape.
    """
    first = columns[0][1]
    b, _, h, w = first.shape
    page = Image.new("RGB", (len(columns) * (w + 4) - 4, b * (h + 4) + _BAR - 4), "white")
    draw = ImageDraw.Draw(page)
    for x, (title, images) in enumerate(columns):
        draw.text((x * (w + 4) + 2, 3), title, fill="black")
        pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for y in range(b):
            page.paste(Image.fromarray(pixels[y]), (x * (w + 4), y * (h + 4) + _BAR))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        page.save(file, "PNG")
    return page


def read_metrics(path: Path) -> list[dict]:
    """Rows of metrics.jsonl; a line cut by a kill, or that is none of a step, is left out."""
    rows = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def curves(metrics: Path, path: Path) -> None:
    """Draw every metric of metrics.jsonl over the steps, with a running mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    hidden = {"step", "step_time", "learning_rate"}
    first = ("loss", "reward", "advantage")
    names = sorted({k for r in rows for k in r} - hidden, key=lambda k: (*(not k.startswith(f) for f in first), k))
    if not names:
        return
    across = min(3, len(names))
    down = -(-len(names) // across)
    wide, high = 5 * across, 3 * down
    figure = Figure(figsize=(wide, high))  # margins by hand: the automatic layouts draw everything twice
    FigureCanvasAgg(figure)
    figure.subplots_adjust(0.9 / wide, 0.5 / high, 1 - 0.2 / wide, 1 - 0.3 / high, wspace=0.26, hspace=0.3)
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(down, across, place)
        points = [(r["step"], r[name]) for r in rows if name in r]
        x, y = np.array([p[0] for p in points]), np.array([p[1] for p in points], float)
        axes.plot(x, y, color="0.75", linewidth=0.8, marker="." if len(x) == 1 else None)
        window = max(1, len(y) // 25)
        if window > 1:
            smooth = np.convolve(y, np.ones(window) / window, mode="valid")
            axes.plot(x[window - 1 :], smooth, color="C0")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.locator_params(nbins=4)
    with atomic_file(path) as file:
        figure.savefig(file, dpi=90)
