"""The C++ path of engine.Upscaler against Python's: seconds a picture, and the share outside the backend.

    python -m benchmarks.cpp_engine ENGINE_FOLDER [--rounds 9] [--threads 0]

uint8 in and out. Both paths take turns, so that a machine that slows down slows both. `outside_share` is the part of
the C++ path's time that is not spent in the backend: resample, noise, tiles, blending, colours.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from engine import Upscaler
from engine.io import cli
from engine.io.rows import append_row, require_clean
from engine.runtime.core import library

CASES = [  # height and width of the input, options
    ((128, 128), {}),
    ((128, 128), {"color": "adain"}),
    ((256, 384), {"tile": 128}),
    ((512, 768), {}),
]


def photo(height: int, width: int) -> np.ndarray:
    """A crop of a real photo that a package ships, repeated where it is too small."""
    from skimage import data

    picture = data.astronaut()
    return np.tile(picture, (-(-height // 512), -(-width // 512), 1))[:height, :width].copy()


def alternate(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, in turns, after one run of each that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for counted in range(rounds + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if counted:
                times[name].append(time.perf_counter() - begin)
    return times


def main() -> int:
    parser = cli.Parser(prog="python -m benchmarks.cpp_engine", description="The C++ path against Python's.")
    parser.add_argument("engine", help="an engine folder for ONNX Runtime")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--no-rows", action="store_true", help="print only")
    options = parser.parse_args()
    if not options.no_rows:
        require_clean()
    from engine._core import Upscaler as Core

    python = Upscaler.load(options.engine, "onnxruntime", threads=options.threads, core=False)
    core = Core(options.engine, threads=options.threads, library=str(library()))
    weights = hashlib.sha256((Path(options.engine) / "manifest.json").read_bytes()).hexdigest()[:12]
    for (height, width), how in CASES:
        rgb = photo(height, width)
        if not np.array_equal(python.upscale(rgb, **how), core.upscale(rgb, **how)):
            raise RuntimeError(f"the two paths differ on {width}x{height} {how}: no time is worth reporting")
        timings: list[dict[str, float]] = []

        def compiled(rgb=rgb, how=how, timings=timings) -> None:
            timings.append({})
            core.upscale(rgb, timing=timings[-1], **how)

        times = alternate(
            {"python": lambda rgb=rgb, how=how: python.upscale(rgb, **how), "cpp": compiled}, options.rounds
        )
        outside = [1 - t["backend"] / t["total"] for t in timings[1:]]
        row = {
            "what": "cpp_engine",
            "backend": core.backend,
            "backend_version": core.backend_version,
            "manifest_sha256": weights,
            "height": height,
            "width": width,
            "options": how,
            "rounds": options.rounds,
            "python_p50_ms": float(np.median(times["python"])) * 1e3,
            "cpp_p50_ms": float(np.median(times["cpp"])) * 1e3,
            "cpp_over_python": float(np.median(np.divide(times["cpp"], times["python"]))),
            "outside_share": float(np.median(outside)),
            "same_bytes": True,
        }
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        if not options.no_rows:
            append_row("cpp_engine", **row)
    return 0


if __name__ == "__main__":
    cli.run(main)
