"""The parts of benchmarks/gpu.py that no other script has: `python -m benchmarks.gpu_parts PART --cache DIR --out DIR`.

environment   what the machine is, and what it can do at best: bytes per second of a copy, FLOP/s of a bf16 product
model         the folder with random weights that the parts after it run on
tensorrt-rtx  a plan is built where no GPU can be seen, then loaded and run here: a yes or no with the reason
plots         pictures of the rows of this commit (dry: of whatever rows there are)
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from benchmarks import gpu
from engine.io import cli
from engine.io.rows import RESULTS, ROOT, append_row, commit, environment, read_rows

Show = Callable[..., None]


def measure_environment(options: Any, show: Show) -> None:
    """The ceilings that the other figures stand under."""
    import torch

    from benchmarks.kernel_bench import copy_bandwidth

    if not options.dry and not torch.cuda.is_available():
        raise RuntimeError(
            f"torch {torch.__version__} of {sys.executable} sees no GPU: GPU_PYTHON names a python whose does"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = 256 if options.dry else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = [medians(lambda: a @ b, device) for _ in range(2)]
    copies = [copy_bandwidth(device, n if options.dry else None) for _ in range(2)]
    show(
        "gpu_environment",
        device=device,
        capability=list(torch.cuda.get_device_capability()) if device == "cuda" else None,
        product_side=n,
        bf16_flop_per_s=2 * n**3 / min(product),
        rounds_bf16_flop_per_s=[2 * n**3 / s for s in product],
        copy_bytes_per_s=max(copies),
        rounds_copy_bytes_per_s=copies,
    )


def medians(call: Callable[[], object], device: str, runs: int = 15) -> float:
    """Median seconds of a call that ends with the device idle."""
    import torch

    times = []
    for _ in range(runs + 3):
        begin = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[3:])


def make_model(options: Any, show: Show) -> None:
    """sd21 (dry: mini), where it is not there yet."""
    from gdpo.model.random_folder import build_folder

    size: Literal["mini", "sd21"] = "mini" if options.dry else "sd21"
    folder = options.cache / size
    if folder.is_dir():
        print(f"{folder} is there")
        return
    print(build_folder(folder, size))


def try_tensorrt_rtx(options: Any, show: Show) -> None:
    """Export and build in processes that see no GPU; load, compare with torch and time in this one."""
    import numpy as np

    from engine.runtime.backends.tensorrt import load_module
    from gdpo.model.random_folder import build_folder

    try:
        version = load_module("tensorrt-rtx").__version__
    except RuntimeError as error:
        print(error, file=sys.stderr)
        sys.exit(gpu.SKIPPED)
    size: Literal["mini", "small"] = "mini" if options.dry else "small"
    side, precision = (64, "fp16") if options.dry else (512, "bf16")
    work = options.cache / "tensorrt-rtx"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    model = build_folder(work / size, size)
    blind = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    onnx, plan = str(work / "onnx"), str(work / "plan")
    export = ["engine.export", str(model), "--out", onnx, "--precision", precision, "--static", "--tile", str(side)]
    build = ["engine.build", onnx, "--out", plan, "--backend", "tensorrt-rtx"]
    for command in ([*export, "--no-check"], build):
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=blind, check=True)

    from engine.bench import inputs_for
    from engine.runtime.upscaler import Upscaler

    figures: dict[str, Any] = {"version": version, "model": f"random {size}", "side": side, "precision": precision}
    try:  # the answer, whatever it is
        loaded = Upscaler.load(plan, core=False)
        session = loaded.sessions["generator"]
    except (RuntimeError, ValueError, OSError) as error:
        show("tensorrt_rtx", **figures, loads=False, reason=" ".join(str(error).split()))
        return
    inputs = inputs_for(loaded, 1, side)
    try:
        result = np.array(session(inputs))
    except (RuntimeError, OSError) as error:
        show("tensorrt_rtx", **figures, loads=True, runs=False, reason=" ".join(str(error).split()))
        return
    reference = Upscaler.load(model, "torch").sessions["generator"]
    expected = np.array(reference(inputs))
    error = float(np.linalg.norm(result - expected) / np.linalg.norm(expected))
    if not error < 0.05:
        raise RuntimeError(f"the plan runs, but differs from torch by {error:.2g} (relative L2): no figure is taken")
    rounds = [medians(lambda: session(inputs), "cpu", 30) * 1e3 for _ in range(2)]  # a session waits for its result
    show(
        "tensorrt_rtx",
        **figures,
        loads=True,
        runs=True,
        relative_error=error,
        p50_ms=statistics.median(rounds),
        rounds_p50_ms=rounds,
    )


def draw_plots(options: Any, show: Show) -> None:
    """Speed-up of the kernels, times of the step and of inference, from the rows of this commit on this GPU."""
    head, here = commit()[0], environment()["machine"]["gpu"]

    def rows(name: str) -> list[dict[str, Any]]:
        found = read_rows(name)
        return found if options.dry else [r for r in found if (r["commit"], r["machine"]["gpu"]) == (head, here)]

    folder = options.out if options.dry else RESULTS
    pictures = (("kernels", _draw_kernels), ("gdpo_step", _draw_step), ("torch_backend", _draw_inference))
    for name, draw in pictures:
        if found := rows(name):
            path = folder / f"gpu_{name}.png"
            draw(found, path)
            print(path)
        else:
            print(f"no rows of {name} at this commit: no picture")


def _bars(path: Path, title: str, axis: str, bars: dict[str, float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(8, 1 + 0.28 * len(bars)), layout="constrained")
    drawn = panel.barh(list(bars), list(bars.values()))
    panel.bar_label(drawn, fmt="%.3g", padding=2)
    panel.invert_yaxis()
    panel.set(title=title, xlabel=axis)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_kernels(rows: list[dict[str, Any]], path: Path) -> None:
    eager = {_case(r): r["p50_ms"] for r in rows if r["implementation"] == "eager"}
    bars = {
        f"{_case(r)}, {r['implementation']}": eager[_case(r)] / r["p50_ms"]
        for r in rows
        if r["implementation"] != "eager" and _case(r) in eager
    }
    _bars(path, "Kernels against eager torch", "times faster (medians)", bars)


def _case(row: dict[str, Any]) -> str:
    return f"{row['op']} {row['mode']} {'x'.join(map(str, row['size']))} {row['dtype']}"


def _draw_step(rows: list[dict[str, Any]], path: Path) -> None:
    bars = {}
    for row in rows:
        for name in ("released", "ours"):
            if f"{name}_p50_s" in row:
                # gdpo-compiled measures ours alone, plain among them: two bars, not one in place of the other.
                alone = "" if "released_p50_s" in row or "released_error" in row else " (beside compiled)"
                case = f"{row['model']} {row['crop']} {row['precision']} {row.get('variant', 'plain')}{alone}"
                bars[f"{case}, {name}"] = row[f"{name}_p50_s"]
    _bars(path, "One GDPO step", "seconds (medians)", bars)


def _draw_inference(rows: list[dict[str, Any]], path: Path) -> None:
    bars = {}
    for row in sorted(rows, key=lambda row: (row["side"], row["batch"])):
        case = f"{row['side']} pixels, batch {row['batch']}"
        bars[f"{case}, {row['step']}"] = 1e3 / row["pictures_per_s"]
        bars[f"{case}, floor"] = row["floor_ms"] / row["batch"]
    _bars(path, f"Inference, {rows[-1]['model']}", "milliseconds a picture (medians)", bars)


PARTS: dict[str, Callable[[Any, Show], None]] = {
    "environment": measure_environment,
    "model": make_model,
    "tensorrt-rtx": try_tensorrt_rtx,
    "plots": draw_plots,
}


def main() -> None:
    parser = cli.Parser(prog="python -m benchmarks.gpu_parts", description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()

    def show(name: str, **figures: Any) -> None:
        print(f"{name}: " + "  ".join(f"{k} {v}" for k, v in figures.items()))
        if not options.dry:
            append_row(name, **figures)

    PARTS[options.part](options, show)


if __name__ == "__main__":
    cli.run(main)
