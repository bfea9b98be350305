"""Everything that needs a GPU, in one command: `make bench-gpu`, or

    python -m benchmarks.gpu [--parts kernels gdpo-step] [--again gdpo-step] [--minutes 9] [--out DIR] [--dry]

A sequence of parts, each a process of its own with a time limit and a log file (PARTS below, `--list` shows them). What
a part finished is remembered in DIR/state.json: the next call at the same commit on the same GPU does the rest.
A part whose package is missing is skipped with the reason; the others go on. Exit code 1 names what is not done. On an
H100 one call is meant to reach the parts down to tensorrt-rtx and the 1024 pixels of inference-large at small batches
(expected from the work, not measured yet; docs/gpu.md). The plots are drawn in any case.
`--dry` runs every part on the CPU at miniature size and writes no rows. The time limits are those of nine minutes on an
H100, and grow with --minutes; for --dry, on a processor, they are fourfold.

Rows and plots go to benchmarks/results (or --results). The tree must be a commit; a copy without .git names it in the
environment variable GDPO_COMMIT. Logs, state: --out. The random model and compiled kernels: --cache. Whatever happened,
OUT/gpu-results.tar.gz has it all: rows, plots, logs and state.

What a GPU machine needs, beside torch with CUDA (2.11 or newer) and its triton, Python 3.11 or newer:
    all parts        numpy pyyaml jsonargparse (4.49 or newer, under 5)
    test-...         pytest hypothesis; faster with pytest-xdist
    kernels          scikit-image opencv-python-headless
    model, inference diffusers transformers safetensors huggingface-hub (and what these ask for: regex requests
                     tokenizers packaging filelock), tqdm; openai-clip for CLIP's own vocabulary, else one is made up
    gdpo-step        these, accelerate peft psutil scipy pillow scikit-image
    gpu-tests        these, onnx onnxscript onnxruntime
    tensorrt-rtx     these, onnx onnxscript onnxruntime tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings
    plots            matplotlib
Where torch, transformers, accelerate, peft, pytest and the usual scientific packages are at hand, that leaves two
wheels: diffusers and jsonargparse (both pure Python), and the two of TensorRT-RTX. No torchvision, pyiqa or network.
"""

from __future__ import annotations

import contextlib  # beside the command line, the standard library alone: the parts say what is not installed
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.io import cli
from engine.io.files import atomic_write
from engine.io.rows import RESULTS, ROOT, commit, environment, require_clean

