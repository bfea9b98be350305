"""What engine.bulk costs beside the pictures: over a plain loop, and for very many keys.

    python -m benchmarks.bulk overhead [--pictures 60] [--rounds 3] [--side 160] [--dry]
    python -m benchmarks.bulk keys [--count 100000] [--workers 2] [--dry]

`overhead`: the same pictures by a plain loop and by `engine.bulk.run` with one process, which take turns, with the same
bytes. Compared is the time from the first result to the last one; what is before and after (Ray, the model, the
ledger) is reported beside it. `keys`: a stand-in for the model that returns at once, and a folder of that many empty
files: listing, the run, the ledger, and the command again when nothing is left to do. Prints seconds and the peak
memory of this process; appends a row to benchmarks/results/bulk.jsonl. `--dry`: no row.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from skimage import data

from engine.bulk.cluster import Machines
from engine.bulk.enlarger import Enlarger, Work
from engine.bulk.keys import source_of
from engine.bulk.ledger import COLUMNS, STATE, Row
from engine.bulk.run import run
from engine.bulk.storage import Storage
from engine.io import cli
from engine.io.files import sha256
from engine.io.images import read_image
from engine.io.rows import append_row, require_clean
from engine.runtime.upscaler import default_model
from engine.settings import Settings
from engine.worker import model_identity


class StandIn(Enlarger):
    """Makes nothing, at once."""

    def __init__(self, work: Work, board: Any):
        self._work, self._board = work, board

    def make(self, key: str) -> Row:
        return dict.fromkeys(COLUMNS) | {"key": key, "output": key, "status": "done", "sha256": "0" * 64, "size": 0}


def work(source: Path, out: Path) -> Work:
    identity = model_identity(default_model())
    return Work(str(source), str(out), Settings(), identity=identity, load={"threads": 1})


def bulk(source: Path, out: Path, workers: int, **options: Any) -> float:
    begin = time.perf_counter()
    summary = run(work(source, out), source_of(str(source))[1], Machines(workers=workers), quiet=True, **options)
    if summary["failed"]:
        raise RuntimeError(f"{summary['failed']} failed: {summary['failures'][0]}")
    return time.perf_counter() - begin


def loop(source: Path, out: Path) -> float:
    begin, job = time.perf_counter(), work(source, out)
    up = job.open()
    out.mkdir()
    for path in sorted(source.iterdir()):
        job.settings.make(up, read_image(path), out / path.name)
    return time.perf_counter() - begin


def crops(folder: Path, count: int, side: int) -> Path:
    folder.mkdir()
    photo, rng = data.astronaut(), np.random.default_rng(0)
    for i in range(count):
        y, x = rng.integers(0, 512 - side, 2)
        Image.fromarray(photo[y : y + side, x : x + side]).save(folder / f"{i:05}.png")
    return folder


def span(out: Path) -> float:
    """Seconds from the first result to the last one."""
    times = [path.stat().st_mtime_ns for path in out.glob("*.png")]
    return (max(times) - min(times)) / 1e9


def overhead(root: Path, pictures: int, rounds: int, side: int) -> dict[str, Any]:
    source = crops(root / "in", pictures // rounds, side)
    loops, bulks, around = [], [], []
    for number in range(rounds):
        plain, ray = root / f"loop-{number}", root / f"bulk-{number}"
        loop(source, plain)
        seconds = bulk(source, ray, 1)
        loops.append(span(plain))
        bulks.append(span(ray))
        around.append(seconds - bulks[-1])
        for path in source.iterdir():
            if sha256(plain / path.name) != sha256(ray / path.name):
                raise RuntimeError(f"{path.name}: the bytes differ")
    intervals = rounds * (pictures // rounds - 1)
    return {
        "pictures": intervals + rounds, "side": side, "rounds": rounds, "picture_s": sum(loops) / intervals,
        "overhead": sum(bulks) / sum(loops) - 1, "overheads": [b / a - 1 for a, b in zip(loops, bulks)],
        "start_and_end_s": statistics.median(around), "same_bytes": True,
    }  # fmt: skip


def keys(root: Path, count: int, workers: int) -> dict[str, Any]:
    source, out = root / "in", root / "out"
    for i in range(count):
        if i % 1000 == 0:
            folder = source / f"{i // 1000:05}"
            folder.mkdir(parents=True)
        (folder / f"{i:08}.png").touch()
    before, begin = peak(), time.perf_counter()
    listed = sum(1 for _ in source_of(str(source))[1](Storage(str(out))))
    listing, after = time.perf_counter() - begin, peak()
    first = bulk(source, out, workers, enlarger=StandIn)
    size = sum(path.stat().st_size for path in (out / STATE / "ledger").iterdir())
    again = bulk(source, out, workers, enlarger=StandIn)
    return {
        "keys": listed, "workers": workers, "listing_s": listing, "run_s": first, "again_s": again,
        "ledger_bytes_per_key": size / count, "before_mib": before, "listing_mib": after, "peak_mib": peak(),
    }  # fmt: skip


def peak() -> float:
    """This process's peak memory in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    p = cli.Parser(prog="python -m benchmarks.bulk", description=__doc__.partition("\n")[0])
    p.add_argument("what", choices=("overhead", "keys"), help="what to measure")
    p.add_argument("--pictures", type=int, default=60, help="number of pictures, of all rounds")
    p.add_argument("--rounds", type=int, default=3, help="turns of each")
    p.add_argument("--side", type=int, default=160, help="side of a picture in pixels; choose it for one second each")
    p.add_argument("--count", type=int, default=100_000, help="number of keys")
    p.add_argument("--workers", type=int, default=2, help="processes of the stand-in")
    p.add_argument("--dry", action="store_true", help="no row")
    options = p.parse_args()
    if options.pictures < 2 * options.rounds or options.rounds < 1:
        raise ValueError(f"{options.rounds} rounds need at least two pictures each; got {options.pictures}")
    if not options.dry:
        require_clean()
    with tempfile.TemporaryDirectory(prefix="gdpo-bulk-") as folder:
        if options.what == "overhead":
            figures = overhead(Path(folder), options.pictures, options.rounds, options.side)
        else:
            figures = keys(Path(folder), options.count, options.workers)
    for name, value in figures.items():
        print(f"{name:22} {value:.3f}" if isinstance(value, float) else f"{name:22} {value}")
    if not options.dry:
        print(f"row: {append_row('bulk', what=options.what, **figures)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
