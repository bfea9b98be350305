"""What each step of the torch backend gains, beside the floor: one generator, eager fp16 to recorded and compiled.

    python -m benchmarks.torch_backend --folder F [--pictures 512 1024] [--batches 1 2 4 8 16] [--seconds 180] [--dry]

Every step of the ladder is on top of those before it. The whole ladder is measured where a user waits for one picture
and at a batch of 8, both of the first size; elsewhere its ends are. Before a figure is taken, the output is compared
with fp32 (relative L2), and a figure of a wrong result is not kept: exit code 1 names it, and what time did not reach
or a library refused. Called again, it does the shapes that have no rows of this commit and GPU. Contenders
take turns in two rounds; a figure is the median of all calls on pictures that are on the device, the spread each
round's median.
The floor: FLOP counted on the definition over the rate of a large bf16 product measured in the same run.
Compiling takes minutes, so `--compiled` is a run of its own: the recorded generator with torch.compile and without.
`--dry`: few calls, no rows, on the CPU too (without graphs).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_parts import medians
from engine.export.optimise import DEFINITION, Plain, Steps
from engine.export.torch_backend import TorchSession, from_generator
from engine.io import cli
from engine.io.rows import append_row, environment, read_rows, require_clean
from gdpo.generator import OneStepGenerator

_EAGER = Steps("fp16")
_LAST = replace(_EAGER, channels_last=True)
_BF16 = replace(_LAST, precision="bf16")
_FOLDED = replace(_BF16, folded=True)
_ATTENTION = replace(_FOLDED, attention=True)
_NORMS = replace(_ATTENTION, norms=True)
_GRAPHS = replace(_NORMS, graphs=True)
_COMPILED = replace(_GRAPHS, compiled=True)
LADDER = {
    "eager fp16": _EAGER,
    "channels-last": _LAST,
    "bf16": _BF16,
    "folded": _FOLDED,
    "one qkv product": _ATTENTION,
    "fused norms": _NORMS,
    "CUDA graph": _GRAPHS,
    "compiled": _COMPILED,
}
LIMIT = 0.05  # relative L2 against fp32
FULL = "out of memory"
ROUNDS = 2


@dataclass
class Bench:
    """One run: the model in fp32, sessions made of copies of it, and what was refused."""

    model: str
    master: OneStepGenerator
    device: torch.device
    dry: bool
    flop_per_s: float
    refused: list[str] = field(default_factory=list)

    @functools.cached_property
    def reference(self) -> TorchSession:
        """The definition, on the model itself, which it leaves as it is."""
        return from_generator(self.master, str(self.device), steps=DEFINITION)[1]

    def refuse(self, name: str, side: int, batch: int, why: Exception | str) -> None:
        full = isinstance(why, torch.cuda.OutOfMemoryError)
        reason = FULL if full else " ".join(str(why).split())[:300]
        self.refused.append(f"{name}, {side}x{side}, batch {batch}: {reason}")

    def session(self, steps: Steps) -> TorchSession:
        return from_generator(copy.deepcopy(self.master), str(self.device), steps=steps)[1]

    def inputs(self, side: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures that differ, and noise."""
        random = torch.Generator().manual_seed(side + batch)
        codec = self.master.codec
        coarse = torch.rand(batch, 3, side // 16, side // 16, generator=random) * 2 - 1
        image = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(-1, 1)
        noise = torch.randn(batch, codec.channels, side // codec.factor, side // codec.factor, generator=random)
        return image.to(self.device), noise.to(self.device)


def flop(master: OneStepGenerator, side: int) -> int:
    """Floating point operations of one picture, counted on tensors without data."""
    generator = copy.deepcopy(master).to("meta")
    latent = side // master.codec.factor
    image, noise = (torch.empty(1, c, s, s, device="meta") for c, s in ((3, side), (master.codec.channels, latent)))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        Plain(generator, "fp32")(image, noise)
    return counter.get_total_flops()


def product_rate(device: torch.device, dry: bool) -> float:
    """FLOP/s of a bf16 product."""
    n = 256 if dry else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / medians(lambda: a @ b, device.type)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Convolutions in fp32 proper: on a GPU torch's default for them is TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def seconds_of(run: TorchSession, inputs: tuple[torch.Tensor, ...], budget: float) -> list[float]:
    """Seconds of calls that end with the device idle: three to 50, about `budget` seconds of them; one for 0."""
    taken: list[float] = []
    while len(taken) < (3 if budget else 1) or (sum(taken) < budget and len(taken) < 50):
        begin = time.perf_counter()
        run.run(*inputs)
        _synchronize(run.device)
        taken.append(time.perf_counter() - begin)
    return taken


def error_of(run: TorchSession, inputs: tuple[torch.Tensor, ...], expected: torch.Tensor) -> float:
    """The worst picture's relative L2, of the third call: by then a shape is recorded and replayed."""
    for _ in range(2):
        run.run(*inputs)
    difference = (run.run(*inputs) - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    return float(difference.max())


def compare(bench: Bench, runs: dict[str, TorchSession], side: int, batch: int, work: int) -> list[dict[str, Any]]:
    """Check, then time, the contenders on one shape; rows of those that are right and fit the memory."""
    # What a library of the GPU refuses costs this contender on this shape only.
    inputs = bench.inputs(side, batch)
    try:
        with _without_tf32():
            expected = torch.cat([bench.reference.run(i[None], n[None]) for i, n in zip(*inputs)])
    except RuntimeError as error:
        bench.refuse("the definition in fp32", side, batch, error)
        return []
    errors: dict[str, float] = {}
    for name, run in runs.items():
        try:
            errors[name] = error_of(run, inputs, expected)
        except RuntimeError as error:
            bench.refuse(name, side, batch, error)
        if name not in errors:  # behind the error's end, which held what the run had allocated
            run.forget()
        elif not errors[name] < LIMIT:
            bench.refuse(name, side, batch, f"{errors[name]:.2g} from fp32 (relative L2), at most {LIMIT}")
    right = {name: runs[name] for name, error in errors.items() if error < LIMIT}
    times: dict[str, list[list[float]]] = {name: [] for name in right}
    for _ in range(ROUNDS):
        for name, run in list(right.items()):
            try:
                times[name].append(seconds_of(run, inputs, 0 if bench.dry else 0.3))
            except RuntimeError as error:
                bench.refuse(name, side, batch, error)
                del right[name], times[name]
    floor = 1e3 * work * batch / bench.flop_per_s
    rows: list[dict[str, Any]] = []
    for name in right:
        p50 = 1e3 * median(s for taken in times[name] for s in taken)
        row: dict[str, Any] = {
            "model": bench.model, "step": name, "side": side, "batch": batch, "device": bench.device.type,
            "p50_ms": p50, "rounds_p50_ms": [1e3 * median(taken) for taken in times[name]],
            "pictures_per_s": 1e3 * batch / p50, "floor_ms": floor, "times_floor": p50 / floor,
            "relative_error": errors[name], "bf16_flop_per_s": bench.flop_per_s, "tflop_per_picture": work / 1e12,
        }  # fmt: skip
        if rows:
            row["gain"] = rows[-1]["p50_ms"] / p50
        if "eager fp16" in times:
            row["speedup"] = 1e3 * median(s for taken in times["eager fp16"] for s in taken) / p50
        rows.append(row)
    for run in runs.values():
        run.forget()
    return rows


def measured(model: str, step: str) -> set[tuple[int, int]]:
    """The (side, batch) that have a row of this step, of this commit and GPU."""
    here = environment()
    own = [r for r in read_rows("torch_backend") if (r["model"], r["step"]) == (model, step)]
    same = [r for r in own if r["commit"] == here["commit"] and r["machine"]["gpu"] == here["machine"]["gpu"]]
    return {(r["side"], r["batch"]) for r in same}


COLUMNS = {"side": 6, "batch": 6, "ms": 10, "rounds": 20, "pic/s": 9, "gain": 7, "x eager": 8, "x floor": 8, "error": 9}
HEADER = " " * 16 + "".join(f"{name:>{width}}" for name, width in COLUMNS.items())


def _show(row: dict[str, Any]) -> None:
    rounds = " ".join(f"{ms:.2f}" for ms in row["rounds_p50_ms"])
    ratios = "".join(f"{row[k]:>{w}.2f}" if k in row else " " * w for k, w in (("gain", 7), ("speedup", 8)))
    print(
        f"{row['step']:16}{row['side']:>6}{row['batch']:>6}{row['p50_ms']:>10.2f}{rounds:>20}"
        f"{row['pictures_per_s']:>9.1f}{ratios}{row['times_floor']:>8.1f}{row['relative_error']:>9.1e}",
        flush=True,
    )


def measure(
    folder: str | Path,
    sizes: list[int],
    batches: list[int],
    dry: bool = False,
    seconds: float = 180,
    compiled: bool = False,
    ends: bool = False,
) -> Bench:
    """Measure the ladder on a folder, print a table and write rows (unless dry).

    Args:
        folder: a generator's.
        sizes: sides of the output.
        batches: pictures at once.
        dry: few calls, no rows.
        seconds: past them no further shape is begun.
        compiled: the last step alone, beside the one before it.
        ends: nowhere the whole ladder, so that the shapes come in order.

    Returns:
        The run; `refused` names what has no figure.

    Raises:
        ValueError: a side that the model does not take.
        RuntimeError: no GPU and not dry; a tree that differs from its commit.
    """
    end = time.monotonic() + seconds
    if not dry:
        require_clean()
        if not torch.cuda.is_available():
            raise RuntimeError("there is no NVIDIA GPU here; --dry runs on the CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    master = OneStepGenerator.from_pretrained(folder).merge_lora()
    if bad := [side for side in sizes if side % max(master.multiple, 16)]:
        raise ValueError(f"pictures must be multiples of {max(master.multiple, 16)}; got {bad[0]}")
    if master.uses_text:
        master.text_embeds(1)
        master.prompt_encoder = None  # its work is done
    bench = Bench(Path(folder).name, master.to(device), device, dry, product_rate(device, dry))
    work = {side: flop(master, side) for side in sizes}
    print(f"{bench.model} on {device.type}: bf16 product {bench.flop_per_s / 1e12:.3g} TFLOP/s; ", end="")
    print(", ".join(f"{side}x{side}: {work[side] / 1e12:.3g} TFLOP" for side in sizes) + f"\n{HEADER}")
    names = list(LADDER)[-2:] if compiled else list(LADDER)[:-1]
    names = [names[0], names[-1]] if ends else names
    steps = {name: replace(LADDER[name], graphs=LADDER[name].graphs and device.type == "cuda") for name in names}
    runs = {name: bench.session(one) for name, one in steps.items()}
    whole = set() if ends else {(sizes[0], batch) for batch in (batches[0], 8) if batch in batches}
    rest = set() if compiled else {(side, batch) for side in sizes for batch in batches} - whole
    done = set() if dry else measured(bench.model, names[-1] if compiled else names[0])
    shapes = [shape for shape in (*sorted(whole), *sorted(rest)) if shape not in done]
    for number, (side, batch) in enumerate(shapes):
        if time.monotonic() > end:
            bench.refused.append(f"{len(shapes) - number} shapes were not begun within {seconds:g} s")
            break
        chosen = names if (side, batch) in whole else [names[0], names[-1]]
        for row in compare(bench, {name: runs[name] for name in chosen}, side, batch, work[side]):
            _show(row)
            if not dry:
                append_row("torch_backend", **row)
    return bench


def main() -> int:
    parser = cli.Parser(prog="python -m benchmarks.torch_backend", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", required=True, help="a generator's folder")
    parser.add_argument("--pictures", type=PositiveInt, nargs="+", default=[512, 1024], help="sides of the output")
    parser.add_argument("--batches", type=PositiveInt, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seconds", type=PositiveFloat, default=180.0, help="past them no further shape is begun")
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of the ladder: minutes")
    parser.add_argument("--ends", action="store_true", help="the first and the last step of the ladder alone")
    parser.add_argument("--dry", action="store_true", help="few calls, no rows, without a GPU too")
    args = parser.parse_args()
    bench = measure(args.folder, args.pictures, args.batches, args.dry, args.seconds, args.compiled, args.ends)
    for line in bench.refused:
        print(f"no figure: {line}", file=sys.stderr)
    return 1 if any(not line.endswith(FULL) for line in bench.refused) else 0


if __name__ == "__main__":
    cli.run(main)
