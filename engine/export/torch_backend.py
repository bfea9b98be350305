"""torch on a generator's folder: as it is, the definition that other backends are compared with; or made fast.

With bf16 it is prepared by engine.export.optimise; on an NVIDIA GPU a shape that comes again is recorded as a CUDA
graph, with pinned host memory at both ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.export.descriptors import descriptors, geometry_of, profile_of
from engine.export.optimise import DEFINITION, Steps, fastest, prepare
from engine.runtime.backends import Waiting, check_inputs
from engine.runtime.device import Device
from engine.runtime.manifest import Manifest
from gdpo.generator import OneStepGenerator

KEPT_SHAPES = 4  # recorded graphs; each has buffers of its own
INDEXABLE = 2**31 - 1  # elements of one feature map that cuDNN and torch index with 32 bits
_WIDEST = 256  # channels at full size, in Stable Diffusion's decoder


def open_generator(
    folder: Path,
    device: str | None = None,
    *,
    threads: int = 0,
    precision: str = "fp32",
    compiled: bool = False,
    steps: Steps | None = None,
) -> tuple[Manifest, TorchSession]:
    """Load a generator's folder (not an engine folder) with everything an Upscaler needs; see `from_generator`."""
    generator = OneStepGenerator.from_pretrained(folder)
    return from_generator(generator, device, threads=threads, precision=precision, compiled=compiled, steps=steps)


def from_generator(
    generator: OneStepGenerator,
    device: str | None = None,
    *,
    threads: int = 0,
    precision: str = "fp32",
    compiled: bool = False,
    steps: Steps | None = None,
) -> tuple[Manifest, TorchSession]:
    """The same for a generator in memory.

    Args:
        generator: used as it is, or prepared in place.
        device: "cpu", "cuda" or "cuda:N"; None: the GPU where there is one.
        threads: of the CPU; 0 leaves torch's own number.
        precision: "fp32", the definition, or "bf16", made fast.
        compiled: torch.compile, for one size of tile.
        steps: what is done to the generator, instead of what precision and compiled ask for.

    Raises:
        RuntimeError: a GPU, or a compiler, that is not there.
        ValueError: an unknown device; CUDA graphs without CUDA, or of what is not folded; what `prepare` refuses.
    """
    place = _device(device)
    if steps is None:
        steps = fastest(place) if precision == "bf16" else DEFINITION
        if compiled:
            _require_compiler(place)
            steps = replace(steps, folded=True, compiled=True)
    if steps.graphs and place.type != "cuda":
        raise ValueError(f"steps.graphs needs an NVIDIA GPU (CUDA graphs); the device is {place}")
    if steps.graphs and not steps.folded:
        raise ValueError("steps.graphs needs steps.folded: a prompt encoded in between cannot be recorded")
    geometry = geometry_of(generator)
    batch = 8 if place.type == "cuda" else 1  # a CPU gains nothing from a batch
    profile = profile_of(geometry, batch=batch, max_batch=64, tile=512, max_tile=4096, static=False)
    if steps.compiled:  # one shape for pictures of any size: it is compiled once
        profile = replace(profile, batch=(1, 1, 1), tile=(profile.tile[1],) * 3)
    (_, entry), *_ = descriptors(generator, "fp32", split=False).values()
    manifest = Manifest("torch", torch.__version__, steps.precision, geometry, profile, {"generator": entry})
    if threads:
        torch.set_num_threads(threads)
    return manifest, TorchSession(generator.to(place), manifest, place, steps)


def _device(name: str | None) -> torch.device:
    """What `name` means here; None: the GPU where there is one."""
    kinds = ("cuda", "cpu") if name is None and torch.cuda.is_available() else ("cpu", "cuda")
    device = Device.parse(name, kinds, "torch")
    if device.kind == "cuda" and device.index >= torch.cuda.device_count():
        raise RuntimeError(f"device {name}: torch sees {torch.cuda.device_count()} NVIDIA GPU(s); use --device cpu")
    return torch.device("cuda", device.index) if device.kind == "cuda" else torch.device("cpu")


def _require_compiler(device: torch.device) -> None:
    """Refuse early what torch.compile would refuse at the first tile: on a CPU it runs $CXX or the platform's own."""
    own = {"linux": "g++", "darwin": "clang++"}.get(sys.platform)
    name = os.environ.get("CXX") or own
    if device.type == "cpu" and own and not shutil.which(str(name)):
        raise RuntimeError(f"torch.compile needs a C++ compiler, and {name} is not here; install {own}")


