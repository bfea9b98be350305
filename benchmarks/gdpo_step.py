"""Seconds per GDPO step and peak memory: this project's step against the released procedure, in one run.

    python -m benchmarks.gdpo_step [--folder SD_FOLDER | --size small] [--crop 256] [--precision fp32 bf16]
                                   [--variants plain checkpointing reuse-latents compile-frozen] [--alone]

Each procedure runs in a process of its own (on a CPU peak memory is a property of a process), on the same crop of a
real photo, with the same group size, rank and scores. The processes alternate, `--rounds` times, so that a slow minute
of the machine does not fall on one side. A row is written as soon as a variant has run, of all its rounds so far
(`rounds`; the last row counts), so that a time limit loses only what was running; what has rows of this commit, machine
and setting is not measured again. One step is degradation to optimiser step; the first is
not counted, and must give about log 2, the loss of a policy that is its reference. Before, our step with a seeded LoRA
is compared with plain torch in fp32: loss, margin and gradient. A figure of a wrong step is not kept. What fails costs
its own row only; exit code 1 then, and where `--seconds` did not suffice for all rounds.
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
import traceback
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, Literal

from jsonargparse.typing import PositiveFloat, PositiveInt

from engine.io import cli

PROCEDURES = ("released", "ours")
REWARDS = ["psnr_y", "region_detail"]
VARIANTS = ("plain", "checkpointing", "reuse-latents", "compile-frozen")
OURS_ALONE = ("reuse-latents", "compile-frozen")  # the released procedure has no such choice: compared with its plain
# How far the first loss may be from log 2. Equal kernels cancel; on a GPU attention that will need a gradient may take
# another one, and bf16 roundings of 1 in 250 become, over 16384 latents and 6 samples, some 0.2 at beta/2 = 2500.
# A wrong noise or latent is off by hundreds.
TOLERANCE = {"cpu": 2e-3, "cuda": 0.5}
# Of `check`, relative; a wrong sign or factor is 0.5 or more. The margin is a sum that cancels: off by 0.13 in bf16.
LIMITS = {"loss": 0.1, "margin": 0.35, "gradient": 0.3}
# LoRA weights and a beta with which the check has a margin of about 1: neither rounding nor a flat sigmoid.
CHECK_SIZE, CHECK_BETA = 0.05, 20.0
FULL = "out of memory"
MARK = "finished: "  # a line of a worker


def worker(
    procedure: str, variants: list[str], folder: str, crop: int, group: int, precision: str, steps: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run a procedure in this process. Yields (variant, {"seconds", "cpu_seconds": one per counted step, "peak_mib",
    "first_loss"}), or (variant, {"error"}) where it failed."""
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
    for variant in variants:
        found: dict[str, Any]
        try:
            if procedure == "check":
                found = dict(check(folder, precision, min(crop, 128)))
            else:
                found = _steps(procedure, variant, folder, accelerator, crop, group, steps)
        except torch.cuda.OutOfMemoryError as error:
            found = {"error": f"{FULL}: {str(error).split('. ')[0]}"}
        except Exception as error:  # a wrong loss, what a GPU's libraries refuse: not the others' fault
            traceback.print_exc()
            found = {"error": " ".join(str(error).split())[:300] or type(error).__name__}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        yield variant, found


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

    from gdpo.photos.dataset import Batch

    photo = data.astronaut()
    y, x = (step * 37) % (512 - crop + 1), (step * 61) % (512 - crop + 1)
    hr = torch.tensor(photo[y : y + crop, x : x + crop]).permute(2, 0, 1)[None].float() / 255
    return Batch(["astronaut"], None, [step], hr.to(device))


def _released(folder: str, accelerator: Any, crop: int, group: int, variant: str = "plain") -> Any:
    from benchmarks.released_procedure import ReleasedProcedure

    procedure = ReleasedProcedure(folder, accelerator, group=group)
    if variant == "checkpointing":
        procedure.policy.enable_gradient_checkpointing()
    return procedure.step


def _method(folder: str, accelerator: Any, crop: int, group: int, variant: str = "plain", **more: Any) -> Any:
    from gdpo.train.config import GDPOConfig
    from gdpo.train.methods.gdpo import GDPO
    from gdpo.train.options import DataConfig, ModelConfig

    config = GDPOConfig(
        model=ModelConfig(pretrained=folder, gradient_checkpointing=variant == "checkpointing"),
        data=DataConfig(crop_size=crop),
        num_generations=group,
        reward_funcs=REWARDS,
        reuse_latents=variant == "reuse-latents",
        compile_frozen=variant == "compile-frozen",
        mixed_precision=accelerator.mixed_precision,
        **more,
    )
    config.validate()
    return GDPO(config, accelerator)


