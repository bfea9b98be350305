"""Latency, throughput and memory of the engine and its peers in one run: `python -m engine.bench GENERATOR`.

Every contender is warmed up, then all of them take turns, so that a busy machine slows them alike. Rows go to
benchmarks/results/engine.jsonl (in a checkout), a plot beside it.
"""

from __future__ import annotations

import functools
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from engine.io import cli
from engine.io.images import Picture, write_image
from engine.runtime import manifest as manifests
from engine.runtime.align import finish
from engine.runtime.backends.registry import BACKENDS, GENERATOR
from engine.runtime.color import DEFAULT
from engine.runtime.noise import noise_field
from engine.runtime.pipeline import Pipeline
from engine.runtime.resample import resize_window
from engine.runtime.restore import quantise
from engine.runtime.upscaler import Upscaler

CONTENDERS = ("torch", "torch-compile", "torch-bf16", "onnxruntime", "openvino", "openvino-bf16", "folder")
K = TypeVar("K", str, tuple[int, str])
Run = Callable[[dict[str, np.ndarray]], np.ndarray]


def open_contender(name: str, generator: Path, engine: Path, threads: int) -> Run:
    """A function from {image, noise} to the output.

    Args:
        name: one of CONTENDERS; "folder" runs the engine folder on the backend it was built for.
        generator: a generator's folder, for torch.
        engine: an engine folder of the same generator.

    Raises:
        RuntimeError: it cannot run here.
    """
    backend, _, variant = name.partition("-")
    chosen = manifests.load(engine).backend if backend == "folder" else backend
    model = generator if chosen in BACKENDS and GENERATOR in BACKENDS[chosen].runs else engine
    precision = "bf16" if variant == "bf16" else "auto"
    up = Upscaler.load(model, chosen, threads=threads, precision=precision, core=False if model is engine else None)
    if variant == "compile":
        from engine.export.torch_backend import TorchSession

        session = up.sessions["generator"]
        assert isinstance(session, TorchSession)  # what the torch backend loads
        session.compile()
    pipeline = Pipeline(up.sessions)
    return lambda inputs: pipeline(inputs["image"], inputs["noise"])


