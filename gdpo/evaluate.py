"""`python -m gdpo.evaluate --lr DIR --hr DIR [--sr DIR | --model FOLDER]... --out DIR`: scores models and pictures.

Runs the models, scores every picture against its HR, and writes per_image.csv, results.json, table.md, sheet.png, for
two models compare.png, and the models' pictures to the output folder.

`python -m gdpo.evaluate --before-after MODEL` shows what GDPO changed in a model, on held-out crops; it has its
own options (add --help).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.io.cli import Parser, run
from engine.io.files import atomic_write
from engine.io.images import Picture, write_image
from engine.runtime import color
from gdpo.evaluation import before_after, report
from gdpo.evaluation.columns import NAMES, Metric, build_metrics
from gdpo.evaluation.compare import bootstrap, compare
from gdpo.evaluation.score import Rows, draw, score, tensor
from gdpo.evaluation.sources import Source, build_sources, check_pairs, list_pictures, parse_source, read_pair
from gdpo.model.parts import first_line
from gdpo.scores.registry import FID, Unavailable, load_pyiqa

_MAX_CROP = 1024
_SEED_METRICS = ("psnr_y", "ssim_y", "naturalness")  # cheap enough for many noises
_ABOUT = __doc__.split("\n\n")[1]


def parser() -> Parser:
    top = Parser(
        prog="python -m gdpo.evaluate",
        usage="python -m gdpo.evaluate --lr DIR --hr DIR --out DIR [options]\n"
        "       python -m gdpo.evaluate --before-after MODEL [other options; add --help]",
        description=f"Score models and pictures. {_ABOUT}",
    )
    instead = top.add_argument_group("what GDPO changed in a model, with none of the options below")
    instead.add_argument("--before-after", metavar="MODEL", help=f"{before_after.HELP}; it has its own options")
    p = top.add_argument_group("scores of models and pictures")
    p.add_argument("--lr", required=True, metavar="DIR", help="low-resolution pictures")
    p.add_argument("--hr", required=True, metavar="DIR", help="the originals, under the same names")
    for side in ("lr", "hr", "sr"):
        p.add_argument(
            f"--{side}-name", default="{name}", metavar="TEMPLATE",
            help=f"pattern of the file names in --{side}, without suffix, such as {{name}}_{side.upper()}",
        )  # fmt: skip
    p.add_argument("--crop-border", type=int, default=0, help="pixels at each side that full-reference metrics ignore")
    p.add_argument("--sr", action="append", default=[], metavar="[NAME=]DIR", help="finished pictures; repeatable")
    p.add_argument(
        "--model", action="append", default=[], metavar="[NAME=]DIR", help="an engine or generator folder; repeatable"
    )
    p.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    p.add_argument("--metrics", nargs="+", default=list(NAMES), help="columns of the report")
    p.add_argument("--niqe", default="photos", help="NIQE's model: photos, photos-32, or a .mat/.npz file")
    p.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="rows to compare, A minus B (default: the last two rows, the last one as A)",
    )
    p.add_argument("--seed", type=int, default=0, help="random seed of the models' noise and of the bootstrap")
    p.add_argument("--seeds", type=int, default=1, help="noises per picture, to measure the models' diversity")
    p.add_argument("--seed-images", type=int, default=10, help="number of pictures to measure diversity on")
    p.add_argument("--every", type=int, default=1, help="use only every N-th picture")
    p.add_argument(
        "--color",
        default=color.DEFAULT,
        choices=color.METHODS,
        help="how models' colours are matched to the input's",
    )
    p.add_argument("--device", default=None, help="cpu, cuda or cuda:N (default: cuda if available)")
    p.add_argument("--bootstrap", type=int, default=10000, help="number of bootstrap resamples")
    p.add_argument("--sheet-images", type=int, default=10, help="number of pictures on the sheet")
    p.add_argument("--sheet-crop", type=int, default=128, help="side of the crops on the sheet, in HR pixels")
    p.add_argument("--sheet-zoom", type=int, default=2, help="magnification of the crops on the sheet")
    p.add_argument("--no-progress", action="store_true", help="show no progress bar")
    return top


def _device(name: str | None) -> torch.device:
    """The device of that name, or what is there.

    Raises:
        ValueError: no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (index and not index.isdigit())):
        raise ValueError(f"--device must be cpu, cuda or cuda:N; got {name!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here; use cpu")
    return torch.device(name)