def _ours(folder: str, accelerator: Any, crop: int, group: int, variant: str = "plain") -> Any:
    import torch

    method = _method(folder, accelerator, crop, group, variant)
    config = method.config
    optimizer = torch.optim.AdamW(method.trained.values(), lr=config.learning_rate)

    def step(batch: Any, number: int) -> float:
        metrics = method.step(batch, number, accelerator.backward)
        torch.nn.utils.clip_grad_norm_(method.trained.values(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(metrics["loss"])

    return step


def check(folder: str, precision: str, crop: int = 128, group: int = 4) -> dict[str, float]:
    """Our step in `precision` with the fused kernels against fp32 with plain torch, the LoRA seeded and not zero.

    Returns:
        Relative errors of loss, margin and the gradient of all of the LoRA (relative L2). The scores are given: with
        G small a rounding could turn their order.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    taken = []
    for kind, backend in (("fp32", "torch"), (precision, "auto")):
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps its first precision
        accelerator = Accelerator(mixed_precision="no" if kind == "fp32" else kind)
        convolutions = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = backend != "torch"
        method = _method(folder, accelerator, crop, group, backend=backend, beta=CHECK_BETA)
        random = torch.Generator().manual_seed(0)
        for name, weight in sorted(method.trained.items()):
            if ".lora_B." in name:
                weight.data.copy_(CHECK_SIZE * torch.randn(weight.shape, generator=random))
        scored, given = method._score, torch.linspace(-1, 3, group, device=accelerator.device)[None]
        method._score = lambda *pictures, scored=scored, given=given: scored(*pictures)._replace(advantage=given)
        metrics = method.step(_batch(crop, 0, accelerator.device), 0, accelerator.backward)
        gradient = torch.cat([method.trained[name].grad.flatten().double() for name in sorted(method.trained)])
        taken.append({"loss": metrics["loss"], "margin": metrics["rewards/margins"], "gradient": gradient.cpu()})
        torch.backends.cudnn.allow_tf32 = convolutions
        del method, scored  # the next one needs the room
    exact, ours = taken
    return {key: float((ours[key] - exact[key]).norm() / exact[key].norm()) for key in exact}


def _spawn(procedure: str, variants: list[str], *setting: object) -> Iterator[tuple[str, dict[str, Any]]]:
    """`worker` in a process of its own: each variant's result as it comes; what else the process says goes to stderr.

    Where one dies (killed, a broken GPU), that is an error of the variant that it was at, and another does the rest.
    """
    left = list(variants)
    while left:
        arguments = json.dumps([procedure, left, *setting])
        command = [sys.executable, "-m", "benchmarks.gdpo_step", "--worker", arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        last = "?"
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                if line.startswith(MARK):
                    variant, run = json.loads(line[len(MARK) :])
                    left.remove(variant)
                    yield variant, run
                elif line.strip():
                    last = line.strip()
                    print(line, end="", file=sys.stderr, flush=True)
        process.wait()
        if left:
            yield left.pop(0), {"error": f"the process failed ({process.returncode}): {last}"}


Runs = dict[tuple[str, str], list[dict[str, Any]]]  # (procedure, variant): one of each round


def compare(
    variants: list[str],
    together: bool,
    rounds: int,
    *setting: object,
    procedures: tuple[str, ...] = PROCEDURES,
    before: Runs | None = None,
    seconds: float = math.inf,
) -> Iterator[tuple[Runs, list[str]]]:
    """Alternating processes; the runs so far, behind each run and each round, and the variants that they were of.
    `setting` is what follows `variants` in `worker`.

    Runs of an earlier call (`before`) are not repeated. No further round is begun past `seconds`, but one.
    """
    own = {"ours": variants, "released": [v for v in dict.fromkeys(["plain", *variants]) if v not in OURS_ALONE]}
    runs: Runs = {(p, v): list((before or {}).get((p, v), [])) for p in procedures for v in own[p]}
    began, done = time.monotonic(), 0
    for round_ in range(rounds):
        missing = {p: [v for v in own[p] if len(runs[p, v]) <= round_ and not _failed(runs[p, v])] for p in procedures}
        if not any(missing.values()):
            continue
        # The next round takes about as long as the one before.
        if done and (elapsed := time.monotonic() - began) + elapsed / done > seconds:
            return
        for name in procedures if round_ % 2 == 0 else procedures[::-1]:
            for some in filter(None, [missing[name]] if together else [[v] for v in missing[name]]):
                for variant, run in _spawn(name, some, *setting):
                    runs[name, variant].append(run)
                    yield runs, [variant]
        done += 1
        yield runs, variants


def _failed(runs: list[dict[str, Any]]) -> bool:
    return any("error" in run for run in runs)


def _earlier(figures: dict[str, Any]) -> Runs:
    """The runs in the newest rows of this commit, machine and setting (the rows' own figures that say what was run)."""
    from engine.io.rows import environment, read_rows

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["commit"], *(row["machine"].get(key) for key in ("gpu", "cpu", "cores"))

    here = place(environment())
    found: Runs = {}
    for row in read_rows("gdpo_step"):
        if place(row) == here and figures.items() <= row.items():
            for name, taken in row.get("runs", {}).items():
                good = [run for run in taken if run.get("error", FULL).startswith(FULL)]
                procedure, _, variant = name.partition(" ")
                found[procedure, variant] = max(good, found.get((procedure, variant), []), key=len)
    return found


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


def _measure(args: Any, folder: str, precision: str, device: str) -> list[str]:
    """Check and measure all variants in a precision, with rows behind each round: what has no figure, and why."""
    from engine.io.rows import append_row

    began = time.monotonic()
    setting = (folder, args.crop, args.group, precision, args.steps)
    what = {
        "model": Path(args.folder).name if args.folder else f"random {args.size}",
        "crop": args.crop,
        "group": args.group,
        "precision": precision,
        "device": device,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "steps": args.steps,
    }
    checked = dict(_spawn("check", ["check"], *setting))["check"]
    wrong = [f"the check of our step, {precision}: {checked['error']}"] if "error" in checked else []
    if bad := [key for key, limit in LIMITS.items() if not checked.get(key, 0.0) <= limit]:
        return [f"{precision}: our step is not that in fp32 ({', '.join(bad)}): {checked}, at most {LIMITS}"]
    procedures = ("ours",) if args.alone else PROCEDURES
    before = {} if args.dry else _earlier(what)
    runs: Runs = {}
    written: dict[str, Runs] = {}
    seconds = args.seconds - (time.monotonic() - began)
    for runs, ran in compare(
        args.variants, args.together, args.rounds, *setting, procedures=procedures, before=before, seconds=seconds
    ):
        for variant in ran:
            pair = (("released", "plain" if variant in OURS_ALONE else variant), ("ours", variant))
            own = {key: list(runs[key]) for key in pair if key in runs}
            if own in (written.get(variant), {key: before.get(key, []) for key in own}):
                continue  # nothing new
            written[variant] = own
            row = what | {"variant": variant, "rounds": min(map(len, own.values())), "check": checked}
            row |= _row(*(_figures(own[key]) if own.get(key) else {} for key in pair))
            print(json.dumps(row), flush=True)
            if not args.dry and any(key.endswith("_p50_s") for key in row):
                append_row("gdpo_step", **row, runs={" ".join(key): taken for key, taken in own.items()})
    for (procedure, variant), taken in runs.items():
        error = _figures(taken).get("error", "") if taken else ""
        if error and not error.startswith(FULL):
            wrong.append(f"{procedure} {variant}, {precision}: {error}")
    rounds = min((len(taken) for taken in runs.values() if not _failed(taken)), default=args.rounds)
    if runs and rounds < args.rounds:
        wrong.append(f"{precision}: round {rounds + 1} was not begun, {args.seconds:g} s would not have sufficed")
    return wrong


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
    parser.add_argument(
        "--seconds", type=PositiveFloat, default=math.inf, help="no round but the first that would end past them"
    )
    parser.add_argument("--variants", type=Literal[VARIANTS], nargs="+", default=["plain"], help="of the step")
    parser.add_argument(
        "--together", action="store_true", help="all variants of a procedure in one process (a GPU's peak can be reset)"
    )
    parser.add_argument("--alone", action="store_true", help="without the released procedure")
    parser.add_argument("--dry", action="store_true", help="print, and write no rows")
    parser.add_argument("--worker", type=str | None, help="used by this command itself")
    args = parser.parse_args()
    if args.worker:
        for finished in worker(*json.loads(args.worker)):
            print(MARK + json.dumps(finished), flush=True)
        return 0
    import torch

    from engine.io.rows import require_clean
    from gdpo.model.random_folder import build_folder

    if not args.dry:
        require_clean()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or str(build_folder(Path(temporary) / args.size, args.size))
        for precision in args.precision:
            wrong += _measure(args, folder, precision, "cuda" if torch.cuda.is_available() else "cpu")
    for line in wrong:
        print(f"no figure: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    cli.run(main)
