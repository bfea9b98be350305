"""A sheet of RealSR cuts side by side, as in the README and docs/results.md.

    python -m benchmarks.sheet --realsr REALSR --model bundled=engine/data/tiny --peers Real-ESRGAN-anime \
        --pictures Nikon_013 Canon_004 --out docs/realsr.jpg

A row is a picture, cut where its HR has most detail; columns are bicubic, the peers, the models and the HR.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.peers import PEERS
from benchmarks.quality import networks
from engine.io.cli import Parser, run
from engine.io.files import atomic_path
from engine.io.images import read_srgb
from engine.runtime.resample import resize

_BORDER, _TITLE = 4, 16


def most_detail(hr: np.ndarray, side: int) -> tuple[int, int]:
    """(y, x) of the side x side window of hr [H,W,3] whose slopes are steepest, in steps of an eighth."""
    gray = hr.astype(np.float32).mean(2)
    slope = np.abs(np.diff(gray, axis=0))[:, :-1] + np.abs(np.diff(gray, axis=1))[:-1]
    step = side // 8
    places = [(y, x) for y in range(0, hr.shape[0] - side, step) for x in range(0, hr.shape[1] - side, step)]
    return max(places, key=lambda p: float(slope[p[0] : p[0] + side, p[1] : p[1] + side].mean()))


def main() -> None:
    p = Parser(prog="python -m benchmarks.sheet", description="Make a sheet of RealSR cuts.")
    p.add_argument("--realsr", required=True, metavar="DIR", help="a folder with LR/ and HR/")
    p.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER", help="a built engine; repeatable")
    p.add_argument("--peers", nargs="*", default=[], choices=list(PEERS), help="published networks")
    p.add_argument("--pictures", nargs="+", required=True, help="how the files' names begin")
    p.add_argument("--side", type=int, default=160, help="side of a cut")
    p.add_argument("--zoom", type=int, default=1, help="pixels are repeated this often")
    p.add_argument("--out", required=True, metavar="FILE")
    args = p.parse_args()
    nets, _ = networks(args.model, args.peers)
    titles, rows = ["bicubic", *nets, "HR"], []
    for start in args.pictures:
        files = sorted((Path(args.realsr) / "LR").glob(f"{start}*.png"))
        if not files:
            raise ValueError(f"{args.realsr}/LR holds no picture whose name begins with {start}")
        lr, hr = read_srgb(files[0]), read_srgb(Path(args.realsr) / "HR" / files[0].name)
        y, x = most_detail(hr, args.side)
        pictures = [resize(lr, hr.shape[:2]), *(net(lr) for net in nets.values()), hr]
        cuts = [picture[y : y + args.side, x : x + args.side] for picture in pictures]
        rows.append([cut.repeat(args.zoom, 0).repeat(args.zoom, 1) for cut in cuts])
    cell = args.side * args.zoom + _BORDER
    sheet = Image.new("RGB", (cell * len(titles) + _BORDER, cell * len(rows) + _BORDER + _TITLE), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((column * cell + _BORDER, 2), title, fill="black")
        for row, cuts in enumerate(rows):
            sheet.paste(Image.fromarray(cuts[column]), (column * cell + _BORDER, row * cell + _BORDER + _TITLE))
    with atomic_path(args.out) as staged:
        sheet.save(staged, format="PNG" if args.out.endswith(".png") else "JPEG", quality=90)
    print(f"{args.out}: {len(rows)} pictures, {', '.join(titles)}")


if __name__ == "__main__":
    run(main)
