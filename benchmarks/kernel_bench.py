"""The fused kernels against eager torch and torch.compile: time, memory, and bandwidth against a copy in the same run.

    python -m benchmarks.kernel_bench                 rows to benchmarks/results/kernels.jsonl: a GPU's, or the CPU's
    python -m benchmarks.kernel_bench --dry_run true  miniature sizes, nothing written

A gate comes first: the tree must be a commit, and the tests of each operation must pass on this device, or no figure is
taken. What fails is named and costs its own figures only; exit code 1 then. (This file is not called kernels.py:
started as a script it would shadow Hugging Face's package of that name.)
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch._functorch.config
from jsonargparse.typing import PositiveInt
from torch import Tensor

from benchmarks.kernel_cases import CASES, FULL, MINIATURE, TESTS, Case
from engine.io import cli
from engine.io.rows import ROOT, append_row, require_clean


def gate(op: str, device: str) -> None:
    """Run the operation's tests on this device. Raises RuntimeError where they are not green."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-c", os.devnull, "--rootdir", str(ROOT), "-p",
               "no:cacheprovider", "--import-mode=importlib", f"tests/kernels/test_{TESTS[op]}.py"]  # fmt: skip
    # On a GPU the tests wait for Triton to compile.
    command += ["-m", "not gpu"] if device == "cpu" else ["-n", "8"] if importlib.util.find_spec("xdist") else []
    environment = os.environ | {"TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stdout[-4000:], done.stderr[-2000:], file=sys.stderr)
        raise RuntimeError(f"the tests of {op} are not green on {device}: no figure is taken of it")


class Clock:
    """Milliseconds of single calls. On a GPU by its own events, the L2 cache overwritten before each."""

    def __init__(self, device: str, budget: float):
        self.gpu, self.budget = device == "cuda", budget
        self.flush = torch.empty(64 << 20, dtype=torch.int32, device=device) if self.gpu else None

    def __call__(self, calls: dict[Any, Callable[[], object]]) -> dict[Any, list[float]]:
        """Sorted times of each call. They take turns, so that what else the machine does slows all alike."""
        for call in calls.values():
            for _ in range(3):
                call()
        end = time.perf_counter() + self.budget * len(calls)
        times: dict[Any, list[float]] = {name: [] for name in calls}
        for turn in range(500):
            if turn >= 5 and time.perf_counter() > end:
                break
            for name, call in calls.items():
                times[name].append(self._on_gpu(call) if self.gpu else self._on_cpu(call))
        return {name: sorted(taken) for name, taken in times.items()}

    def _on_cpu(self, call: Callable[[], object]) -> float:
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3

    def _on_gpu(self, call: Callable[[], object]) -> float:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        assert self.flush is not None
        self.flush.zero_()
        before.record()
        call()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after)


COPIED = {"cuda": 2560 << 20, "cpu": 64 << 20}  # bytes: far more than a cache holds