def main() -> int:
    if any(word.partition("=")[0] == "--before-after" for word in sys.argv[1:]):
        return before_after.main()
    return evaluate()


def evaluate() -> int:
    """Score pictures and models against HR pictures; 1 if some could not be scored."""
    args = parser().parse_args()
    for name in ("seeds", "seed_images", "every", "bootstrap", "sheet_images", "sheet_crop", "sheet_zoom"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(args, name)}")
    if args.sheet_crop > _MAX_CROP:
        raise ValueError(f"--sheet-crop must be at most {_MAX_CROP}; got {args.sheet_crop}")
    if not 0 <= args.seed < 1 << 63:
        raise ValueError(f"--seed must be in [0, 2^63); got {args.seed}")
    if args.crop_border < 0:
        raise ValueError(f"--crop-border must be at least 0; got {args.crop_border}")
    device = _device(args.device)
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, or not exist yet; {out} is a file")
    for folder in (args.lr, args.hr, *(parse_source(text)[1] for text in [*args.sr, *args.model])):
        if out.resolve() == Path(folder).resolve():
            raise ValueError(f"--out {out} is one of the folders that are read; choose another for the results")
    hr, lr = list_pictures(Path(args.hr), args.hr_name), list_pictures(Path(args.lr), args.lr_name)
    check_pairs(list(hr), Path(args.lr), lr)
    names = sorted(hr)[:: args.every]
    sources = build_sources(args.sr, args.model, list(hr), args.device, args.color, args.sr_name)
    rows = [s.name for s in sources]
    pair = args.compare or (rows[:-3:-1] if len(rows) > 2 else [])
    if unknown := [n for n in pair if n not in rows]:
        raise ValueError(f"--compare names {unknown[0]!r}; rows are {', '.join(rows)}")
    columns, missing = build_metrics(args.metrics, args.niqe, device)
    out.mkdir(parents=True, exist_ok=True)

    shown = {names[i] for i in np.linspace(0, len(names) - 1, min(args.sheet_images, len(names))).astype(int)}
    kept = Rows(out / "per_image.csv", columns)
    sheet: list[tuple[str, list[tuple[str, np.ndarray]]]] = []
    whole: list[str] = []  # pictures that every source has
    for name in tqdm(names, desc="pictures", disable=args.no_progress):
        pictures: dict[str, np.ndarray | None] = dict.fromkeys(rows)
        target = None
        try:
            small, target = read_pair(lr[name], hr[name])
        except (ValueError, OSError) as error:
            kept.fail(first_line(error))
        else:
            for source in sources:
                drawn = pictures[source.name] = draw(source, name, small, target.shape[:2], args.seed, kept)
                if drawn is not None and (source.seeded or source.name == "bicubic"):
                    _save(drawn, out / "pictures" / source.name / f"{name}.png")
        score(name, pictures, target, columns, device, args.crop_border, kept)
        cells = [(row, drawn) for row, drawn in [*pictures.items(), ("hr", target)] if drawn is not None]
        if len(cells) == len(rows) + 1:
            whole.append(name)
            if name in shown:
                sheet.append((name, cells))
    for row in rows:
        if not any(np.isfinite(kept.column(row, m.name)).any() for m in columns) and columns and kept.failures:
            raise ValueError(f"no picture of {row} could be scored; the first reason: {kept.failures[0]}")

    result = {
        "images": len(names),
        "crop_border": args.crop_border,
        "failures": kept.failures,
        "seed": args.seed,
        "niqe_model": Path(args.niqe).stem if Path(args.niqe).suffix else args.niqe,
        "bootstrap": args.bootstrap,
        "models": _means([*rows, "hr"], kept, columns, args.bootstrap, args.seed),
        "missing": missing,
        "diversity": _diversity(sources, whole, lr, hr, columns, device, args) if args.seeds > 1 and whole else {},
        "comparison": {},
    }
    for source in sources:
        if source.seconds:
            result["models"][source.name]["seconds"] = float(np.median(source.seconds))
    if "fid" in args.metrics:
        _fid(result, sources, Path(args.hr), out, device, args.every)
    if pair:
        a, b = pair
        values = {m.name: (kept.column(a, m.name), kept.column(b, m.name), m.better) for m in columns}
        compared = {n: compare(*v, args.bootstrap, args.seed) for n, v in values.items()}
        result["comparison"] = {"a": pair[0], "b": pair[1], "metrics": compared}
        report.write_scatter(out / "compare.png", pair[0], pair[1], values)
    report.write_json(out / "results.json", result)
    if sheet:
        report.write_sheet(out / "sheet.png", sheet, args.sheet_crop, args.sheet_zoom)
    table = report.markdown(result, columns)
    atomic_write(out / "table.md", table)
    print(table, end="")
    written = sorted(p.name for p in out.iterdir() if p.is_file())
    print(f"{out}: {', '.join(written)}", file=sys.stderr)
    if kept.failures:
        print(f"{len(kept.failures)} failure(s) left cells empty; they are in results.json", file=sys.stderr)
    return int(bool(kept.failures))


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, Picture(pixels))


