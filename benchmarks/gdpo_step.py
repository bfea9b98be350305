"""Seconds per GDPO step and peak memory: this project's step against the released procedure, in one run.

    python -m benchmarks.gdpo_step [--folder SD_FOLDER | --size small] [--crop 256] [--precision fp32 bf16]

Each procedure runs in a process of its own (peak memory is a property of a process), on the same crop of a real photo,
with the same group size, rank and scores. The processes alternate, `--rounds` times, so that a slow minute of the
machine does not fall on one side. One step is degradation to optimiser step; the first of each process is not counted.
Processor seconds are given beside: on a machine that others use they say more than the clock (set OMP_NUM_THREADS=1
there, since threads that wait for each other spin).
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, Literal

from jsonargparse.typing import PositiveInt

from engine import cli

PROCEDURES = ("released", "ours")
REWARDS = ["psnr_y", "region_detail"]


def worker(procedure: str, folder: str, crop: int, group: int, precision: str, steps: int) -> dict[str, Any]:
    """Run one procedure in this process: {"seconds", "cpu_seconds": one per counted step, "peak_mib", "loss"}."""
    import torch
    from accelerate import Accelerator

    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
    run = (_released if procedure == "released" else _ours)(folder, accelerator, crop, group)
    on_gpu = accelerator.device.type == "cuda"
    seconds, cpu_seconds, loss = [], [], 0.0
    for step in range(steps + 1):
        started, cpu_started = time.perf_counter(), time.process_time()
        loss = run(_batch(crop, step, accelerator.device), step)
        if on_gpu:
            torch.cuda.synchronize()
        if step:
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - cpu_started)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": peak / 2**20, "loss": loss}


def _batch(crop: int, step: int, device: Any) -> Any:
    """One crop of a photo, another part at each step."""
    import torch
    from skimage import data

    from gdpo.data import Batch

    photo = data.astronaut()
    y, x = (step * 37) % (512 - crop + 1), (step * 61) % (512 - crop + 1)
    hr = torch.tensor(photo[y : y + crop, x : x + crop]).permute(2, 0, 1)[None].float() / 255
    return Batch(["astronaut"], None, [step], hr.to(device))


def _released(folder: str, accelerator: Any, crop: int, group: int) -> Any:
    from .released_procedure import ReleasedProcedure

    return ReleasedProcedure(folder, accelerator, group=group).step


def _ours(folder: str, accelerator: Any, crop: int, group: int) -> Any:
    import torch

    from gdpo.train.config import DataConfig, GDPOConfig, ModelConfig
    from gdpo.train.gdpo import GDPO

    config = GDPOConfig(
        model=ModelConfig(pretrained=folder),
        data=DataConfig(crop_size=crop),
        num_generations=group,
        reward_funcs=REWARDS,
        mixed_precision=accelerator.mixed_precision,
    )
    config.validate()
    method = GDPO(config, accelerator)
    optimizer = torch.optim.AdamW(method.trained.values(), lr=config.learning_rate)

    def step(batch: Any, number: int) -> float:
        metrics = method.step(batch, number, accelerator.backward)
        torch.nn.utils.clip_grad_norm_(method.trained.values(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(metrics["loss"])

    return step


def _spawn(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gdpo_step", "--worker", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{arguments[0]}: the process failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(folder: str, crop: int, group: int, precision: str, steps: int, rounds: int) -> dict[str, dict[str, float]]:
    """{procedure: {"p50_s", "p50_cpu_s", "peak_mib"}} over alternating processes."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in PROCEDURES}
    for round_ in range(rounds):
        for name in PROCEDURES if round_ % 2 == 0 else PROCEDURES[::-1]:
            runs[name].append(_spawn(name, folder, crop, group, precision, steps))
    return {
        name: {
            "p50_s": round(median(s for run in own for s in run["seconds"]), 4),
            "p50_cpu_s": round(median(s for run in own for s in run["cpu_seconds"]), 4),
            "peak_mib": round(max(run["peak_mib"] for run in own)),
        }
        for name, own in runs.items()
    }


def main() -> None:
    parser = cli.Parser(prog="python -m benchmarks.gdpo_step", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--folder", type=str | None, help="a Stable Diffusion folder; default: random weights of --size"
    )
    parser.add_argument("--size", type=Literal["mini", "small", "sd21"], default="small", help="of the random weights")
    parser.add_argument("--crop", type=PositiveInt, default=256, help="side of the HR crop, at most 512")
    parser.add_argument("--group", type=PositiveInt, default=6, help="samples per picture")
    parser.add_argument("--precision", type=Literal["fp32", "bf16", "fp16"], nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--steps", type=PositiveInt, default=3, help="counted steps of each process")
    parser.add_argument("--rounds", type=PositiveInt, default=2, help="processes of each procedure")
    parser.add_argument("--dry", action="store_true", help="print, and write no rows")
    parser.add_argument("--worker", type=str | None, help="used by this command itself")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(*json.loads(args.worker))))
        return
    import torch

    from .random_folder import build_folder
    from .rows import append_row, require_clean

    if not args.dry:
        require_clean()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or str(build_folder(Path(temporary) / args.size, args.size))
        for precision in args.precision:
            result = compare(folder, args.crop, args.group, precision, args.steps, args.rounds)
            released, ours = result["released"], result["ours"]
            figures = {
                "model": Path(args.folder).name if args.folder else f"random {args.size}",
                "crop": args.crop,
                "group": args.group,
                "precision": precision,
                "device": "cuda" if torch.cuda.is_available() else "cpu",
                "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
                **{f"{name}_{key}": value for name, own in result.items() for key, value in own.items()},
                "speedup": round(released["p50_s"] / ours["p50_s"], 3),
                "speedup_cpu": round(released["p50_cpu_s"] / ours["p50_cpu_s"], 3),
                "memory_ratio": round(released["peak_mib"] / ours["peak_mib"], 3),
            }
            print(json.dumps(figures))
            if not args.dry:
                append_row("gdpo_step", **figures)


if __name__ == "__main__":
    cli.run(main)