SKIPPED = 77  # exit code of a part that cannot run here; its last line says why
MINUTES = 9  # of a call; the parts' time limits are made for it
ROUNDS = "2"  # every figure is taken twice
RESERVED = 20  # seconds that the other parts leave for the plots
TRAINING = ("torch", "numpy", "yaml", "jsonargparse", "diffusers", "transformers", "safetensors")
STEP = (*TRAINING, "accelerate", "peft", "scipy", "PIL", "skimage")
PYTEST = ("pytest", "-q", "-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider",
          "--import-mode=importlib", "-o", f"pythonpath={ROOT / 'tests' / 'support'}")  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One call of this command: where things go, and whether it is the miniature."""

    dry: bool
    out: Path
    cache: Path
    results: Path
    commit: str
    gpu: str | None
    finished: set[str] = field(default_factory=set)
    scale: float = 1  # of the time limits

    @property
    def model(self) -> Path:
        """The folder with random weights."""
        return self.cache / ("mini" if self.dry else "sd21")


@dataclass(frozen=True)
class Part:
    """One process: what it is for, the modules it needs, its time limit and its command after `python -m`.

    It runs behind the parts `after`, and not where a part of `checked` has failed: its figures would be of wrong code.
    """

    about: str
    seconds: int
    needs: tuple[str, ...]
    command: Callable[[Run], list[str]]
    after: tuple[str, ...] = ("environment",)
    checked: tuple[str, ...] = ()


def _kernel_test(*names: str) -> Callable[[Run], list[str]]:
    def command(run: Run) -> list[str]:
        fast = ["-n", "8"] if importlib.util.find_spec("xdist") else []
        some = ["-k", "twice or runs_are_equal or unknown_backend"] if run.dry else fast
        return [*PYTEST, *some, *(f"tests/kernels/test_{name}.py" for name in names)]

    return command


def _gpu_tests(run: Run) -> list[str]:
    files = ["engine/test_torch_backend.py", "engine/test_tensorrt_session.py", "gdpo/test_degradation.py"]
    return [*PYTEST, "-m", "gpu", *(f"tests/{file}" for file in files)]


def _kernels(run: Run) -> list[str]:
    if run.dry:
        return ["benchmarks.kernel_bench", "--dry_run", "true", "--compile", "false", "--seconds", "0.01"]
    tested = [op for part, op in TESTED.items() if part in run.finished]  # at this commit, on this GPU
    return ["benchmarks.kernel_bench", "--compile", "first", "--seconds", "0.15", "--rounds", ROUNDS,
            "--tested", f"[{','.join(tested)}]"]  # fmt: skip


def _gdpo_step(*variants: str, seconds: int, alone: bool = False) -> Callable[[Run], list[str]]:
    def command(run: Run) -> list[str]:
        size = ["--crop", "64", "--group", "2", "--steps", "1", "--rounds", "1", "--dry"]
        if not run.dry:
            budget = ["--rounds", ROUNDS, "--seconds", f"{seconds * run.scale:g}"]
            size = ["--crop", "512", "--group", "6", "--steps", "5", *budget]
        return ["benchmarks.gdpo_step", "--folder", str(run.model), "--precision", "bf16", *size, "--together",
                *(["--alone"] if alone else []), "--variants", *variants]  # fmt: skip

    return command


def _inference(side: int, *batches: int, seconds: int, ends: bool = False) -> Callable[[Run], list[str]]:
    def command(run: Run) -> list[str]:
        command = ["benchmarks.torch_backend", "--folder", str(run.model), *(["--ends"] if ends else [])]
        if run.dry:
            return [*command, "--pictures", "64", "--batches", *(("1",) if ends else ("1", "2")), "--dry"]
        numbers = map(str, batches)
        return [*command, "--pictures", str(side), "--batches", *numbers, "--seconds", f"{seconds * run.scale:g}"]

    return command


def _inference_compiled(run: Run) -> list[str]:
    command = ["benchmarks.torch_backend", "--folder", str(run.model), "--compiled", "--batches", "1"]
    return [*command, "--pictures", "64", "--dry"] if run.dry else [*command, "--pictures", "512"]


def _own(name: str) -> Callable[[Run], list[str]]:
    """A part of gpu_parts.py."""
    return lambda run: ["benchmarks.gpu_parts", name, "--cache", str(run.cache), "--out", str(run.out),
                        *(["--dry"] if run.dry else [])]  # fmt: skip


TESTED = {"test-loss": "gdpo_loss", "test-statistics": "attribute_statistics", "test-complexity": "attribute_ratios",
          "test-reward": "attribute_reward", "test-norm": "group_norm", "test-gate": "geglu",
          "test-residual": "residual_sum"}  # fmt: skip
FIRST = ("environment",)  # refuses a torch without CUDA
MODEL = (*FIRST, "model")
STEP_TESTED = tuple(TESTED)
PARTS: dict[str, Part] = {
    "environment": Part(
        "the machine: versions, copy bandwidth, bf16 product", 60, ("torch", "jsonargparse"), _own("environment"), ()
    ),
    **{
        part: Part(
            f"{op} against fp64, on this device", 90, ("torch", "numpy", "pytest", "hypothesis"),
            _kernel_test(part.removeprefix("test-")),
        )
        for part, op in TESTED.items()
    },
    "model": Part("a folder of Stable Diffusion 2.1-base's shape, random weights", 300, TRAINING, _own("model")),
    "gdpo-step": Part(
        "the GDPO step against the released procedure, with peak memory", 280,
        STEP, _gdpo_step("plain", "checkpointing", "reuse-latents", seconds=130), MODEL, STEP_TESTED,
    ),
    "inference": Part(
        "the generator on a GPU: pictures of 512, batches of 1 to 16", 120,
        (*TRAINING, "benchmarks.torch_backend"), _inference(512, 1, 2, 4, 8, 16, seconds=80), MODEL,
    ),
    "kernels": Part(
        "the kernels against eager torch, torch.compile and a copy", 150,
        ("torch", "numpy", "jsonargparse", "skimage", "cv2"), _kernels,
    ),
    "tensorrt-rtx": Part(
        "does a plan built without a GPU load and run on this one", 150,
        (*TRAINING, "onnx", "onnxscript", "onnxruntime", "tensorrt_rtx | tensorrt_rtx_bindings"), _own("tensorrt-rtx"),
    ),
    # The largest pictures, the other tests and at last what compiles: long ones must not cost the other figures.
    "inference-large": Part(
        "the generator on a GPU: pictures of 1024, batches of 1 to 16", 150,
        (*TRAINING, "benchmarks.torch_backend"), _inference(1024, 1, 2, 4, 8, 16, seconds=100, ends=True),
        MODEL,
    ),
    "gpu-tests": Part(
        "the other tests that need a GPU: recorded graphs, plans, the degradation", 120,
        (*TRAINING, "pytest", "scipy", "skimage", "PIL", "onnx", "onnxscript", "onnxruntime"), _gpu_tests,
    ),
    "test-input": Part(
        "what the kernels say to bad input on this device", 60, ("torch", "pytest"), _kernel_test("bad_input")
    ),
    "inference-compiled": Part(
        "the generator with torch.compile, beside itself without", 300,
        (*TRAINING, "benchmarks.torch_backend"), _inference_compiled, MODEL,
    ),
    "gdpo-compiled": Part(
        "the step with the sampler and the autoencoder compiled, beside itself without", 300,
        STEP, _gdpo_step("plain", "compile-frozen", seconds=280, alone=True), MODEL, STEP_TESTED,
    ),
    "plots": Part("pictures of the rows", 40, ("jsonargparse", "matplotlib"), _own("plots")),
}  # fmt: skip


def missing(needs: tuple[str, ...]) -> list[str]:
    """The modules of `needs` that are not there ("a | b": either will do); nothing is imported to find out."""

    def there(module: str) -> bool:
        try:
            return importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # the package around it
            return False

    return [need for need in needs if not any(there(m) for m in need.split(" | "))]


def load_state(run: Run) -> dict[str, dict[str, Any]]:
    """What earlier calls recorded about each part.

    Raises:
        ValueError: state.json is not what this command writes.
    """
    file = run.out / "state.json"
    if not file.is_file():
        return {}
    try:
        parts = json.loads(file.read_text(encoding="utf-8"))["parts"]
        assert isinstance(parts, dict) and all(isinstance(p, dict) for p in parts.values())
    except (ValueError, KeyError, TypeError, AssertionError):
        raise ValueError(f"{file} is not a state of this command; remove it or name another --out") from None
    return parts


def status_of(name: str, state: dict[str, dict[str, Any]], run: Run) -> str | None:
    """What became of a part at this commit on this machine."""
    found = state.get(name, {})
    same = (found.get("commit"), found.get("gpu"), found.get("dry")) == (run.commit, run.gpu, run.dry)
    return found.get("status") if same else None


def is_done(name: str, state: dict[str, dict[str, Any]], run: Run) -> bool:
    """Whether a part was finished at this commit on this machine, and what it made is still there."""
    if name == "plots":  # of whatever rows there are by then
        return False
    return status_of(name, state, run) == "done" and (name != "model" or run.model.is_dir())


def execute(name: str, run: Run, seconds: float, wrong: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run one part to its end or its time limit: what state.json remembers of it."""
    part = PARTS[name]
    record = {"commit": run.commit, "gpu": run.gpu, "dry": run.dry}
    if absent := missing(part.needs):
        return record | {"status": "skipped", "reason": f"not installed here: {', '.join(absent)}"}
    if before := [p for p in part.after if p not in run.finished]:
        return record | {"status": "skipped", "reason": f"it needs the part {', '.join(before)}, which is not done"}
    if bad := [p for p in part.checked if p in wrong]:
        return record | {"status": "skipped", "reason": f"{', '.join(bad)} has failed: figures would be of wrong code"}
    log = run.out / f"{name}.log"
    began = time.monotonic()
    code = _process([sys.executable, "-m", *part.command(run)], log, _environment(run), seconds)
    record |= {"seconds": round(time.monotonic() - began, 1), "log": str(log)}
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "it said nothing"
    if code == 0:
        return record | {"status": "done"}
    if code == SKIPPED:
        return record | {"status": "skipped", "reason": last}
    return record | {
        "status": "failed",
        "timed_out": code is None,
        "reason": f"stopped after {seconds:.0f} s" if code is None else f"exit code {code}: {last}",
    }


