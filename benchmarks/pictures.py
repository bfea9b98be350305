"""What a picture takes from file to file: wall time and peak memory of `python -m engine.upscale`.

python -m benchmarks.pictures                                      # rows of benchmarks/results/pictures.jsonl
python -m benchmarks.pictures --sizes 10000x10000 --formats jpg    # 100 megapixels become 1600
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from engine.io import cli
from engine.io.files import sha256
from engine.io.formats import KINDS
from engine.io.images import Picture, picture_size, write_image
from engine.io.rows import ROOT, append_row, require_clean
from engine.runtime.upscaler import default_model

_SQUARE = 64  # pixels of the pattern


def pattern(height: int, width: int) -> np.ndarray:
    """[H,W,3] uint8 of smooth slopes, edges and grain: no encoder makes it very small, or as large as noise."""
    y, x = np.mgrid[0:_SQUARE, 0:_SQUARE]
    slopes = np.stack([x * 3, y * 3, (x + y) * 2], axis=2)
    edges = 60 * ((x // 16 + y // 16) % 2)[..., None]
    grain = np.random.default_rng(0).integers(-6, 7, (_SQUARE, _SQUARE, 1))
    tile = np.clip(slopes + edges + grain, 0, 255).astype(np.uint8)
    return np.tile(tile, (-(-height // _SQUARE), -(-width // _SQUARE), 1))[:height, :width]


def measure(model: Path, source: Path, target: Path, threads: int) -> dict[str, Any]:
    """Upscale in a process of its own.

    Raises:
        Failed: it did not end well.
    """
    options = ["--model", model, "--threads", str(threads), "--max-pixels", "1000000000", "--no-progress"]
    command = [sys.executable, "-m", "engine.upscale", source, target, *options]
    began = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status != 0:
        raise cli.Failed(f"{target.name}: engine.upscale ended with {os.waitstatus_to_exitcode(status)}")
    height, width = picture_size(target) or (0, 0)
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mib": round(usage.ru_maxrss / 1024),
        "result": f"{width}x{height}",
        "result_mib": round(target.stat().st_size / 2**20, 1),
    }


def main() -> None:
    parser = cli.Parser(prog="python -m benchmarks.pictures", description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["128x128", "1024x768", "4000x3000"], help="WIDTHxHEIGHT")
    parser.add_argument("--formats", nargs="+", choices=KINDS, default=["png", "jpg"], help="of the results")
    parser.add_argument("--model", type=Path, help="an engine folder (default: the bundled model)")
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads")
    parser.add_argument("--dry", action="store_true", help="print, and write no rows")
    options = parser.parse_args()
    if wrong := [size for size in options.sizes if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size)]:
        raise ValueError(f"a size is WIDTHxHEIGHT, such as 1024x768; got {wrong[0]}")
    if not options.dry:
        require_clean()
    model = (options.model or default_model()).resolve()
    identity = sha256(model / "manifest.json")[:12]
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            width, height = map(int, size.split("x"))
            source = Path(folder) / "in.png"
            write_image(source, Picture(pattern(height, width)))
            for kind in options.formats:
                target = Path(folder) / f"out.{kind}"
                figures = measure(model, source, target, options.threads)
                target.unlink()
                print(f"{size} -> {kind}: {figures}", flush=True)
                if not options.dry:
                    what = {"picture": size, "format": kind, "model": identity, "bundled": model == default_model()}
                    append_row("pictures", **what, threads=options.threads, **figures)


if __name__ == "__main__":
    cli.run(main)
