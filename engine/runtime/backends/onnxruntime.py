"""ONNX Runtime, on the CPU or an NVIDIA GPU: threads set, results bound to buffers that persist."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from engine.runtime.backends import Waiting, check_inputs, output_shape
from engine.runtime.device import Device
from engine.runtime.manifest import FolderError, Manifest, Tensor

KINDS = ("cpu", "cuda")  # of devices


def open_session(
    manifest: Manifest,
    folder: Path,
    graph: str,
    device: str | None = None,
    *,
    threads: int = 0,
    whole_batches: bool = False,
) -> OnnxRuntimeSession:
    """Load a graph. The bytes that were hashed are the bytes that ONNX Runtime parses."""
    import onnxruntime

    if manifest.backend == "onnxruntime" and _minor(manifest.backend_version) != _minor(onnxruntime.__version__):
        raise FolderError(
            f"{folder}: optimised by ONNX Runtime {manifest.backend_version}, here is {onnxruntime.__version__}; "
            f"build it again: python -m engine.build ONNX_FOLDER --backend onnxruntime --out {folder}"
        )
    place = Device.parse(device, KINDS, manifest.backend)
    check_precision(manifest, folder, place)
    model, data = manifest.read(folder, graph)
    with refused(folder / manifest.graphs[graph].file):
        return OnnxRuntimeSession(manifest, graph, model, data, place, threads=threads, whole_batches=whole_batches)


@contextmanager
def refused(file: Path) -> Iterator[None]:
    """Turn ONNX Runtime's own exceptions, which have no common base, into a FolderError that names the file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (FolderError, MemoryError)) or not type(error).__module__.startswith("onnxruntime"):
            raise
        raise FolderError(f"{file}: ONNX Runtime refuses it ({error})") from error


def check_precision(manifest: Manifest, folder: Path, device: Device | None = None) -> None:
    """Refuse what ONNX Runtime's CPU has no kernels for.

    Raises:
        FolderError: bf16 on a CPU.
    """
    if manifest.precision == "bf16" and (device is None or device.kind == "cpu"):
        raise FolderError(
            f"{folder}: bf16, and ONNX Runtime has no bf16 convolution on a CPU; take --backend openvino, build it for "
            "tensorrt or tensorrt-rtx, or export it in fp32 (for OpenVINO that computes in bf16: --precision bf16)"
        )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def session_options(threads: int):
    """Settings of every session in this project."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 4  # errors are raised, not printed
    # Tiles come in many shapes over a long folder: an arena and memory patterns would keep the peak of each.
    settings.enable_mem_pattern = False
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return settings


class OnnxRuntimeSession(Waiting):
    """A loaded graph."""

    def __init__(
        self,
        manifest: Manifest,
        graph: str,
        model: bytes,
        data: Mapping[str, bytes],
        device: Device,
        *,
        threads: int,
        whole_batches: bool,
    ):
        import onnxruntime

        self.manifest, self.entry = manifest, manifest.graphs[graph]
        providers: list = ["CPUExecutionProvider"]
        if device.kind == "cuda":
            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                raise RuntimeError(
                    "device cuda: this ONNX Runtime has no CUDA provider; pip install onnxruntime-gpu instead of "
                    "onnxruntime, or use --device cpu"
                )
            providers = [("CUDAExecutionProvider", {"device_id": device.index}), *providers]
        settings = session_options(threads)
        if data:
            names = list(data)
            settings.add_external_initializers_from_files_in_memory(
                names, list(data.values()), [len(data[n]) for n in names]
            )
        self._session = onnxruntime.InferenceSession(model, settings, providers=providers)
        self._data = data  # ONNX Runtime reads the weights where they are
        self._buffer = np.empty(0, np.float32)  # of the largest result so far
        # A CPU gains nothing from a batch and its caches lose by it (13% a picture at 8 x 256x256): one at a time.
        whole = whole_batches or device.kind != "cpu" or manifest.profile.batch[0] > 1
        self._at_once = None if whole else 1
        self._compare()

    def _compare(self) -> None:
        """The model's inputs and outputs must be what the manifest says they are (as in C++).

        Raises:
            FolderError: other names, types, ranks, or sides that are free in one and fixed in the other.
        """
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        found, wanted = [*inputs, *outputs], [*self.entry.inputs, self.entry.output]

        def fits(ours: Tensor, theirs: Any) -> bool:
            if ours.name != theirs.name or theirs.type != "tensor(float)" or len(theirs.shape) != len(ours.shape):
                return False
            sides = [self.manifest.fixed_side(side) if isinstance(side, str) else side for side in ours.shape]
            return all(not isinstance(b, int) or b < 0 or b == a for a, b in zip(sides, theirs.shape))

        whole = len(inputs) == len(self.entry.inputs) and len(outputs) == 1
        if not whole or not all(any(fits(ours, theirs) for theirs in found) for ours in wanted):
            names = f"{', '.join(i.name for i in inputs)}, outputs {', '.join(o.name for o in outputs)}"
            shapes = ", ".join(f"{t.name} {t.shape}" for t in found)
            raise FolderError(f"{self.entry.file}: inputs are {names}, not what the manifest says ({shapes})"[:2000])

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        check_inputs(self.entry, self.manifest, inputs)
        shape = output_shape(self.entry, self.manifest.geometry, inputs)
        size = math.prod(shape)
        if size > self._buffer.size:
            self._buffer = np.empty(size, np.float32)
        result = self._buffer[:size].reshape(shape)
        for part in range(0, shape[0], self._at_once or shape[0]):
            rows = slice(part, part + (self._at_once or shape[0]))
            sources = {name: np.ascontiguousarray(array[rows]) for name, array in inputs.items()}
            binding = self._session.io_binding()
            for name, array in sources.items():
                binding.bind_cpu_input(name, array)
            target = result[rows]
            binding.bind_output(self.entry.output.name, "cpu", 0, np.float32, target.shape, target.ctypes.data)
            self._session.run_with_iobinding(binding)
        return result