def _environment(run: Run) -> dict[str, str]:
    dry = {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}  # compiling takes minutes on a CPU
    extra = {
        "GDPO_RESULTS": str(run.results),
        "TRITON_CACHE_DIR": str(run.cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(run.cache / "inductor"),
        "TRITON_INTERPRET": "1" if run.dry else "0",
    }
    return os.environ | extra | (dry if run.dry else {})


def _process(command: list[str], log: Path, environment: dict[str, str], seconds: float) -> int | None:
    """The exit code, or None past the time limit. The process and its children never outlive this call."""
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own session: workers of pytest, compilers
            process.wait()


def run_parts(wanted: list[str], again: list[str], run: Run, minutes: float) -> list[str]:
    """Run what is not done yet, in the order of PARTS; one line for every part that is not done in the end."""
    state, end, problems = load_state(run), time.monotonic() + 60 * minutes, []
    run.finished.clear()
    run.finished.update(name for name in PARTS if name not in again and is_done(name, state, run))
    for number, name in enumerate(wanted, 1):
        heading = f"[{number}/{len(wanted)}] {name}: {PARTS[name].about}"
        if name in run.finished:
            say(f"{heading}: done before ({state[name].get('seconds')} s)")
            continue
        left = end - time.monotonic() - (RESERVED if "plots" in wanted and name != "plots" else 0)
        if left < 5:
            problems.append(f"{name}: not reached in {minutes:g} minutes; run the same command again")
            continue
        say(f"{heading} ...")
        failed = [part for part in PARTS if status_of(part, state, run) == "failed"]
        wrong = tuple(part for part in failed if not state[part]["timed_out"])  # slow is not wrong
        state[name] = execute(name, run, min(left, PARTS[name].seconds * run.scale), wrong)
        atomic_write(run.out / "state.json", json.dumps({"parts": state}, indent=2) + "\n")
        status, reason = state[name]["status"], state[name].get("reason", "")
        say(f"    {status}" + (f": {reason}" if reason else f" in {state[name]['seconds']} s"))
        if status == "done":
            run.finished.add(name)
        elif status == "failed":
            problems.append(f"{name}: {reason} (log: {state[name]['log']})")
    return problems


ARCHIVE = "gpu-results.tar.gz"


def pack(run: Run) -> Path:
    """One archive of what there is: rows, plots, logs, state."""
    archive, part = run.out / ARCHIVE, run.out / f"{ARCHIVE}.part"
    own = [*run.out.glob("*.log"), *run.out.glob("*.png"), *run.out.glob("state.json")]
    rows = [] if run.dry else [*run.results.glob("*.jsonl"), *run.results.glob("gpu_*.png")]
    with tarfile.open(part, "w:gz") as packed:
        for folder, files in (("gpu", own), ("results", rows)):
            for file in sorted(files):
                packed.add(file, f"{folder}/{file.name}", recursive=False)
    return part.replace(archive)


def scale_of(minutes: float, dry: bool) -> float:
    """What the parts' time limits are multiplied by: they are an H100's, of nine minutes in all."""
    return max(minutes / MINUTES, 1) * (4 if dry else 1)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = cli.Parser(prog="python -m benchmarks.gpu", description="Take every figure that needs a GPU.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", help="some of it (default: all)")
    parser.add_argument("--again", nargs="+", choices=PARTS, default=[], metavar="PART", help="even if done before")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="what is not reached by then waits for the next call"
    )
    parser.add_argument("--out", type=Path, help="logs and state (default: runs/gpu, dry: runs/gpu-dry)")
    parser.add_argument("--cache", type=Path, help="the random model, compiled kernels (default: OUT/cache)")
    parser.add_argument("--results", type=Path, help="rows and plots (default: benchmarks/results)")
    parser.add_argument("--dry", action="store_true", help="miniature, on the CPU; no rows")
    parser.add_argument("--list", action="store_true", help="name the parts and what they need, and end")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{n:19}{p.seconds:4} s  {p.about}; needs {', '.join(p.needs)}" for n, p in PARTS.items()))
        return 0
    if not options.minutes > 0:
        parser.error(f"--minutes must be above 0; got {options.minutes:g}")
    gpu = None if options.dry else environment()["machine"]["gpu"]
    if not options.dry:
        require_clean()
        if gpu is None:
            raise RuntimeError("there is no NVIDIA GPU here (nvidia-smi finds none); --dry runs on the CPU")
    out = (options.out or ROOT / "runs" / ("gpu-dry" if options.dry else "gpu")).resolve()
    cache = (options.cache or out / "cache").resolve()
    for folder in (out, cache):
        folder.mkdir(parents=True, exist_ok=True)
    scale = scale_of(options.minutes, options.dry)
    run = Run(options.dry, out, cache, (options.results or RESULTS).resolve(), commit()[0], gpu, scale=scale)
    asked = {*(options.parts or PARTS), *options.again}
    asked |= {before for name in asked for before in PARTS[name].after}
    wanted = [name for name in PARTS if name in asked]
    try:
        problems = run_parts(wanted, options.again, run, options.minutes)
    finally:  # also where it is interrupted
        say(f"packed: {pack(run)}")
    for problem in problems:
        print(f"not done: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    cli.run(main)
