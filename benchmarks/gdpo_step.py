"""Seconds per GDPO step and peak memory: this project's step against the released procedure, in one run.

    python -m benchmarks.gdpo_step [--folder SD_FOLDER | --size small] [--crop 256] [--precision fp32 bf16]
                                   [--variants plain checkpointing reuse-latents compile-frozen] [--alone]

Each procedure runs in a process of its own (on a CPU peak memory is a property of a process), on the same crop of a
real photo, with the same group size, rank and scores. The processes alternate, `--rounds` times, so that a slow minute
of the machine does not fall on one side. One step is degradation to optimiser step; the first is not counted, and must
give log 2, the loss of a policy that is its reference: a figure of a wrong step is not kept. What fails costs its own
row only; exit code 1 then.
Processor seconds are given beside: on a machine that others use they say more than the clock (set OMP_NUM_THREADS=1
there, since threads that wait for each other spin).
"""

from __future__ import annotations

import gc
import json
import math
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
VARIANTS = ("plain", "checkpointing", "reuse-latents", "compile-frozen")
OURS_ALONE = ("reuse-latents", "compile-frozen")  # the released procedure has no such choice: compared with its plain
# How far the first loss may be from log 2. Equal kernels cancel; on a GPU attention that will need a gradient may take
# another one, whose roundings beta/2 = 2500 magnifies. A wrong noise, latent or adapter is off by far more.
TOLERANCE = {"cpu": 2e-3, "cuda": 0.05}
FULL = "out of memory"


def worker(
    procedure: str, variants: list[str], folder: str, crop: int, group: int, precision: str, steps: int
) -> dict[str, dict[str, Any]]:
    """Run a procedure in this process: {variant: {"seconds", "cpu_seconds": one per counted step, "peak_mib",
    "first_loss"}}, or {variant: {"error"}} where it failed."""
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
    found: dict[str, dict[str, Any]] = {}
    for variant in variants:
        try:
            found[variant] = _steps(procedure, variant, folder, accelerator, crop, group, steps)
        except torch.cuda.OutOfMemoryError as error:
            found[variant] = {"error": f"{FULL}: {str(error).split('. ')[0]}"}
        except RuntimeError as error:  # a wrong loss, or what a GPU's libraries refuse
            found[variant] = {"error": " ".join(str(error).split())[:300] or type(error).__name__}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found


def _steps(
    procedure: str, variant: str, folder: str, accelerator: Any, crop: int, group: int, steps: int
) -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    on_gpu = accelerator.device.type == "cuda"
    if on_gpu:
        if (left := torch.cuda.memory_allocated() >> 20) > 512:
            raise RuntimeError(f"{left} MiB are still held by the variant before {variant}: its peak would be wrong")
        torch.cuda.reset_peak_memory_stats()
    run = (_released if procedure == "released" else _ours)(folder, accelerator, crop, group, variant)
    seconds, cpu_seconds, first_loss = [], [], 0.0
    for step in range(steps + 1):
        batch = _batch(crop, step, accelerator.device)  # reading a file is no part of a step
        if on_gpu:
            torch.cuda.synchronize()
        started, cpu_started = time.perf_counter(), time.process_time()
        loss = run(batch, step)
        if on_gpu:
            torch.cuda.synchronize()
        if step:
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - cpu_started)
        elif not abs((first_loss := loss) - math.log(2)) < TOLERANCE[accelerator.device.type]:
            raise RuntimeError(f"{procedure} {variant}: the first loss is {loss:.4f}, not log 2: no figure is taken")
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": peak / 2**20, "first_loss": first_loss}


def _batch(crop: int, step: int, device: Any) -> Any:
    """One crop of a photo, another part at each step."""
    import torch
    from skimage import data

    from gdpo.data import Batch

    photo = data.astronaut()
    y, x = (step * 37) % (512 - crop + 1), (step * 61) % (512 - crop + 1)
    hr = torch.tensor(photo[y : y + crop, x : x + crop]).permute(2, 0, 1)[None].float() / 255
    return Batch(["astronaut"], None, [step], hr.to(device))


def _released(folder: str, accelerator: Any, crop: int, group: int, variant: str = "plain") -> Any:
    from .released_procedure import ReleasedProcedure

    procedure = ReleasedProcedure(folder, accelerator, group=group)
    if variant == "checkpointing":
        procedure.policy.enable_gradient_checkpointing()
    return procedure.step


