"""A blind choice: RealSR pictures by two networks side by side in random order, for somebody who knows nothing.

    python -m benchmarks.blind make --realsr REALSR --model new=engine/data/tiny --against bicubic --out runs/blind
    python -m benchmarks.blind count runs/blind/new-bicubic LRLLR...     # one letter a sheet: which looks better

`make` writes OUT/NEW-OTHER/01.png, 02.png, ... and key.json, which says what stood where. `count` opens it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.peers import PEERS
from benchmarks.quality import networks
from benchmarks.sheet import most_detail
from engine.io import rows
from engine.io.cli import Parser, run
from engine.io.files import atomic_write
from engine.io.images import Picture, read_srgb, write_image
from engine.runtime.resample import resize
from gdpo.evaluation.sources import parse_source

_SIDE, _ZOOM, _GAP = 224, 3, 24


def make(realsr: Path, model: str, against: str, out: Path, every: int, seed: int) -> None:
    """Write the sheets of one comparison.

    Args:
        realsr: a folder with LR/ and HR/.
        model, against: NAME=FOLDER of a built engine; `against` may also be bicubic or a peer's name.
        every: take every n-th picture.
        seed: of the order of the two.
    """
    if "=" not in against and against != "bicubic" and against not in PEERS:
        raise ValueError(f"against must be NAME=FOLDER, bicubic or one of {', '.join(PEERS)}; got {against!r}")
    models = [model] + ([against] if "=" in against else [])
    nets, _ = networks(models, [against] if against in PEERS else [])
    ours, other = parse_source(model)[0], against.partition("=")[0]
    folder = out / f"{ours}-{other}"
    rng, key = np.random.default_rng(seed), {}
    for number, file in enumerate(sorted((realsr / "LR").glob("*.png"))[::every], start=1):
        lr, hr = read_srgb(file), read_srgb(realsr / "HR" / file.name)
        y, x = most_detail(hr, _SIDE)
        pair = {ours: nets[ours](lr), other: nets[other](lr) if other in nets else resize(lr, hr.shape[:2])}
        order = [ours, other] if rng.random() < 0.5 else [other, ours]
        cuts = [pair[name][y : y + _SIDE, x : x + _SIDE].repeat(_ZOOM, 0).repeat(_ZOOM, 1) for name in order]
        gap = np.full((_SIDE * _ZOOM, _GAP, 3), 255, np.uint8)
        folder.mkdir(parents=True, exist_ok=True)
        write_image(folder / f"{number:02d}.png", Picture(np.concatenate([cuts[0], gap, cuts[1]], axis=1)))
        key[f"{number:02d}"] = {"picture": file.stem, "L": order[0], "R": order[1]}
    atomic_write(folder / "key.json", json.dumps({"ours": ours, "other": other, "sheets": key}, indent=1) + "\n")
    print(f"{folder}: {len(key)} sheets")


def count(folder: Path, answers: str, write_rows: bool) -> None:
    """How often ours was chosen. `answers`: L or R for each sheet in order."""
    key = json.loads((folder / "key.json").read_text())
    sheets = list(key["sheets"].values())
    if len(answers) != len(sheets) or set(answers) - set("LR"):
        raise ValueError(f"answers must be {len(sheets)} letters, L or R; got {answers!r}")
    ours = sum(sheet[answer] == key["ours"] for sheet, answer in zip(sheets, answers))
    print(f"{key['ours']} against {key['other']}: {ours} of {len(sheets)}")
    if write_rows:
        found = {"model": key["ours"], "against": key["other"], "chosen": ours, "of": len(sheets)}
        rows.append_row("blind", **found, answers=answers)


def main() -> None:
    top = Parser(
        prog="python -m benchmarks.blind", description="Make a blind choice between two networks, and count it."
    )
    commands = top.add_subcommands(dest="command")
    p = Parser(description="Write the sheets.")
    p.add_argument("--realsr", required=True, type=Path, metavar="DIR", help="a folder with LR/ and HR/")
    p.add_argument("--model", required=True, metavar="NAME=FOLDER", help="a built engine")
    p.add_argument("--against", required=True, help=f"NAME=FOLDER, bicubic, {', '.join(PEERS)}")
    p.add_argument("--every", type=int, default=5, help="take every n-th picture")
    p.add_argument("--seed", type=int, default=0, help="of the order of the two")
    p.add_argument("--out", required=True, type=Path, metavar="DIR")
    commands.add_subcommand("make", p)
    p = Parser(description="Count the answers.")
    p.add_argument("folder", type=Path, help="what `make` wrote")
    p.add_argument("answers", help="L or R for each sheet, as in LRRL")
    p.add_argument("--write-rows", action="store_true", help="append to benchmarks/results/blind.jsonl")
    commands.add_subcommand("count", p)
    args = top.parse_args()
    own = args[args.command]
    if args.command == "make":
        make(own.realsr, own.model, own.against, own.out, own.every, own.seed)
    else:
        count(own.folder, own.answers, own.write_rows)


if __name__ == "__main__":
    run(main)
