"""One picture on the CPU, this checkout against another: both in one run, taking turns.

    git worktree add ../before COMMIT
    python -m benchmarks.before_after --tree ../before [--size small] [--side 256] [--rounds 7]

The generator has random weights in Stable Diffusion's shape. Backends: torch in fp32 and bf16 as it is made fast, and
ONNX Runtime on the exported graph. A row of benchmarks/results/before_after.jsonl each: medians of CPU seconds on one
thread, and their ratio.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import IO, Literal

from jsonargparse.typing import PositiveInt

from engine.io import cli
from engine.io.rows import ROOT, append_row, commit, require_clean
from gdpo.model.random_folder import build_folder

BACKENDS = ("torch", "torch-bf16", "onnxruntime")
# Runs in either checkout: loads, then computes a picture for every line that it reads, and prints its CPU seconds.
WORKER = """
import sys, time, tempfile
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from gdpo.generator import OneStepGenerator
backend, folder, side = sys.argv[1], sys.argv[2], int(sys.argv[3])
generator = OneStepGenerator.from_pretrained(folder)
image, noise = torch.rand(1, 3, side, side) * 2 - 1, torch.randn(1, 4, side // 8, side // 8)
inputs = {"image": image.numpy(), "noise": noise.numpy()}
if backend == "onnxruntime":
    from engine.export.generator import export_generator
    from engine.runtime.upscaler import Upscaler
    out = Path(tempfile.mkdtemp()) / "onnx"
    export_generator(generator, out, check=False)
    session = Upscaler.load(out, "onnx", threads=1, core=False).sessions["generator"]
else:
    from engine.export.optimise import fastest
    from engine.export.torch_backend import from_generator
    precision = "bf16" if backend == "torch-bf16" else "fp32"
    steps = replace(fastest(torch.device("cpu")), precision=precision)
    session = from_generator(generator, "cpu", steps=steps)[1]
session(inputs)
print("ready", flush=True)
for _ in sys.stdin:
    begin = time.process_time()
    session(inputs)
    print(time.process_time() - begin, flush=True)
"""


def _start(tree: Path, backend: str, folder: Path, side: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, backend, str(folder), str(side)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    surroundings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    return subprocess.Popen(command, cwd=tree, env=surroundings, **pipes)  # type: ignore[call-overload]


def _line(stream: IO[str] | None) -> str:
    assert stream is not None  # it was made a pipe
    if line := stream.readline():
        return line
    raise RuntimeError("a checkout's process ended; its message is above")


def _seconds(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return float(_line(process.stdout))


def main() -> int:
    parser = cli.Parser(prog="python -m benchmarks.before_after", description=__doc__.split("\n")[0])
    parser.add_argument("--tree", type=Path, required=True, help="the other checkout")
    parser.add_argument("--size", type=Literal["mini", "small"], default="small", help="of the random generator")
    parser.add_argument("--side", type=PositiveInt, default=256, help="of the output")
    parser.add_argument("--rounds", type=PositiveInt, default=7, help="pictures of each checkout")
    parser.add_argument("--backends", type=Literal[BACKENDS], nargs="+", default=list(BACKENDS), help="what to compare")
    parser.add_argument("--dry", action="store_true", help="print, and write no rows")
    args = parser.parse_args()
    if not args.dry:
        require_clean()
    before, _ = commit(args.tree)
    with tempfile.TemporaryDirectory() as temporary:
        folder = build_folder(Path(temporary) / args.size, args.size)
        for backend in args.backends:
            processes = [_start(tree.resolve(), backend, folder, args.side) for tree in (args.tree, ROOT)]
            try:
                for process in processes:
                    assert _line(process.stdout).strip() == "ready"
                taken = [[_seconds(process) for process in processes] for _ in range(args.rounds)]
            finally:
                for process in processes:
                    process.kill()
            old, new = (median(times) for times in zip(*taken))
            print(f"{backend:12} {old:8.3f} s before, {new:8.3f} s now: {old / new:.2f} times as fast", flush=True)
            figures = {"backend": backend, "model": f"random {args.size}", "side": args.side, "before": before}
            if not args.dry:
                append_row("before_after", **figures, before_s=old, after_s=new, ratio=old / new, seconds=taken)
    return 0


if __name__ == "__main__":
    cli.run(main)
