"""The tables of docs/results.md, made from the newest rows: python -m benchmarks.report (--check: are they?).

Each table stands between `<!-- NAME -->` and `<!-- /NAME -->` and is replaced; the words around it are written by hand.
The rows come from benchmarks.quality (quality), gdpo.evaluation.before_after (gain), benchmarks.networks (networks) and
benchmarks.gdpo_ablation (ablation).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from engine.io import rows
from engine.io.cli import Parser, run
from engine.io.files import atomic_write
from engine.runtime.upscaler import BUNDLED_MODELS

DOCUMENT = rows.ROOT / "docs" / "results.md"
Row = dict[str, Any]

_COLUMNS = {  # key -> (heading, digits)
    "psnr_y": ("PSNR-Y", 2),
    "ssim_y": ("SSIM-Y", 3),
    "vgg": ("VGG", 3),
    "niqe": ("NIQE*", 2),
    "piqe": ("PIQE", 1),
    "grid_artefact": ("grid", 3),
    "lattice_artefact": ("dots", 2),
    "flat_hatch": ("hatch", 1),
    "oversharpening": ("oversharpening", 2),
}
_OURS = BUNDLED_MODELS
_FAST = ("tiny", "faithful")
_LABELS = {
    **{model: f"**{model}**" for model in _OURS},
    "hr": "HR",
    "Real-ESRGAN-anime": "animevideov3",
    "GDPO": "the first model",
}
_ALGORITHMS = {"DPO": "Diffusion-DPO", "DP2O": "DP2O-SR", "NFT": "DiffusionNFT"}
_BUNDLED = ["model.pretrained=runs/bundled"]  # what the ablation was told to start from
_FORGOTTEN = {"NAOSD"}  # an earlier model's first stage


def newest(kind: str, **wanted: Any) -> list[Row]:
    """The rows of the last run that wrote such rows: those of the newest commit.

    Raises:
        ValueError: there are none.
    """
    found = [r for r in rows.read_rows(kind) if all(r.get(k) == v for k, v in wanted.items())]
    if not found:
        raise ValueError(f"benchmarks/results/{kind}.jsonl has no row with {wanted or 'anything'}: measure first")
    return [r for r in found if r["commit"] == found[-1]["commit"]]


def quality_rows(name: str) -> dict[str, Row]:
    """Model -> its newest row of one set, of those that saw as many pictures as the last run did."""
    found = rows.read_rows("quality")
    images = newest("quality", set=name)[-1]["images"]
    alike = [r for r in found if r["set"] == name and r["images"] == images and r["model"] not in _FORGOTTEN]
    return {r["model"]: r for r in alike}


def times(name: str) -> dict[str, float]:
    """Model -> seconds a picture of one set, of the last run that measured nothing else."""
    found = [r for r in rows.read_rows("quality_time") if r["set"] == name]
    return {r["model"]: r["seconds"] for r in found if r["commit"] == found[-1]["commit"]}


def quality(name: str) -> str:
    """Every model of one set, side by side."""
    models = quality_rows(name)
    columns = {key: _COLUMNS[key] for key in _COLUMNS if any(key in row for row in models.values())}
    head = ["", "parameters", "seconds", *(heading for heading, _ in columns.values())]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for model, row in models.items():
        size = f"{row['parameters'] / 1e6:.2f} M" if row["parameters"] else ""
        seconds = times(name).get(model) or row["seconds"]
        took = f"{seconds:.2f}" if seconds else ""
        cells = [f"{row[key]:.{digits}f}" if key in row else "" for key, (_, digits) in columns.items()]
        lines.append("| " + " | ".join([_LABELS.get(model, model), size, took, *cells]) + " |")
    return "\n".join(lines)


def targets() -> str:
    """The targets, and what each of the bundled models reaches."""
    real, clean, took = quality_rows("realsr"), quality_rows("bicubic"), times("realsr")
    bicubic, anime = clean["bicubic"], took["Real-ESRGAN-anime"]
    checks: list[tuple[str, Callable[[str], float], int, str, float, tuple[str, ...]]] = [
        ("VGG distance", lambda m: real[m]["vgg"], -1, "at most", 1.86, _OURS),
        ("NIQE*", lambda m: real[m]["niqe"], -1, "at most", 8.2, _OURS),
        ("PIQE", lambda m: real[m]["piqe"], -1, "at most", 62.0, _OURS),
        ("PIQE", lambda m: real[m]["piqe"], 1, "at least", 37.0, _OURS),
        ("PSNR-Y", lambda m: real[m]["psnr_y"], 1, "at least", 26.6, _OURS),
        ("dots, dB", lambda m: real[m]["lattice_artefact"], -1, "at most", 0.6, _OURS),
        ("clean input, PSNR-Y", lambda m: clean[m]["psnr_y"], 1, "bicubic - 0.3", bicubic["psnr_y"] - 0.3, _OURS),
        ("clean input, VGG distance", lambda m: clean[m]["vgg"], -1, "below bicubic", bicubic["vgg"], _OURS),
        ("seconds, 128 -> 512", lambda m: took[m], -1, "at most", 0.10, _FAST),
        ("time against animevideov3", lambda m: took[m] / anime, -1, "at most", 1.0, _FAST),
        ("seconds, 128 -> 512", lambda m: took[m], -1, "at most", 0.8, ("quality",)),
    ]
    lines = ["| |" + "".join(f" {model} | |" for model in _OURS) + " target |", "|---" * (2 * len(_OURS) + 2) + "|"]
    for name, of, sign, words, limit, asked in checks:
        cells = []
        for model in _OURS:
            if model not in asked:
                cells += ["", ""]
                continue
            value = of(model)
            lacking = sign * (limit - value)
            cells += [f"{value:.4g}", "met" if lacking <= 0 else f"missed by {lacking:.3g}"]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {words}: {limit:.4g} |")
    return "\n".join(lines)


def gain() -> str:
    """What GDPO changed on held-out crops."""
    from gdpo.evaluation.before_after import table

    return table(newest("gdpo_gain")[-1]).strip()


def networks() -> str:
    """What GDPO changed in published networks: the newest row of each, and of each that saw noise from the start."""
    found = {(r["network"], r.get("noise")): r for r in rows.read_rows("networks")}
    if not found:
        raise ValueError("benchmarks/results/networks.jsonl has no row: measure first")
    columns = {"reward": ("reward", 2), "brisque": ("BRISQUE", 1)}
    columns |= {key: _COLUMNS[key] for key in ("psnr_y", "lattice_artefact", "oversharpening")}
    head = ["", "parameters", "uses noise by", "steps", "rewards", *(heading for heading, _ in columns.values())]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (name, noise), row in sorted(found.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        cells = [
            "{:.{d}f} → {:.{d}f} ({:+.{d}f}, {:+.{d}f} to {:+.{d}f})".format(
                *(row[f"{key}_{part}"] for part in ("before", "after", "gain", "low", "high")), d=digits
            )
            for key, (_, digits) in columns.items()
        ]
        about = [name, f"{row['parameters'] / 1e6:.2f} M", f"--noise {noise:g}" if noise else "NAOSD"]
        rewards = row.get("rewards", ["psnr_y", "naturalness"])  # the only ones, before rows told them
        about += [str(row["steps"]), ", ".join(rewards)]
        lines.append("| " + " | ".join([*about, *cells]) + " |")
    return "\n".join(lines)


def ablation(told: list[str] | None = None) -> str:
    """Each variant at each checkpoint: the change against the model that all started from.

    Args:
        told: the options that the variants share (--set).
    """
    found = {(r["variant"], r["step"]): r for r in newest("gdpo_ablation", set=told)}.values()
    known = ("reward", "psnr_y", "naturalness", "grid_artefact", "lattice_artefact", "oversharpening")
    keys = [key for key in known if all(f"{key}_gain" in row for row in found)]
    head = ["", "steps", *keys]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in found:
        cells = [f"{row[f'{k}_gain']:+.4f} ± {row[f'{k}_standard_error']:.4f}" for k in keys]
        name = row["variant"] if told is None else _ALGORITHMS.get(row["variant"], row["variant"])
        lines.append(f"| {name} | {row['step']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "realsr": lambda: quality("realsr"),
    "paper": lambda: quality("paper"),
    "bicubic": lambda: quality("bicubic"),
    "targets": targets,
    "gain": gain,
    "networks": networks,
    "ablation": ablation,
    "algorithms": lambda: ablation(_BUNDLED),
}


def filled(text: str) -> str:
    """The document with every table as the rows have it.

    Raises:
        ValueError: a table's place is missing or there twice.
    """
    for name, table in TABLES.items():
        place = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
        if len(place.findall(text)) != 1:
            raise ValueError(f"{DOCUMENT} must hold one <!-- {name} --> ... <!-- /{name} -->")
        text = place.sub(lambda _, table=table: f"\n{table()}\n\n", text)
    return text


def main() -> int:
    p = Parser(prog="python -m benchmarks.report", description=__doc__)
    p.add_argument("--check", action="store_true", help="change nothing; exit 1 if the tables are not the rows'")
    check = p.parse_args().check
    old = DOCUMENT.read_text("utf-8")
    new = filled(old)
    if check:
        print(f"{DOCUMENT.name}: {'as the rows have it' if old == new else 'not what the rows say'}")
        return int(old != new)
    atomic_write(DOCUMENT, new)
    print(f"{DOCUMENT}: {len(TABLES)} tables")
    return 0


if __name__ == "__main__":
    run(main)