class TorchSession(Waiting):
    """A prepared generator on a device."""

    def __init__(self, generator: OneStepGenerator, manifest: Manifest, device: torch.device, steps: Steps):
        self.generator, self.manifest, self.device, self.steps = generator, manifest, device, steps
        with torch.no_grad():
            self.module = prepare(generator, steps)
        self._shapes: dict[tuple[int, ...], Recorded | None] = {}  # None: met, not recorded yet
        self._pool: Any = None  # of memory, for the recorded graphs
        # A stream for each graph that lives: graphs of one stream share cuBLAS's workspace, which goes with the first.
        self._streams = [torch.cuda.Stream(device) for _ in range(KEPT_SHAPES)] if steps.graphs else []

    def compile(self) -> None:
        """Compile (torch.compile), at the first call of each shape."""
        if self.generator.uses_text:
            self.generator.text_embeds(1)  # or the text encoder would be traced too
        self.module.compile(dynamic=False)

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        check_inputs(self.manifest.graphs["generator"], self.manifest, inputs)
        image, noise = (torch.from_numpy(np.ascontiguousarray(inputs[k])) for k in ("image", "noise"))
        if self.device.type != "cuda":
            return self.run(image, noise).numpy()
        with torch.cuda.device(self.device):
            image, noise = (t.pin_memory().to(self.device, non_blocking=True) for t in (image, noise))
            output = self.run(image, noise)
            result = torch.empty(output.shape, pin_memory=True)  # torch keeps pinned memory for the next call
            result.copy_(output, non_blocking=True)
            torch.cuda.current_stream().synchronize()
        return result.numpy()

    @torch.inference_mode()
    def run(self, image: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """image [B,3,H,W], noise [B,C,h,w] on the device -> output like image, overwritten by the next call."""
        at_once = max(1, INDEXABLE // (_WIDEST * image.shape[2] * image.shape[3]))
        pieces = -(-len(image) // at_once)
        if pieces == 1:
            return self._piece(image, noise)
        output = torch.empty_like(image)
        for part, *inputs in zip(*(t.tensor_split(pieces) for t in (output, image, noise))):
            part.copy_(self._piece(*inputs))
        return output

    def _piece(self, image: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        if not self.steps.graphs:
            return self.module(image, noise)
        shape = tuple(image.shape)
        again = shape in self._shapes
        recorded = self._shapes.pop(shape, None)
        while len(self._shapes) >= KEPT_SHAPES:
            self._shapes.pop(next(iter(self._shapes)))  # the one not used for longest
        if again and recorded is None:
            recorded = self._record(image, noise)
        self._shapes[shape] = recorded
        return recorded(image, noise) if recorded else self.module(image, noise)

    def _record(self, *inputs: torch.Tensor) -> Recorded:
        live = [recorded for recorded in self._shapes.values() if recorded]
        if not live and self.device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()  # a pool whose graphs are all gone is not taken up again
        free = (stream for stream in self._streams if all(stream is not recorded.stream for recorded in live))
        return Recorded(self.module, inputs, self._pool, next(free, None))

    def forget(self) -> None:
        """Free the recorded graphs and their memory."""
        self._shapes.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Recorded:
    """A CUDA graph of one shape: one launch instead of thousands. Inputs and output stay at their addresses."""

    def __init__(
        self, module: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], pool: Any, stream: Any = None
    ):
        self._inputs, self.stream = tuple(t.clone() for t in inputs), stream
        chosen = {} if stream is None else {"stream": stream}
        with _measured_convolutions():
            module(*self._inputs)  # what a recording must not do: measure, compile, allocate workspaces
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local", **chosen):
                self._output = module(*self._inputs)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        for own, given in zip(self._inputs, inputs):
            own.copy_(given)
        self._graph.replay()
        return self._output


@contextlib.contextmanager
def _measured_convolutions() -> Iterator[None]:
    """Inside, cuDNN chooses algorithms by measuring all of them (by itself torch tries the first 10).

    Results may differ by rounding from process to process.
    """
    cudnn: Any = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.benchmark_limit
    cudnn.benchmark, cudnn.benchmark_limit = True, 0
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.benchmark_limit = before