def _means(rows: list[str], kept: Rows, columns: list[Metric], rounds: int, seed: int) -> dict:
    out: dict[str, dict] = {}
    for name in rows:
        out[name] = {}
        for metric in columns:
            if name == "hr" and metric.reference:
                continue
            values = kept.column(name, metric.name)
            mean, low, high = bootstrap(values, rounds, seed)
            pictures = int(np.isfinite(values).sum())
            out[name][metric.name] = {"mean": mean, "low": low, "high": high, "pictures": pictures}
    return out


@torch.inference_mode()
def _diversity(
    sources: list[Source], names: list[str], lr: dict, hr: dict, columns: list[Metric], device, args
) -> dict:
    """What a model makes of other noises: mean and spread (standard deviation) per picture, averaged over pictures."""
    chosen = [names[i] for i in np.linspace(0, len(names) - 1, min(args.seed_images, len(names))).astype(int)]
    metrics = [m for m in columns if m.name in _SEED_METRICS]
    out: dict[str, dict] = {}
    for source in (s for s in sources if s.seeded):
        timed, pixels = len(source.seconds), []
        scores: dict[str, list[np.ndarray]] = {m.name: [] for m in metrics}
        for name in tqdm(chosen, desc=f"seeds of {source.name}", disable=args.no_progress):
            small, target = read_pair(lr[name], hr[name])
            size = target.shape[:2]
            pictures = [source.picture(name, small, size, args.seed + k) for k in range(args.seeds)]
            pixels.append(np.stack(pictures).astype(np.float32).std(0, ddof=1).mean())
            x, y = tensor(*pictures, device=device), tensor(target, device=device)
            for metric in metrics:
                scores[metric.name].append(metric.score(x, y).double().cpu().numpy())
        del source.seconds[timed:]
        row = {"seeds": args.seeds, "images": len(chosen), "pixels": float(np.mean(pixels))}
        for name, values in scores.items():
            table = np.array(values)
            row[name] = {"mean": float(table.mean()), "spread": float(table.std(1, ddof=1).mean())}
        out[source.name] = row
    return out


def _fid(result: dict, sources: list[Source], hr: Path, out: Path, device: torch.device, every: int) -> None:
    """FID of each model's folder against the HR folder, through pyiqa."""
    if every > 1:
        result["missing"]["fid"] = "it compares whole folders; leave --every out"
        return
    try:
        fid = load_pyiqa(FID, device)
    except Unavailable as error:
        result["missing"]["fid"] = str(error)
        return
    for source in sources:
        pictures = getattr(source, "pictures", None)
        folder = next(iter(pictures.values())).parent if pictures else out / "pictures" / source.name
        try:
            result["models"][source.name]["fid"] = float(fid(str(folder), str(hr), verbose=False))
        except Exception as error:  # of another project; what has been scored so far is worth keeping
            result["missing"]["fid"] = f"pyiqa failed on {folder} ({type(error).__name__}: {error})"
            return


if __name__ == "__main__":
    run(main)