def inputs_for(up: Upscaler, batch: int, side: int) -> dict[str, np.ndarray]:
    """A smooth picture with noise in it, and the model's noise."""
    g = up.manifest.geometry
    wave = np.sin(np.arange(side, dtype=np.float32) / 17)
    image = np.broadcast_to(wave[:, None] * wave, (batch, 3, side, side)) * np.float32(0.8)
    noise = noise_field(0, g.channels, (0, side // g.factor), (0, side // g.factor))
    return {"image": np.ascontiguousarray(image), "noise": np.repeat(noise[None], batch, axis=0)}


def measure(runs: dict[K, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[K, list[float]]:
    """Seconds of every call, the contenders (and batches) taking turns."""
    for run in runs.values():
        for _ in range(warmup):
            run()
    times: dict[K, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return times


def summary(seconds: list[float], batch: int) -> dict[str, float]:
    """Percentiles in milliseconds and pictures per second."""
    p50, p90, p99 = (float(p) for p in np.percentile(seconds, (50, 90, 99)) * 1e3)
    return {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "pictures_per_s": batch * 1e3 / p50}


def stages(up: Upscaler, side: int) -> dict[str, float]:
    """Milliseconds of each stage of one picture, side/4 -> side, each measured alone (medians of five), and its share
    of their sum. `upscale` is all of them but the writing, at once, on the path that `upscale` takes.
    """
    g = up.manifest.geometry
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (side // g.scale, side // g.scale, 3), dtype=np.uint8)
    size, latent = (side, side), (0, side // g.factor)
    planes = rng.random((3, side, side), dtype=np.float32)
    picture = quantise(planes).transpose(1, 2, 0)
    parts: dict[str, Callable[[], Any]] = {
        "resample": lambda: resize_window(rgb, size, (0, side), (0, side)),
        "noise": lambda: noise_field(0, g.channels, latent, latent),
        **graph_calls(up, inputs_for(up, 1, side)),
        "quantise": lambda: quantise(planes).transpose(1, 2, 0).copy(),
        "color": lambda: list(finish([(0, picture)], rgb, size, size, DEFAULT)),
        "upscale": lambda: up.upscale(rgb),
    }
    with tempfile.TemporaryDirectory() as folder:
        parts["write_png"] = lambda: write_image(f"{folder}/x.png", Picture((picture >> 8).astype(np.uint8)))
        times = measure(parts, rounds=5, warmup=1)
    medians = {name: float(np.median(t)) * 1e3 for name, t in times.items()}
    together = sum(ms for name, ms in medians.items() if name != "upscale")
    shares = {f"{name}_share": ms / together for name, ms in medians.items() if name != "upscale"}
    return {f"{name}_ms": ms for name, ms in medians.items()} | shares


def graph_calls(up: Upscaler, inputs: dict[str, np.ndarray]) -> dict[str, Callable[[], Any]]:
    """A call for each graph of a folder, on what the graphs before it make of the inputs."""
    known = {"image": inputs["image"], "noise": inputs["noise"]}
    calls: dict[str, Callable[[], Any]] = {}
    for name, graph in up.manifest.graphs.items():  # encoder, unet, decoder follow each other
        given = {t.name: known[t.name] for t in graph.inputs}
        calls[name] = functools.partial(up.sessions[name], given)
        known[graph.output.name] = calls[name]().copy()
    return calls


def _peak(name: str, generator: Path, engine: Path, threads: int, batch: int, side: int, queue: Any) -> None:
    run = open_contender(name, generator, engine, threads)
    run(inputs_for(Upscaler.load(engine), batch, side))
    # Not getrusage: a child inherits its parent's peak there.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    queue.put(int(line.split()[1]) / 1024)


def peak_mib(name: str, generator: Path, engine: Path, threads: int, batch: int, side: int) -> float:
    """Peak memory of a fresh process that loads one contender and runs it once."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(name, generator, engine, threads, batch, side, queue))
    process.start()
    peak = queue.get(timeout=600)
    process.join()
    return peak


def folding(generator: Path, scratch: Path, threads: int, rounds: int, side: int = 256) -> dict[str, Any]:
    """Nodes and time of the UNet exported plainly (timestep and prompt are inputs) and folded."""
    import onnx
    import onnxruntime
    import torch

    from engine.export.generator import save_graph
    from engine.export.graphs import Step, fold
    from engine.runtime.backends.onnxruntime import session_options
    from gdpo.generator import OneStepGenerator

    class Plain(torch.nn.Module):
        def __init__(self, made: OneStepGenerator):
            super().__init__()
            self.unet, self.made = made.unet, [made]

        def forward(self, latent, noise, timestep, prompt=None):
            (made,) = self.made
            noisy = made.a_n**0.5 * latent + made.b_n**0.5 * noise
            if made.parametrization == "residual":
                return latent + self.unet(torch.cat([noisy, latent], dim=1), timestep).sample
            predicted = self.unet(noisy, timestep, encoder_hidden_states=prompt).sample
            return (noisy - made.b_d**0.5 * predicted) / made.a_d**0.5

    made = OneStepGenerator.from_pretrained(generator)
    field = (torch.randn(1, made.codec.channels, side // made.codec.factor, side // made.codec.factor),) * 2
    extra = (torch.tensor([made.t_diffusion]), *((made.text_embeds(1),) if made.uses_text else ()))
    names = ["latent", "noise", "timestep", "prompt"][: 2 + len(extra)]
    save_graph(Plain(made.merge_lora()), field + extra, scratch / "plain.onnx", names, "x0", None, 23)
    save_graph(Step(fold(made), "fp32"), field, scratch / "folded.onnx", names[:2], "x0", None, 23)
    feeds = {n: t.numpy() for n, t in zip(names, field + extra)}
    row: dict[str, Any] = {"what": "folding", "contender": "onnxruntime", "side": side}
    runs: dict[str, Callable[[], Any]] = {}
    for name in ("plain", "folded"):
        model = onnx.load(scratch / f"{name}.onnx")
        row[f"{name}_nodes"] = len(model.graph.node)
        row[f"{name}_mib"] = (scratch / f"{name}.onnx").stat().st_size / 2**20
        session = onnxruntime.InferenceSession(model.SerializeToString(), session_options(threads))
        given = {i.name: feeds[i.name] for i in session.get_inputs()}
        runs[name] = functools.partial(session.run, None, given)
    for name, seconds in measure(runs, rounds).items():
        row[f"{name}_p50_ms"] = float(np.median(seconds)) * 1e3
    return row


def main() -> int:
    parser = cli.Parser(
        prog="python -m engine.bench",
        description="Measure latency, throughput and memory of the engine and of the same generator in torch.",
    )
    parser.add_argument("generator", help="a generator's folder (for the torch peers)")
    parser.add_argument("--engine", help="an engine folder of the same generator (default: exported now)")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS[:-1]), choices=CONTENDERS,
                        help="what to measure")  # fmt: skip
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="sides of the output, in pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8], help="batch sizes")
    parser.add_argument("--rounds", type=int, default=9, help="number of timed rounds")
    parser.add_argument("--threads", type=int, default=0, help="number of CPU threads; 0: all")
    parser.add_argument("--name", default="engine", help="name of the results file, without .jsonl")
    parser.add_argument("--no-rows", action="store_true", help="do not write result rows; only print them")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        generator = Path(options.generator)
        engine = Path(options.engine) if options.engine else _export(generator, Path(scratch) / "engine")
        rows = list(_rows(options, generator, engine))
    if not options.no_rows:
        _keep(options.name, rows)
    return 0


def _export(generator: Path, out: Path) -> Path:
    from engine.export.generator import export_generator
    from gdpo.generator import OneStepGenerator

    export_generator(OneStepGenerator.from_pretrained(generator), out, model={"name": generator.name})
    return out


def _check(options: Any, up: Upscaler) -> None:
    """Refuse what would fail in the middle of the run."""
    multiple, (low, _, high) = up.manifest.geometry.multiple, up.manifest.profile.tile
    for side in options.sizes:
        if side % multiple or not low <= side <= high:
            raise ValueError(f"sizes must be multiples of {multiple} from {low} to {high}; got {side}")
    low, _, high = up.manifest.profile.batch
    for batch in options.batches:
        if not low <= batch <= high:
            raise ValueError(f"batches must be {low} to {high} for this model; got {batch}")
    if options.rounds < 1:
        raise ValueError(f"rounds must be at least 1; got {options.rounds}")


def _rows(options: Any, generator: Path, engine: Path):
    up = Upscaler.load(engine)
    _check(options, up)
    runs: dict[str, Run] = {}
    for name in options.contenders:
        try:
            runs[name] = open_contender(name, generator, engine, options.threads)
        except RuntimeError as error:
            print(f"{name}: left out ({error})", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        yield _show({"model": generator.name, **folding(generator, Path(scratch), options.threads, options.rounds)})
    about = {
        "model": up.manifest.model.get("name"),
        "weights_sha256": str(up.manifest.model.get("weights_sha256"))[:12],
    }
    for side in options.sizes:
        inputs = {batch: inputs_for(up, batch, side) for batch in options.batches}
        calls: dict[tuple[int, str], Callable[[], Any]] = {
            (batch, name): functools.partial(run, given)
            for batch, given in inputs.items()
            for name, run in runs.items()
        }
        for (batch, name), seconds in measure(calls, options.rounds).items():
            peak = peak_mib(name, generator, engine, options.threads, batch, side)
            row = {"what": "latency", "contender": name, "side": side, "batch": batch, **summary(seconds, batch)}
            yield _show(about | row | {"rounds": options.rounds, "peak_mib": peak})
        yield _show(about | {"what": "stages", "contender": up.backend, "side": side, **stages(up, side)})


def _show(row: dict[str, Any]) -> dict[str, Any]:
    figures = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "weights_sha256")
    print("  ".join(figures), flush=True)
    return row


def _keep(name: str, rows: list[dict[str, Any]]) -> None:
    from engine.io.rows import ROOT, append_row

    if not (ROOT / "benchmarks").is_dir():
        print("rows are kept in a checkout of the project only (run it from the root)", file=sys.stderr)
        return
    path = None
    for row in rows:
        path = append_row(name, **row)
    assert path is not None  # sizes and batches are never empty
    plot(rows, path.with_suffix(".png"))
    print(f"rows: {path}, plot: {path.with_suffix('.png')}", file=sys.stderr)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds a picture against the batch, a line for each contender and a panel for each size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [r for r in rows if r["what"] == "latency"]
    sides = sorted({r["side"] for r in timed})
    figure, panels = pyplot.subplots(1, len(sides), figsize=(5 * len(sides), 4), squeeze=False, layout="constrained")
    for panel, side in zip(panels[0], sides):
        for name in dict.fromkeys(r["contender"] for r in timed):
            line = sorted(
                (r["batch"], r["p50_ms"] / r["batch"]) for r in timed if (r["contender"], r["side"]) == (name, side)
            )
            panel.plot(*zip(*line), marker="o", label=name)
        panel.set(title=f"{side // 4} -> {side}", xlabel="batch", ylabel="ms a picture (median)", ylim=(0, None))
    panels[0][0].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def console() -> None:
    cli.run(main)


if __name__ == "__main__":
    console()
