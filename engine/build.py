"""Build an exported folder for a backend: `python -m engine.build ONNX_FOLDER --backend tensorrt --out DIR`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from engine import cli
from engine import manifest as manifests
from engine.backends.tensorrt import load_module, logger
from engine.files import atomic_write, sha256
from engine.manifest import PLANS, FolderError, Graph, Manifest, Profile
from gdpo.storage import staged_folder  # imports no torch

TARGETS = ("onnxruntime", *PLANS)


@dataclass(frozen=True)
class BuildOptions:
    """What changes a plan.

    Attributes:
        workspace_mib: memory that TensorRT may use while it runs; None: all of the GPU's.
        optimization_level: 0 (fast build) to 5 (fast plan).
        refit: keep weights replaceable.
        version_compatible: the plan also runs on later versions (and carries its runtime).
        architectures: of TensorRT-RTX: GPUs to compile for ahead of time, such as sm_89; none: compiled where it runs.
    """

    workspace_mib: int | None = None
    optimization_level: int = 3
    refit: bool = False
    version_compatible: bool = False
    architectures: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        return {**self.__dict__, "architectures": list(self.architectures)}

    def check(self, backend: str) -> None:
        """Refuse a choice that a backend does not have.

        Raises:
            ValueError: naming the option.
        """
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if changed and backend not in PLANS:
            raise ValueError(f"{', '.join(changed)}: for {' and '.join(PLANS)} only; {backend} builds no plan")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise ValueError(f"workspace_mib must be at least 1; got {self.workspace_mib}")


def build(
    source: Path,
    out: Path,
    backend: str,
    *,
    profile: Profile | None = None,
    options: BuildOptions | None = None,
    timing_cache: Path | None = None,
    log: Callable[[str], None] | None = None,
    force: bool = False,
) -> tuple[Manifest, bool]:
    """Build a folder, whole or not at all.

    Args:
        source: a folder that engine.export wrote.
        out: the folder to write. It is left alone when it is up to date: made of the same files, by the same version,
            with the same options.
        backend: "onnxruntime", "tensorrt" or "tensorrt-rtx".
        profile: batch and tile sides; None takes the exported folder's. A static export has only its own.
        options: of a plan.
        timing_cache: of tensorrt: a file that remembers measurements between builds; made when missing.
        log: gets TensorRT's messages.
        force: build even when up to date.

    Returns:
        The manifest, and whether anything was built.

    Raises:
        FolderError, ValueError: a source that is no export, or a profile beyond it.
        RuntimeError: the backend is not installed, or refuses the model (with everything it said).
    """
    exported = manifests.load(source)
    if exported.backend != "onnx":
        raise FolderError(f"{source} is built for {exported.backend} already; build from the folder of engine.export")
    if backend not in TARGETS:
        raise ValueError(f"backend must be one of {', '.join(TARGETS)}; got {backend!r}")
    if out.resolve() == source.resolve():
        raise ValueError(f"out must be another folder than {source}")
    manifests.check_target(out)
    if timing_cache is not None and backend != "tensorrt":
        raise ValueError(f"timing_cache is for tensorrt; {backend} measures nothing while it builds")
    options = options or BuildOptions()
    options.check(backend)
    profile = _within(profile or exported.profile, exported)
    built = replace(
        exported,
        backend=backend,
        backend_version=_version(backend),
        profile=profile,
        source={name: graph.sha256 for name, graph in exported.graphs.items()},
        options={"export": dict(exported.options)} | (options.record() if backend in PLANS else {}),
        architecture=_architecture(backend),
        extras={},
    )
    if not force and _up_to_date(out, built):
        return manifests.load(out), False
    with staged_folder(out) as folder:
        graphs: dict[str, Graph] = {}
        for name, entry in exported.graphs.items():
            if backend == "onnxruntime":
                graphs[name] = _optimise(exported, source, name, folder)
            else:
                plan = _plan(
                    exported, source, name, backend, profile, options, timing_cache, log or (lambda text: None)
                )
                file = folder / f"{name}.plan"
                file.write_bytes(plan)
                graphs[name] = replace(entry, file=file.name, sha256=sha256(file), data={})
        built = replace(built, graphs=graphs)
        built.save(folder)
    for graph in graphs.values():
        if backend in PLANS:
            manifests.remember_plan(graph.sha256)
    return built, True


def _within(profile: Profile, exported: Manifest) -> Profile:
    allowed = exported.profile
    for name, wanted, (low, _, high) in (
        ("batch", profile.batch, allowed.batch),
        ("tile", profile.tile, allowed.tile),
    ):
        if wanted[0] < low or wanted[2] > high:
            raise ValueError(
                f"{name} {wanted[0]} to {wanted[2]} is beyond what was exported ({low} to {high}); export again"
            )
        if name == "tile" and any(side % exported.geometry.multiple for side in wanted):
            raise ValueError(f"tile sides must be multiples of {exported.geometry.multiple}; got {wanted}")
    return profile


def _version(backend: str) -> str:
    if backend in PLANS:
        return str(load_module(backend).__version__)
    import onnxruntime

    return onnxruntime.__version__


def _architecture(backend: str) -> str | None:
    """TensorRT builds for the GPU it measures on; TensorRT-RTX compiles for a GPU where the plan is loaded."""
    if backend != "tensorrt":
        return None
    from engine.backends.cuda import Driver

    return Driver().architecture()


def _up_to_date(out: Path, wanted: Manifest) -> bool:
    try:
        found = manifests.load(out)
        for name in found.graphs:
            found.read(out, name)
    except FolderError:
        return False
    ignored: dict[str, Any] = {"graphs": wanted.graphs}
    return replace(found, **ignored) == wanted and found.graphs.keys() == wanted.graphs.keys()


def _optimise(exported: Manifest, source: Path, name: str, folder: Path) -> Graph:
    """ONNX Runtime's optimised model. Layouts that depend on the CPU are left to the machine that loads it."""
    import onnxruntime

    from engine.backends.onnxruntime import check_precision, refused, session_options

    entry = exported.graphs[name]
    check_precision(exported, source)
    model, data = exported.read(source, name)
    settings = session_options(0)
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    settings.optimized_model_filepath = str(folder / entry.file)
    hashes = {}
    if data:
        names = list(data)
        settings.add_external_initializers_from_files_in_memory(
            names, list(data.values()), [len(data[n]) for n in names]
        )
        side = f"{entry.file}.data"
        settings.add_session_config_entry("session.optimized_model_external_initializers_file_name", side)
    with refused(source / entry.file):
        onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    if data:
        hashes = {side: sha256(folder / side)}
    return replace(entry, sha256=sha256(folder / entry.file), data=hashes)


