"""Crops per second of the degradation, against the same process one image at a time in numpy and OpenCV.

    python -m benchmarks.degradation [--sizes 128 256 512] [--batch 16] [--threads 2] [--device cpu]

Both degrade the same crops of photos with the same drawn parameters, batch after batch in turn, so that a busy machine
disturbs both alike. The figures are medians over batches of other parameters, and the best batch; `cpu_ms` is the time
of all threads together, which a busy machine disturbs least.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict

import cv2
import numpy as np
import torch
from jsonargparse.typing import PositiveInt

from engine.io import cli
from engine.io.rows import append_row, require_clean
from gdpo.degradation import Degradation, DegradationConfig
from gdpo.degradation.draw import draw_sample
from tests.support.degradation_baseline import degrade_one
from tests.support.photos import crops


def measure(size: int, batch: int, repeats: int, device: str) -> dict[str, float]:
    """Milliseconds a batch: ms (median), best_ms and cpu_ms of the batched way, and baseline_... of the other."""
    degrade = Degradation(DegradationConfig())
    hr = crops(batch, size)
    there = hr.to(device)
    images = [np.ascontiguousarray(image) for image in hr.permute(0, 2, 3, 1).numpy()]
    rng = np.random.default_rng(0)

    def batched(samples: range) -> None:
        lr, _ = degrade(there, seed=0, samples=samples)
        lr.sum().item()  # waits for the device

    def one_by_one(samples: range) -> None:
        for image, sample in zip(images, samples):
            degrade_one(image, draw_sample(degrade.recipe, 0, sample), rng)

    walls, cpus = defaultdict(list), defaultdict(list)
    for repeat in range(repeats + 1):
        for name, way in (("", batched), ("baseline_", one_by_one)):
            wall, cpu = time.perf_counter(), time.process_time()
            way(range(repeat * batch, (repeat + 1) * batch))
            if repeat:  # the first is a warm-up
                walls[name].append(1e3 * (time.perf_counter() - wall))
                cpus[name].append(1e3 * (time.process_time() - cpu))
    figures = {f"{name}ms": statistics.median(values) for name, values in walls.items()}
    figures |= {f"{name}best_ms": min(values) for name, values in walls.items()}
    return figures | {f"{name}cpu_ms": statistics.median(values) for name, values in cpus.items()}


def main() -> None:
    parser = cli.Parser(prog="python -m benchmarks.degradation", description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=PositiveInt, nargs="+", default=[128, 256, 512], help="sides of the crops")
    parser.add_argument("--batch", type=PositiveInt, default=16, help="crops at once")
    parser.add_argument("--threads", type=PositiveInt, default=2, help="threads of both ways")
    parser.add_argument("--repeats", type=PositiveInt, default=15, help="batches of each way")
    parser.add_argument("--device", default="cpu", help="device of the batched way")
    parser.add_argument("--dry-run", action="store_true", help="print only; the tree may have changes")
    args = parser.parse_args()
    if not args.dry_run:
        require_clean()
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    for size in args.sizes:
        measured = measure(size, args.batch, args.repeats, args.device)
        figures = {
            "op": "degradation realesrgan",
            "size": f"{args.batch} crops of {size}x{size}",
            "device": args.device,
            "opencv_threads": args.threads,
            "crops_per_s": round(1e3 * args.batch / measured["ms"], 1),
            "baseline_crops_per_s": round(1e3 * args.batch / measured["baseline_ms"], 1),
            "speedup": round(measured["baseline_ms"] / measured["ms"], 2),
            "load_1min": round(os.getloadavg()[0], 1),
        } | {name: round(value, 1) for name, value in measured.items()}
        print(figures, flush=True)
        if not args.dry_run:
            append_row("degradation", **figures)


if __name__ == "__main__":
    cli.run(main)
