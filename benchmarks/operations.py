"""What one picture and one GDPO step cost at the size of Stable Diffusion 2.1, counted on tensors without data: no GPU.

    python -m benchmarks.operations                    # writes rows of benchmarks/results/operations.jsonl
    python -m benchmarks.operations --tree OTHER       # counts another checkout of this project, to compare with

Kernels, the bytes that they read and write (each once; caches are not modelled) and floating point operations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveInt

from engine.io import cli
from engine.io.rows import ROOT, append_row, commit, require_clean
from gdpo.model.random_folder import build_folder

CASES = ("picture", "step")


def build_library(out: Path) -> None:
    """The library that stands in for CUDA's where torch is built without it."""
    at, library = Path(torch.__file__).parent, out / "fake_cuda.so"
    source = ROOT / "tests" / "benchmarks" / "fake_cuda.cpp"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", source, f"-I{at}/include", f"-L{at}/lib", "-ltorch_cpu",
               "-lc10", f"-Wl,-rpath,{at}/lib", "-o", library]  # fmt: skip
    subprocess.run(command, check=True)


def count(case: str, work: Path, tree: Path, side: int, number: int) -> dict[str, Any]:
    """The figures of one case: a batch of `number` pictures, or a step with a group of that many samples."""
    picture = ["tests.benchmarks.fake_picture", side, number]
    step = ["tests.benchmarks.fake_cuda", work / "mini", "ours", "plain", side, number, "sd21"]
    command = [sys.executable, "-m", *map(str, picture if case == "picture" else step)]
    surroundings = {"LD_PRELOAD": str(work / "fake_cuda.so"), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=tree, env=os.environ | surroundings, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case} in {tree} cannot be counted: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = cli.Parser(prog="python -m benchmarks.operations", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=Literal[CASES], nargs="+", default=list(CASES), help="what to count")
    parser.add_argument("--side", type=PositiveInt, default=512, help="of the output or the crop")
    parser.add_argument("--number", type=PositiveInt, nargs="+", default=[1], help="pictures at once, or the group")
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout to count")
    parser.add_argument("--dry", action="store_true", help="print, and write no rows")
    args = parser.parse_args()
    if not args.dry:
        require_clean()
    code, _ = commit(args.tree)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        build_library(work)
        build_folder(work / "mini")  # a step reads its tokenizer
        for case in args.cases:
            for number in args.number:
                figures = {"case": case, "code": code, "side": args.side, "number": number}
                figures |= count(case, work, args.tree, args.side, number)
                print(json.dumps(figures), flush=True)
                if not args.dry:
                    append_row("operations", **figures)
    return 0


if __name__ == "__main__":
    cli.run(main)
