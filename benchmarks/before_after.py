"""A picture and a GDPO step on the CPU, this checkout against another: both in one run, taking turns.

    git worktree add ../before COMMIT
    python -m benchmarks.before_after --tree ../before [--size small] [--side 256] [--crop 128] [--rounds 7]

The generator has random weights in Stable Diffusion's shape. A picture is made by torch in fp32 and bf16 as it is made
fast, and by ONNX Runtime from the exported graph; a step is in fp32 or bf16. A row of
benchmarks/results/before_after.jsonl each: medians of CPU seconds on one thread, and of the ratio in each round.
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

CASES = ("torch", "torch-bf16", "onnxruntime", "step", "step-bf16")
# What runs in either checkout: it loads, then does its work for every line that it reads, and prints the CPU seconds.
BEGIN = """
import sys, time, tempfile
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
case, folder, side = sys.argv[1], sys.argv[2], int(sys.argv[3])
"""
PICTURE = """
from gdpo.generator import OneStepGenerator
generator = OneStepGenerator.from_pretrained(folder)
image, noise = torch.rand(1, 3, side, side) * 2 - 1, torch.randn(1, 4, side // 8, side // 8)
inputs = {"image": image.numpy(), "noise": noise.numpy()}
if case == "onnxruntime":
    from engine.export.generator import export_generator
    from engine.runtime.upscaler import Upscaler
    out = Path(tempfile.mkdtemp()) / "onnx"
    export_generator(generator, out, check=False)
    session = Upscaler.load(out, "onnx", threads=1, core=False).sessions["generator"]
else:
    from engine.export.optimise import fastest
    from engine.export.torch_backend import from_generator
    precision = "bf16" if case == "torch-bf16" else "fp32"
    steps = replace(fastest(torch.device("cpu")), precision=precision)
    session = from_generator(generator, "cpu", steps=steps)[1]
work = lambda number: session(inputs)
"""
STEP = """
from accelerate import Accelerator
from benchmarks import gdpo_step
accelerator = Accelerator(cpu=True, mixed_precision="bf16" if case == "step-bf16" else "no")
step = gdpo_step._ours(folder, accelerator, side, int(sys.argv[4]))
work = lambda number: step(gdpo_step._batch(side, number, "cpu"), number)
"""
END = """
work(0)
print("ready", flush=True)
for number, _ in enumerate(sys.stdin, 1):
    begin = time.process_time()
    work(number)
    print(time.process_time() - begin, flush=True)
"""


def _start(tree: Path, case: str, folder: Path, side: int, group: int) -> subprocess.Popen[str]:
    worker = BEGIN + (STEP if case.startswith("step") else PICTURE) + END
    command = [sys.executable, "-c", worker, case, str(folder), str(side), str(group)]
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
    parser.add_argument("--side", type=PositiveInt, default=256, help="of a picture's output")
    parser.add_argument("--crop", type=PositiveInt, default=128, help="of a step")
    parser.add_argument("--group", type=PositiveInt, default=4, help="samples of a step")
    parser.add_argument("--rounds", type=PositiveInt, default=7, help="pictures or steps of each checkout")
    parser.add_argument("--cases", type=Literal[CASES], nargs="+", default=list(CASES), help="what to compare")
    parser.add_argument("--dry", action="store_true", help="print, and write no rows")
    args = parser.parse_args()
    if not args.dry:
        require_clean()
    before, _ = commit(args.tree)
    with tempfile.TemporaryDirectory() as temporary:
        folder = build_folder(Path(temporary) / args.size, args.size)
        for case in args.cases:
            stepping = case.startswith("step")
            setting = {"side": args.crop, "group": args.group} if stepping else {"side": args.side}
            how = folder, setting["side"], args.group
            processes = [_start(tree.resolve(), case, *how) for tree in (args.tree, ROOT)]
            try:
                for process in processes:
                    assert _line(process.stdout).strip() == "ready"
                taken = [[_seconds(process) for process in processes] for _ in range(args.rounds)]
            finally:
                for process in processes:
                    process.kill()
            old, new = (median(times) for times in zip(*taken))
            ratio = median(old_s / new_s for old_s, new_s in taken)
            print(f"{case:12} {old:8.3f} s before, {new:8.3f} s now: {ratio:.2f} times as fast", flush=True)
            figures = {"case": case, "model": f"random {args.size}", "before": before, "load_1min": os.getloadavg()[0]}
            figures |= {**setting, "before_s": old, "after_s": new, "ratio": ratio, "seconds": taken}
            if not args.dry:
                append_row("before_after", **figures)
    return 0


if __name__ == "__main__":
    cli.run(main)