def _ours(folder: str, accelerator: Any, crop: int, group: int, variant: str = "plain") -> Any:
    import torch

    from gdpo.train.config import DataConfig, GDPOConfig, ModelConfig
    from gdpo.train.gdpo import GDPO

    config = GDPOConfig(
        model=ModelConfig(pretrained=folder, gradient_checkpointing=variant == "checkpointing"),
        data=DataConfig(crop_size=crop),
        num_generations=group,
        reward_funcs=REWARDS,
        reuse_latents=variant == "reuse-latents",
        compile_frozen=variant == "compile-frozen",
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


def _spawn(procedure: str, variants: list[str], *setting: object) -> dict[str, dict[str, Any]]:
    """`worker` in a process of its own; one that dies (a killed process, a broken GPU) is an error of its variants."""
    arguments = json.dumps([procedure, variants, *setting])
    command = [sys.executable, "-m", "benchmarks.gdpo_step", "--worker", arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["?"])[-1]
        print(done.stderr[-4000:], file=sys.stderr)
        return {variant: {"error": f"the process failed ({done.returncode}): {last}"} for variant in variants}
    return json.loads(done.stdout.splitlines()[-1])


def compare(
    variants: list[str], together: bool, rounds: int, *setting: object, procedures: tuple[str, ...] = PROCEDURES
) -> dict[tuple[str, str], dict[str, Any]]:
    """{(procedure, variant): figures} over alternating processes; `setting` is what follows `variants` in `worker`."""
    own = {"ours": variants, "released": [v for v in dict.fromkeys(["plain", *variants]) if v not in OURS_ALONE]}
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {(p, v): [] for p in procedures for v in own[p]}
    for round_ in range(rounds):
        for name in procedures if round_ % 2 == 0 else procedures[::-1]:
            for some in [own[name]] if together else [[v] for v in own[name]]:
                for variant, run in _spawn(name, some, *setting).items():
                    runs[name, variant].append(run)
    return {key: _figures(taken) for key, taken in runs.items()}


def _figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all steps of all processes, the median of each process as the spread, the highest peak,
    the first loss that is farthest from log 2."""
    if errors := [run["error"] for run in runs if "error" in run]:
        return {"error": errors[0]}
    return {
        "p50_s": round(median(s for run in runs for s in run["seconds"]), 4),
        "rounds_p50_s": [round(median(run["seconds"]), 4) for run in runs],
        "p50_cpu_s": round(median(s for run in runs for s in run["cpu_seconds"]), 4),
        "peak_mib": round(max(run["peak_mib"] for run in runs)),
        "first_loss": max((run["first_loss"] for run in runs), key=lambda loss: abs(loss - math.log(2))),
    }


def _row(released: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Both procedures' figures side by side, and their ratios where both ran."""
    row = {f"{name}_{k}": v for name, own in (("released", released), ("ours", ours)) for k, v in own.items()}
    for name, key in (("speedup", "p50_s"), ("speedup_cpu", "p50_cpu_s"), ("memory_ratio", "peak_mib")):
        if key in released and key in ours:
            row[name] = round(released[key] / ours[key], 3)
    return row


def main() -> int:
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
    parser.add_argument("--variants", type=Literal[VARIANTS], nargs="+", default=["plain"], help="of the step")
    parser.add_argument(
        "--together", action="store_true", help="all variants of a procedure in one process (a GPU's peak can be reset)"
    )
    parser.add_argument("--alone", action="store_true", help="without the released procedure")
    parser.add_argument("--dry", action="store_true", help="print, and write no rows")
    parser.add_argument("--worker", type=str | None, help="used by this command itself")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(*json.loads(args.worker))))
        return 0
    import torch

    from .random_folder import build_folder
    from .rows import append_row, require_clean

    if not args.dry:
        require_clean()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or str(build_folder(Path(temporary) / args.size, args.size))
        for precision in args.precision:
            setting = (folder, args.crop, args.group, precision, args.steps)
            procedures = ("ours",) if args.alone else PROCEDURES
            found = compare(args.variants, args.together, args.rounds, *setting, procedures=procedures)
            errors = {f"{p} {v}, {precision}": figures.get("error", "") for (p, v), figures in found.items()}
            wrong += [f"{key}: {error}" for key, error in errors.items() if error and not error.startswith(FULL)]
            for variant in args.variants:
                figures = {
                    "model": Path(args.folder).name if args.folder else f"random {args.size}",
                    "variant": variant,
                    "crop": args.crop,
                    "group": args.group,
                    "precision": precision,
                    "device": "cuda" if torch.cuda.is_available() else "cpu",
                    "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
                    **_row(
                        found.get(("released", "plain" if variant in OURS_ALONE else variant), {}),
                        found["ours", variant],
                    ),
                }
                print(json.dumps(figures), flush=True)
                if not args.dry and any(key.endswith("_p50_s") for key in figures):
                    append_row("gdpo_step", **figures)
    for line in wrong:
        print(f"no figure: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    cli.run(main)
