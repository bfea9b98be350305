"""The files of an evaluation: CSV, JSON, Markdown, a contact sheet and scatter plots."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engine.io.files import atomic_write
from engine.io.sink import atomic_file
from gdpo.evaluation.columns import Metric
from gdpo.scores.registry import PLACE

_DIGITS = {"ssim_y": 4, "lpips": 4, "dists": 4, "clipiqa": 4, "maniqa": 4, "maniqa-pipal": 4, "vgg": 3}


def write_json(path: Path, content: dict) -> None:
    """Strict JSON: what is not a number becomes null."""

    def clean(value):
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [clean(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    atomic_write(path, json.dumps(clean(content), indent=2, allow_nan=False) + "\n")


def figure(name: str, value: float | None, finer: int = 0) -> str:
    """A number with the digits that its column is quoted with, or so many more."""
    return "" if value is None or math.isnan(value) else f"{value:.{_DIGITS.get(name, 2) + finer}f}"


def _cell(name: str, value: dict | float | None, pictures: int) -> str:
    """A mean, with the number of its pictures where these are not all."""
    if not isinstance(value, dict):
        return figure(name, value)
    some = value.get("pictures", 0)
    return figure(name, value["mean"]) + (f" ({some})" if 0 < some < pictures else "")


def markdown(result: dict, columns: list[Metric]) -> str:
    """The table (means over pictures; arrows point to better), what is missing, diversity and comparison."""
    extra = [n for n in ("fid", "seconds") if any(n in row for row in result["models"].values())]
    arrow = {1: "↑", -1: "↓"}
    titles = [f"{m.name} {arrow[m.better]}" for m in columns] + [f"{n} ↓" for n in extra]
    names = [m.name for m in columns] + extra
    fewer = any(0 < cell.get("pictures", 0) < result["images"] for row in result["models"].values()
                for cell in row.values() if isinstance(cell, dict))  # fmt: skip
    told = "; where only some have a value, their number in brackets" if fewer else ""
    lines = [
        f"Means over {result['images']} pictures{told}. NIQE: model {result['niqe_model']}. Seed {result['seed']}.",
        "",
        "| model | " + " | ".join(titles) + " |",
        "|---|" + "---|" * len(titles),
    ]
    for model, row in result["models"].items():
        lines.append(f"| {model} | " + " | ".join(_cell(n, row.get(n), result["images"]) for n in names) + " |")
    split = {name: reason.partition(PLACE) for name, reason in result["missing"].items()}
    for reason in dict.fromkeys(reason for reason, _, _ in split.values()):
        names = [name for name, parts in split.items() if parts[0] == reason]
        lines += ["", f"Not computed: {', '.join(names)}: {reason}"]
        places = [f"- {name}: {split[name][2]}" for name in names if split[name][2]]
        lines += ["", "Their weights go to", "", *places] if places else []
    if result["diversity"]:
        metrics = [k for k in next(iter(result["diversity"].values())) if k not in ("seeds", "images", "pixels")]
        lines += [
            "",
            "Over seeds (mean ± spread of one picture over its noises; pixels: spread in 8-bit levels):",
            "",
            "| model | seeds | pixels | " + " | ".join(metrics) + " |",
            "|---|---|---|" + "---|" * len(metrics),
        ]
        for model, row in result["diversity"].items():
            cells = [f"{figure(m, row[m]['mean'])} ± {figure(m, row[m]['spread'], finer=1)}" for m in metrics]
            lines.append(f"| {model} | {row['seeds']} | {row['pixels']:.2f} | " + " | ".join(cells) + " |")
    if result["comparison"]:
        c = result["comparison"]
        lines += [
            "",
            f"{c['a']} minus {c['b']}, paired by picture (95% interval, {result['bootstrap']} bootstrap resamples):",
            "",
            f"| metric | difference | interval | {c['a']} wins | {c['a']} is |",
            "|---|---|---|---|---|",
        ]
        for name, d in c["metrics"].items():
            mean, low, high = (figure(name, d[k], finer=1) for k in ("mean", "low", "high"))
            lines.append(f"| {name} | {mean} | [{low}, {high}] | {d['wins']:.0%} | {d['verdict']} |")
    return "\n".join(lines) + "\n"


def best_crop(hr: np.ndarray, size: int) -> tuple[int, int]:
    """Top left of the size x size square with the most structure (mean gradient) in the HR picture."""
    gray = hr.astype(np.float32).mean(2)
    gradient = np.abs(np.diff(gray, axis=0))[:, :-1] + np.abs(np.diff(gray, axis=1))[:-1]
    total = np.pad(gradient.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    h, w = (max(1, n - size) for n in gradient.shape)
    sums = total[size : size + h, size : size + w] - total[:h, size : size + w]
    sums = sums - total[size : size + h, :w] + total[:h, :w] if sums.size else np.zeros((1, 1))
    top, left = np.unravel_index(int(sums.argmax()), sums.shape)
    return int(top), int(left)


def write_sheet(path: Path, rows: list[tuple[str, list[tuple[str, np.ndarray]]]], crop: int, zoom: int) -> None:
    """A row per picture, a column per model: the same crop of each, magnified without smoothing.

    Args:
        rows: (picture's name, [(column, [H,W,3] uint8), ...]); the last column is the HR, which chooses the crop.
    """
    font = ImageFont.load_default(size=14)
    side, bar, gap = crop * zoom, 22, 6
    width = len(rows[0][1]) * (side + gap) - gap
    page = Image.new("RGB", (width, bar + len(rows) * (side + bar + gap)), "white")
    draw = ImageDraw.Draw(page)
    for r, (name, cells) in enumerate(rows):
        y = bar + r * (side + bar + gap)
        top, left = best_crop(cells[-1][1], crop)
        draw.text((2, y), f"{name} at ({left}, {top})", fill="gray", font=font)
        for c, (title, pixels) in enumerate(cells):
            x = c * (side + gap)
            if r == 0:
                draw.text((x + 2, 2), title, fill="black", font=font)
            part = Image.fromarray(np.ascontiguousarray(pixels[top : top + crop, left : left + crop]))
            page.paste(part.resize((part.width * zoom, part.height * zoom), Image.Resampling.NEAREST), (x, y + bar))
    with atomic_file(path) as file:
        page.save(file, "PNG")


def write_scatter(path: Path, a: str, b: str, values: dict[str, tuple[np.ndarray, np.ndarray, int]]) -> None:
    """A panel per metric: each picture at (its value under b, its value under a); the side where a is better is shaded.

    Args:
        values: metric -> (a's values [N], b's values [N], better).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(4, len(values))
    down = -(-len(values) // across)
    plot = Figure(figsize=(3.4 * across, 3.4 * down), layout="constrained")
    FigureCanvasAgg(plot)
    for k, (name, (va, vb, better)) in enumerate(values.items()):
        axes = plot.add_subplot(down, across, k + 1)
        both = np.concatenate([va, vb])
        both = both[np.isfinite(both)]
        low, high = (both.min(), both.max()) if len(both) else (0.0, 1.0)
        margin = 0.05 * (high - low) or 0.5
        ends = [low - margin, high + margin]
        axes.fill_between(ends, ends, ends[1] if better > 0 else ends[0], color="tab:green", alpha=0.08, linewidth=0)
        axes.plot(ends, ends, color="gray", linewidth=0.8)
        axes.scatter(vb, va, s=10)
        axes.set(title=name, xlabel=b, ylabel=a, xlim=ends, ylim=ends)
    with atomic_file(path) as file:
        plot.savefig(file, dpi=110)
