"""OpenVINO on the CPU, for exported folders: it can compute in bfloat16 where the CPU has it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from engine.runtime.backends import Waiting, check_inputs
from engine.runtime.device import Device
from engine.runtime.manifest import FolderError, Manifest


@functools.cache
def computes_bf16() -> bool:
    """Whether OpenVINO is installed and computes in bfloat16 on this CPU."""
    try:
        import openvino

        return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except (ImportError, AttributeError, RuntimeError):  # also an installation without its CPU plugin
        return False


def open_session(
    manifest: Manifest,
    folder: Path,
    graph: str,
    device: str | None = None,
    *,
    threads: int = 0,
    precision: str = "fp32",
) -> OpenVinoSession:
    """Load an exported graph.

    Raises:
        RuntimeError: OpenVINO is not installed.
        FolderError: a folder with weights beside the model, which OpenVINO reads by path, past the hash check.
    """
    try:
        import openvino
    except ImportError as error:
        raise RuntimeError(
            f"backend openvino is not installed here ({error}); pip install 'gdpo-sr[openvino]'"
        ) from None
    Device.parse(device, ("cpu",), "openvino")
    model, data = manifest.read(folder, graph)
    if data:
        raise FolderError(f"{folder}: its weights are in files beside the model; use the onnxruntime backend")
    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "ENABLE_CPU_PINNING": False,  # else the processes of engine.bulk all pin their threads to the same core
    }
    if threads:
        settings["INFERENCE_NUM_THREADS"] = str(threads)
    return OpenVinoSession(core.compile_model(core.read_model(model), "CPU", settings), manifest, graph)


class OpenVinoSession(Waiting):
    """A compiled graph."""

    def __init__(self, compiled, manifest: Manifest, graph: str):
        self.compiled, self._request = compiled, compiled.create_infer_request()
        self.manifest, self.entry = manifest, manifest.graphs[graph]

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        check_inputs(self.entry, self.manifest, inputs)
        results = self._request.infer({k: np.ascontiguousarray(v) for k, v in inputs.items()}, share_inputs=True)
        return results[self.entry.output.name]
