"""TensorRT 10 and 11 and TensorRT-RTX, through the one Python API that they share.

A session keeps device buffers, pinned host memory and a CUDA graph for every shape it has met; two of each where the
next batch is prepared while the GPU works on this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np

from engine.runtime.backends import check_inputs, output_shape
from engine.runtime.backends.cuda import Buffer, CudaError, CudaGraph, Driver, Event, Stream
from engine.runtime.device import Device
from engine.runtime.manifest import FolderError, Manifest
from engine.runtime.trust import built_here

# The first name that imports is taken. The cu13 wheels bring the bindings without their front package.
_NAMES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_KEPT_SHAPES = 4
_AT_ONCE = 2  # batches


def load_module(backend: str) -> Any:
    """The Python module of a backend.

    Raises:
        RuntimeError: it is not installed or does not load; the message names the extra and the reason.
    """
    reasons = []
    for name in _NAMES[backend]:
        try:
            return import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            reasons.append(str(error))
    raise RuntimeError(
        f"backend {backend} is not installed here ({'; '.join(reasons)}); "
        f"pip install 'gdpo-sr[{backend}]', or build for onnxruntime, which needs no NVIDIA GPU"
    )


def version(backend: str) -> str:
    """The installed version of a backend."""
    return str(load_module(backend).__version__)


def open_session(
    manifest: Manifest, folder: Path, graph: str, device: str | None = None, *, trust_plan: bool = False
) -> TensorRTSession:
    """Load a plan: hashed, of this version, of this GPU and trusted, in this order, before TensorRT sees a byte."""
    backend = manifest.backend
    plan, _ = manifest.read(folder, graph)
    entry = manifest.graphs[graph]
    if not trust_plan and not built_here(entry.sha256):
        raise FolderError(
            f"{folder / entry.file}: a plan is executable code and this one was not built by you here; "
            "build it (python -m engine.build) or, if you trust its source, pass --trust-plan"
        )
    rebuild = f"build it again: python -m engine.build ONNX_FOLDER --backend {backend} --out {folder}"
    module = load_module(backend)
    flexible = bool(manifest.options.get("version_compatible"))
    if module.__version__ != manifest.backend_version and not flexible:
        raise FolderError(
            f"{folder}: built by {backend} {manifest.backend_version}, here is {module.__version__}; {rebuild}"
        )
    driver = Driver(Device.parse(device, ("cuda",), backend).index)
    if manifest.architecture and manifest.architecture != driver.architecture():
        raise FolderError(
            f"{folder}: built for {manifest.architecture}, this GPU is {driver.architecture()}; {rebuild}"
        )
    try:
        return TensorRTSession(module, driver, manifest, graph, plan, flexible)
    except FolderError as error:
        raise FolderError(f"{folder / entry.file}: {error}; {rebuild}") from None


class _Shape:
    """What one shape of inputs needs: buffers that stay, and the recorded graph."""

    def __init__(self, driver: Driver, inputs: Mapping[str, np.ndarray], output: str, shape: tuple[int, ...]):
        self.buffers = {name: Buffer(driver, array.shape) for name, array in inputs.items()}
        self.output = Buffer(driver, shape)
        self.addresses = {n: b.device.value for n, b in self.buffers.items()} | {output: self.output.device.value}
        self.graph: CudaGraph | None = None
        self.graph_refused = False
        self.done, self.busy = Event(driver), False
        self.left: np.ndarray | None = None  # the output that outlives the buffers

    def wait(self) -> np.ndarray:
        """The output, when it is there."""
        if self.left is not None:
            return self.left
        self.done.synchronize()
        self.busy = False
        return self.output.host

    def close(self) -> None:
        if self.busy:  # somebody may still wait for it
            self.left = self.wait().copy()
        for part in (*self.buffers.values(), self.output, self.graph, self.done):
            if part is not None:
                part.close()


class TensorRTSession:
    """A deserialised plan with its execution context."""

    at_once = _AT_ONCE

    def __init__(self, module: Any, driver: Driver, manifest: Manifest, graph: str, plan: bytes, flexible: bool):
        self.manifest, self.entry, self._driver = manifest, manifest.graphs[graph], driver
        self._log: list[str] = []
        self._runtime = module.Runtime(logger(module, self._log))
        self._runtime.engine_host_code_allowed = flexible  # a version-compatible plan carries its own runtime
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise FolderError(f"{manifest.backend} refuses the plan ({' '.join(self._log) or 'no reason'})")
        self._stream = Stream(driver)
        self._contexts: dict[int, Any] = {}  # of each optimisation profile that was needed
        self._shapes: dict[tuple, list[_Shape]] = {}

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        return self.start(inputs)()

    def start(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], np.ndarray]:
        """Put a batch on the GPU and return what waits for its result. At most two are under way."""
        check_inputs(self.entry, self.manifest, inputs)
        self._driver.activate()
        state = self._state(inputs)
        for name, array in inputs.items():
            state.buffers[name].host[...] = array
            state.buffers[name].upload(self._stream)
        if state.graph is not None:
            state.graph.launch(self._stream)
        else:
            self._stream.synchronize()  # addresses and shapes are the context's, which may be at work
            context = self._context(inputs)
            self._bind(context, state, inputs)
            self._enqueue(context)
            self._record(context, state)
        state.output.download(self._stream)
        state.done.record(self._stream)
        state.busy = True
        return state.wait

    def _state(self, inputs: Mapping[str, np.ndarray]) -> _Shape:
        key = tuple(inputs[t.name].shape for t in self.entry.inputs)
        states = self._shapes.pop(key, [])  # the one that was started first comes first
        while len(self._shapes) >= _KEPT_SHAPES:
            self._close(self._shapes.pop(next(iter(self._shapes))))
        self._shapes[key] = states  # the shape used last comes last
        state = next((s for s in states if not s.busy), None)
        if state is None and len(states) == _AT_ONCE:
            state = states[0]  # left behind by a run that was cancelled
            state.wait()
        if state is None:
            shape = output_shape(self.entry, self.manifest.geometry, inputs)
            state = _Shape(self._driver, inputs, self.entry.output.name, shape)
        else:
            states.remove(state)
        states.append(state)
        return state

    def _close(self, states: list[_Shape]) -> None:
        self._stream.synchronize()
        for state in states:
            state.close()

    def _context(self, inputs: Mapping[str, np.ndarray]) -> Any:
        """The context of the profile for these shapes: the last of several is for the usual one (engine.build)."""
        usual, factor = self.manifest.profile.usual, self.manifest.geometry.factor
        last, at = self._engine.num_optimization_profiles - 1, 0
        sides = [(t.name, usual.tile[0] // (1 if t.shape[2] == "height" else factor)) for t in self.entry.inputs]
        if all((inputs[n].shape[0], *inputs[n].shape[2:]) == (usual.batch[0], side, side) for n, side in sides):
            at = last
        if at not in self._contexts:
            context = self._engine.create_execution_context()
            if context is None or not (
                at == 0 or context.set_optimization_profile_async(at, self._stream.handle.value)
            ):
                raise RuntimeError(f"{self.entry.file}: no context ({' '.join(self._log[-1:]) or 'no reason given'})")
            self._contexts[at] = context
        return self._contexts[at]

    def _bind(self, context: Any, state: _Shape, inputs: Mapping[str, np.ndarray]) -> None:
        for name, array in inputs.items():
            if not context.set_input_shape(name, array.shape):
                raise ValueError(f"{name} {array.shape} is beyond the plan's profile ({' '.join(self._log[-1:])})")
        for name, address in state.addresses.items():
            context.set_tensor_address(name, address)

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.handle.value):
            raise RuntimeError(f"{self.entry.file}: the plan failed ({' '.join(self._log[-3:])})")

    def _record(self, context: Any, state: _Shape) -> None:
        """After the first run of a shape (which sets up what a capture must not), record it."""
        if state.graph_refused:
            return
        self._stream.synchronize()
        try:
            state.graph = self._stream.capture(lambda: self._enqueue(context))
        except (CudaError, RuntimeError) as error:  # some layers cannot be captured; the plan runs without a graph
            state.graph_refused = True
            self._log.append(f"no CUDA graph: {error}")

    def close(self) -> None:
        for states in self._shapes.values():
            self._close(states)
        self._shapes.clear()
        self._stream.close()


def logger(module: Any, lines: list[str], echo: Any = None) -> Any:
    """A TensorRT logger that keeps warnings and errors in `lines`; `echo(text)` gets them and the information too."""

    class Log(module.ILogger):
        def __init__(self):
            super().__init__()

        def log(self, severity, message):
            important = severity in (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR, module.ILogger.WARNING)
            if important:
                lines.append(message)
            if echo and (important or severity == module.ILogger.INFO):
                echo(message)

    return Log()


def installed_packages() -> list[str]:
    """Installed distributions of TensorRT, for a build's record."""
    names = (d.metadata["Name"] for d in metadata.distributions())
    return sorted({f"{n} {metadata.version(n)}" for n in names if n and n.lower().startswith("tensorrt")})
