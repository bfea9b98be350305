"""Sessions: one graph on one backend. A backend is imported when a folder asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np

from engine.runtime.manifest import Geometry, Graph, Manifest

MODULES = {
    "onnx": "engine.runtime.backends.onnxruntime",
    "onnxruntime": "engine.runtime.backends.onnxruntime",
    "tensorrt": "engine.runtime.backends.tensorrt",
    "tensorrt-rtx": "engine.runtime.backends.tensorrt",
    "openvino": "engine.runtime.backends.openvino",
}


@dataclass(frozen=True)
class Options:
    """How to run a folder.

    Attributes:
        device: "cpu", "cuda" or "cuda:N"; None lets the backend choose.
        threads: of a CPU backend; 0 lets it choose.
        trust_plan: load a TensorRT plan (executable code) that this user did not build.
        bf16: let OpenVINO (where the CPU has it) and torch compute in bfloat16.
        compiled: torch.compile on the torch backend, for one size of tile.
        whole_batches: hand a batch to ONNX Runtime in one piece on a CPU too, to check the graph.
    """

    device: str | None = None
    threads: int = 0
    trust_plan: bool = False
    bf16: bool = False
    compiled: bool = False
    whole_batches: bool = False


class Session(Protocol):
    """One loaded graph. One that can work in the background has `start(inputs)` too, which returns what waits."""

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run it. The result may be overwritten by the next call."""
        ...


def open_session(backend: str, manifest: Manifest, folder: Path, graph: str, options: Options) -> Session:
    """Load one graph of a folder on a backend.

    Raises:
        FolderError: the files do not fit the manifest, are stale or are not trusted.
        RuntimeError: the backend is not installed or cannot run here; the message names the remedy.
    """
    return import_module(MODULES[backend]).open_session(manifest, folder, graph, options)


def check_inputs(entry: Graph, manifest: Manifest, inputs: Mapping[str, np.ndarray]) -> None:
    """Refuse what a graph was not made for, before a backend fails deep inside.

    Raises:
        ValueError: a wrong name, type, rank, channel count, batch or tile side.
    """
    expected = {t.name: t for t in entry.inputs}
    if inputs.keys() != expected.keys():
        raise ValueError(f"inputs must be {', '.join(expected)}; got {', '.join(inputs)}")
    geometry, profile = manifest.geometry, manifest.profile
    for name, array in inputs.items():
        tensor = expected[name]
        if array.dtype != np.float32 or array.ndim != len(tensor.shape) or array.shape[1] != tensor.shape[1]:
            shape = ",".join(map(str, tensor.shape))
            raise ValueError(f"{name} must be float32 [{shape}]; got {array.dtype} {array.shape}")
        if not profile.batch[0] <= len(array) <= profile.batch[2]:
            low, _, high = profile.batch
            raise ValueError(
                f"a batch of {len(array)} is beyond the profile ({low} to {high}); build it with --max-batch"
            )
        unit = 1 if tensor.shape[2] == "height" else geometry.factor
        for side in array.shape[2:]:
            if not profile.tile[0] <= side * unit <= profile.tile[2] or side * unit % geometry.multiple:
                low, _, high = profile.tile
                raise ValueError(
                    f"{name} has a side of {side * unit} output pixels; the profile takes multiples of "
                    f"{geometry.multiple} from {low} to {high}"
                )


def output_shape(entry: Graph, geometry: Geometry, inputs: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    """The shape of a graph's output for inputs that `check_inputs` let pass."""
    first = entry.inputs[0]
    batch, _, height, width = inputs[first.name].shape
    unit = geometry.factor
    if first.shape[2] == "height":
        height, width = height // unit, width // unit
    sizes = {"batch": batch, "latent_height": height, "latent_width": width}
    sizes |= {"height": height * unit, "width": width * unit}
    return tuple(sizes[d] if isinstance(d, str) else d for d in entry.output.shape)