def copy_bandwidth(device: str, size: int | None = None) -> float:
    """Bytes per second, read and written, of one large copy of random data (zeros may be stored compressed)."""
    size = size or COPIED[device]
    if device == "cuda":
        size = min(size, torch.cuda.mem_get_info()[0] // 3)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(15):
        if device == "cuda":  # by its own clock: the host's includes the launch
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            target.copy_(source)
            after.record()
            torch.cuda.synchronize()
            times.append(before.elapsed_time(after) / 1e3)
        else:
            begin = time.perf_counter()
            target.copy_(source)
            times.append(time.perf_counter() - begin)
    return 2 * size / statistics.median(times[3:])


REPLAYED = 20  # calls in a recorded graph


def replayed(call: Callable[[], object]) -> float | None:
    """Milliseconds of a call on the GPU alone, by a recorded graph of many, or None where it cannot be recorded.

    The launch of a small operation takes longer than the operation itself.
    """
    try:
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(REPLAYED):
                call()
        times = []
        for _ in range(13):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            graph.replay()
            after.record()
            torch.cuda.synchronize()
            times.append(before.elapsed_time(after) / REPLAYED)
    except RuntimeError as error:
        print(f"not recorded: {str(error).splitlines()[:1]}", file=sys.stderr)
        return None
    return statistics.median(times[3:])


def implementations(case: Case, device: str, compiled: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "eager", lambda: case.call(backend="torch")
    if compiled:
        torch.compiler.reset()  # all cases are one line of code to it: behind eight it would stay eager
        graph = torch.compile(lambda: case.call(backend="torch"), dynamic=False)
        yield "compile", graph
    if device == "cuda":
        yield "triton", lambda: case.call(backend="triton")
    yield from case.extra.items()


def modes(case: Case, call: Callable[[], Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "forward", call
    if (pred := case.pred) is not None:
        value = call()[0]
        yield "backward", lambda: torch.autograd.grad(value, pred, torch.ones_like(value), retain_graph=True)
        yield "both", lambda: torch.autograd.grad(call()[0], pred, torch.ones_like(value))


@torch.no_grad()
def agree(result: Any, expected: Any) -> bool:
    """A last look at the very tensors that are timed; the gate has judged the precision."""
    pairs = zip(*((r,) if isinstance(r, Tensor) else tuple(r) for r in (result, expected)))
    return all(float((a.double() - b.double()).norm()) <= 2e-2 * max(float(b.double().norm()), 1e-12) for a, b in pairs)


def peak_mib(run: Callable[[], Any]) -> float:
    """GPU memory that one call takes beyond what is there."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(
    case: Case, device: str, clock: Clock, copied: float, compiled: bool, rounds: int = 1
) -> Iterator[dict[str, Any]]:
    expected = case.call(backend="torch")
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, call in implementations(case, device, compiled):
        try:
            result = call()
        except RuntimeError as error:
            if name != "compile":
                raise
            print(f"{case.op} {case.size}: torch.compile refuses it: {str(error).splitlines()[:1]}", file=sys.stderr)
            continue
        if not agree(result, expected):
            raise RuntimeError(f"{case.op} {name} at {case.size} is wrong: no figure is taken of it")
        runs |= {(name, mode): run for mode, run in modes(case, call)}
    peaks = {key: peak_mib(run) if device == "cuda" else None for key, run in runs.items()}
    # What autograd does on a thread of its own is not recorded.
    graphs = {key: replayed(run) if device == "cuda" and key[1] == "forward" else None for key, run in runs.items()}
    taken = [clock(runs) for _ in range(rounds)]
    for name, mode in runs:
        each = [one[name, mode] for one in taken]
        times = sorted(t for round_ in each for t in round_)
        p20, p50, p80 = (times[int(q * (len(times) - 1))] for q in (0.2, 0.5, 0.8))
        rate = case.traffic[mode] / (p50 / 1e3)
        yield {
            "op": case.op, "mode": mode, "implementation": name, "size": list(case.size),
            "dtype": str(case.dtype).removeprefix("torch."), "device": device, "p20_ms": p20, "p50_ms": p50,
            "p80_ms": p80, "runs": len(times), "rounds_p50_ms": [statistics.median(t) for t in each],
            "bytes": case.traffic[mode], "bytes_per_s": rate,
            "copy_bytes_per_s": copied, "share_of_copy": rate / copied, "peak_mib": peaks[name, mode],
            "replayed_ms": graphs[name, mode],
        }  # fmt: skip


def show(row: dict[str, Any]) -> None:
    size = "x".join(map(str, row["size"]))
    print(
        f"{row['op']:21}{size:16}{row['dtype']:9}{row['mode']:9}{row['implementation']:8}"
        f"{row['p50_ms']:10.4f} ms ({row['p20_ms']:.4f}..{row['p80_ms']:.4f}) {row['share_of_copy']:7.1%} of a copy",
        flush=True,
    )


def main() -> int:
    parser = cli.Parser(prog="python -m benchmarks.kernel_bench", description=__doc__)
    parser.add_argument("--ops", type=list[str], default=list(CASES), help="which operations")
    parser.add_argument("--dry_run", type=bool, default=False, help="miniature sizes, no gate, no rows")
    parser.add_argument("--tested", type=list[str], default=[], help="operations whose tests have passed here just now")
    parser.add_argument(
        "--compile", type=bool | Literal["first"], default=True, help="measure torch.compile too; first: smallest sizes"
    )
    parser.add_argument("--large", type=bool | None, default=None, help="the large sizes too; default: on a GPU")
    parser.add_argument("--seconds", type=float, default=1.0, help="time budget of one figure")
    parser.add_argument("--rounds", type=PositiveInt, default=1, help="how often each figure is taken")
    options: Any = parser.parse_args()
    if unknown := {*options.ops, *options.tested} - set(CASES):
        raise ValueError(f"unknown operation {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not options.dry_run:
        require_clean()
    torch.manual_seed(0)
    torch._functorch.config.donated_buffer = False  # the backward pass alone is timed on a graph that is kept
    clock = Clock(device, options.seconds)
    copied = copy_bandwidth(device)
    large = options.large if options.large is not None else device == "cuda"
    wrong: list[str] = []
    for op in options.ops:
        sizes = MINIATURE[op] if options.dry_run else FULL[op] if large else FULL[op][:1]
        several = device == "cuda" and op in ("gdpo_loss", "attribute_statistics", "group_norm")
        kinds = (torch.float32, torch.bfloat16) if several else (torch.float32,)
        try:
            if op not in options.tested and not options.dry_run:
                gate(op, device)
        except RuntimeError as error:
            wrong.append(str(error))
            continue
        for dtype, size in itertools.product(kinds, sizes):
            compiled = size == sizes[0] if options.compile == "first" else options.compile
            try:
                for row in measure(CASES[op](size, dtype, device), device, clock, copied, compiled, options.rounds):
                    show(row)
                    if not options.dry_run:
                        append_row("kernels", **row)
            except RuntimeError as error:  # a wrong result, too little memory, what a compiler refuses
                wrong.append(f"{op}, {'x'.join(map(str, size))}, {dtype}: {' '.join(str(error).split())[:300]}")
    for line in wrong:
        print(f"no figure: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    cli.run(main)
