"""TensorRT's and TensorRT-RTX's plans of an exported graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from engine.build.weights import widened
from engine.io.files import atomic_write
from engine.runtime.backends.registry import PLANS
from engine.runtime.backends.tensorrt import load_module, logger
from engine.runtime.manifest import FolderError, Graph, Manifest, Profile


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


def build_plan(
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
    if exported.options.get("weights") == "int8":  # TensorRT takes int8 weights behind a DequantizeLinear alone
        import onnx

        model = widened(onnx.load_from_string(model)).SerializeToString()
    # Weights beside the model are found by its path; they have just been hashed.
    parsed = parser.parse_from_file(str(source / entry.file)) if data else parser.parse(model)
    if not parsed:
        raise FolderError(f"{source / entry.file}: {backend} cannot parse it: {_parse_errors(parser) or lines}")
    _decompose_attention(trt, network)
    config = builder.create_builder_config()
    _configure(trt, config, options)
    if not exported.profile.static:
        # The usual shape has kernels of its own, and not those of a range. backends.tensorrt chooses.
        for each in dict.fromkeys((profile, profile.usual)):
            config.add_optimization_profile(_optimisation_profile(builder, exported, entry, each))
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