# ---- TensorRT


def _plan(
    exported: Manifest,
    source: Path,
    name: str,
    backend: str,
    profile: Profile,
    options: BuildOptions,
    timing_cache: Path | None,
    log: Callable[[str], None],
) -> bytes:
    """Parse one graph and build its plan."""
    trt = load_module(backend)
    entry = exported.graphs[name]
    lines: list[str] = []
    builder = trt.Builder(logger(trt, lines, log))
    flags = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flags is None else 1 << int(flags))
    parser = trt.OnnxParser(network, builder.logger)
    model, data = exported.read(source, name)
    # Weights beside the model are found by its path; they have just been hashed.
    parsed = parser.parse_from_file(str(source / entry.file)) if data else parser.parse(model)
    if not parsed:
        raise FolderError(f"{source / entry.file}: {backend} cannot parse it: {_parse_errors(parser) or lines}")
    _decompose_attention(trt, network)
    config = builder.create_builder_config()
    _configure(trt, config, options)
    if not profile.static:
        config.add_optimization_profile(_optimisation_profile(builder, exported, entry, profile))
    cache = None
    if timing_cache is not None:
        cache = config.create_timing_cache(timing_cache.read_bytes() if timing_cache.is_file() else b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    config.progress_monitor = _monitor(trt, name, log)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise FolderError(f"{source / entry.file}: {backend} cannot build it: {' '.join(lines) or 'no reason given'}")
    if timing_cache is not None and cache is not None:
        timing_cache.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(timing_cache, bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def _parse_errors(parser: Any) -> str:
    errors = (parser.get_error(i) for i in range(parser.num_errors))
    return "; ".join(str(e) for e in errors)


def _decompose_attention(trt: Any, network: Any) -> None:
    """Let an Attention without a fused kernel (every one in fp32, odd head sizes in fp16) fall apart into products."""
    kind = getattr(trt, "IAttentionInputLayer", None)
    if kind is None:
        return
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = kind  # the bindings return the base class
            layer.attention.decomposable = True


def _configure(trt: Any, config: Any, options: BuildOptions) -> None:
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    config.builder_optimization_level = options.optimization_level
    for flag, wanted in (("REFIT", options.refit), ("VERSION_COMPATIBLE", options.version_compatible)):
        if wanted:
            config.set_flag(getattr(trt.BuilderFlag, flag))
    if options.architectures:
        known = getattr(trt, "ComputeCapability", None)
        if known is None:
            raise ValueError("architectures are a choice of tensorrt-rtx; tensorrt builds for the GPU it runs on")
        config.num_compute_capabilities = len(options.architectures)
        for i, text in enumerate(options.architectures):
            name = text.upper().replace("_", "")
            if name not in known.__members__:
                usable = ", ".join(k.lower().replace("sm", "sm_") for k in known.__members__ if k.startswith("SM"))
                raise ValueError(f"architecture {text} is not one of this version's: {usable}")
            config.set_compute_capability(known.__members__[name], i)


def _optimisation_profile(builder: Any, exported: Manifest, entry: Graph, profile: Profile) -> Any:
    made = builder.create_optimization_profile()
    factor = exported.geometry.factor
    for tensor in entry.inputs:
        unit = 1 if tensor.shape[2] == "height" else factor
        shapes = [(b, tensor.shape[1], t // unit, t // unit) for b, t in zip(profile.batch, profile.tile)]
        made.set_shape(tensor.name, *shapes)
    return made


def _monitor(trt: Any, name: str, log: Callable[[str], None]) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Reports the phases of a build."""

        def __init__(self):
            super().__init__()

        def phase_start(self, phase_name, parent_phase, num_steps):
            log(f"{name}: {phase_name} ({num_steps} steps)")

        def phase_finish(self, phase_name):
            pass

        def step_complete(self, phase_name, step):
            return True  # go on

    return Monitor()


# ---- command line


def profile_from(options: Any, exported: Manifest) -> Profile:
    """A profile from shapes as trtexec takes them (image:1x3x64x64) or from the exported folder."""
    low, usual, high = (_shape(text, exported) for text in (options.min_shapes, options.opt_shapes, options.max_shapes))
    old = exported.profile
    batch = tuple(s[0] if s else b for s, b in zip((low, usual, high), old.batch))
    tile = tuple(s[1] if s else t for s, t in zip((low, usual, high), old.tile))
    if list(batch) != sorted(batch) or list(tile) != sorted(tile):
        raise ValueError(f"min, opt and max shapes must rise; got batches {batch} and sides {tile}")
    return Profile((batch[0], batch[1], batch[2]), (tile[0], tile[1], tile[2]))


def _shape(text: str | None, exported: Manifest) -> tuple[int, int] | None:
    """(batch, tile side in output pixels) of "image:1x3x512x512", of any one input."""
    if text is None:
        return None
    first = text.split(",")[0]
    found = re.fullmatch(r"(\w+):(\d+)x(\d+)x(\d+)x(\d+)", first)
    tensors = {t.name: t for graph in exported.graphs.values() for t in graph.inputs}
    if not found or found[1] not in tensors or found[4] != found[5]:
        raise ValueError(f"{text!r} is not a shape such as image:1x3x512x512 (a square; inputs: {', '.join(tensors)})")
    unit = 1 if tensors[found[1]].shape[2] == "height" else exported.geometry.factor
    return int(found[2]), int(found[4]) * unit


def main() -> int:
    parser = cli.Parser(prog="python -m engine.build", description="Build an exported folder for a backend.")
    parser.add_argument("folder", help="written by engine.export")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument(
        "--backend", choices=TARGETS, help="default: tensorrt where it and an NVIDIA GPU are, else onnxruntime"
    )
    for which in ("min", "opt", "max"):
        parser.add_argument(f"--{which}-shapes", metavar="image:BxCxHxW", help="default: what was exported")
    parser.add_argument("--timing-cache", help="file that remembers measurements between builds")
    parser.add_argument("--builder-optimization-level", type=int, default=3, choices=range(6))
    parser.add_argument("--version-compatible", action="store_true")
    parser.add_argument("--refit", action="store_true")
    parser.add_argument("--workspace", type=int, metavar="MIB")
    parser.add_argument(
        "--architecture", nargs="+", default=[], help="of tensorrt-rtx: sm_89 ... compiled ahead of time"
    )
    parser.add_argument("--overwrite", action="store_true", help="build even when up to date")
    parser.add_argument("--quiet", action="store_true", help="do not show what the backend says")
    options = parser.parse_args()
    source, out = Path(options.folder), Path(options.out)
    backend = options.backend or _default_backend()
    chosen = BuildOptions(
        options.workspace,
        options.builder_optimization_level,
        options.refit,
        options.version_compatible,
        tuple(options.architecture),
    )
    profile = profile_from(options, manifests.load(source))
    cache = Path(options.timing_cache) if options.timing_cache else None

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    manifest, built = build(
        source,
        out,
        backend,
        profile=profile,
        options=chosen,
        timing_cache=cache,
        log=None if options.quiet else log,
        force=options.overwrite,
    )
    from engine.info import describe

    print(describe(out, manifest))
    print("built" if built else "up to date (--overwrite builds it again)", file=sys.stderr)
    return 0


def _default_backend() -> str:
    try:
        load_module("tensorrt")
        _architecture("tensorrt")
    except RuntimeError:
        return "onnxruntime"
    return "tensorrt"


def console() -> None:
    cli.run(main)


if __name__ == "__main__":
    console()
