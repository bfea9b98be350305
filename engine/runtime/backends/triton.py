"""Triton Inference Server: tiles go there over gRPC; cutting, noise, blending and colours stay here.

The server has a model for each graph, as `engine.build --triton-repository` writes them. The configuration of the first
one holds the manifest, so a client needs nothing but the server's address.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what fails is an exception; its own log would come on top

import numpy as np
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from engine.runtime import manifest as manifests
from engine.runtime.backends import check_inputs, output_shape
from engine.runtime.manifest import FolderError, Graph, Manifest
from engine.runtime.repository import MANIFEST, NAME, batched, dims, model_name

AT_ONCE = 8  # batches under way: the server's dynamic batcher joins them
_PATIENCE = 10.0  # seconds for an answer that needs no work
_STARTS = ("generator", "encoder")  # the graph that a folder begins with


@dataclass(frozen=True)
class _Server:
    """A server, and how long it may take."""

    client: Any
    url: str
    timeout: float

    def config(self, name: str) -> Any:
        """A model's configuration, a ModelConfig; None where there is no such model."""
        try:
            return self.client.get_model_config(name, client_timeout=_PATIENCE).config
        except InferenceServerException as error:
            if error.status() in ("StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED"):
                raise self.fault(error, _PATIENCE) from None
            return None

    def names(self) -> str:
        """The models that are ready, for a message."""
        try:
            models = self.client.get_model_repository_index(client_timeout=_PATIENCE).models
        except InferenceServerException:
            return "unknown"
        return ", ".join(sorted({m.name for m in models if m.state in ("READY", "")})) or "none"

    def fault(self, error: InferenceServerException, seconds: float) -> RuntimeError:
        """What a failed call means to whoever made it."""
        said = " ".join(str(error.message() or "").split())[:300]
        match error.status():
            case "StatusCode.DEADLINE_EXCEEDED":
                advice = "is it up?" if seconds == _PATIENCE else "--timeout gives it more"
                return RuntimeError(f"{self.url}: no answer within {seconds:g} seconds; {advice}")
            case "StatusCode.UNAVAILABLE":
                return RuntimeError(
                    f"{self.url}: no Triton Inference Server answers there ({said}); --url is HOST:PORT of its gRPC "
                    "port, 8001 unless that was changed"
                )
        return RuntimeError(f"{self.url}: the server refuses ({said})")


def open_server(
    name: str, device: str | None = None, *, url: str, timeout: float = 60
) -> tuple[Manifest, dict[str, TritonSession]]:
    """The manifest and all graphs of a model on a server.

    Args:
        name: of the model; "" takes NAME.
        device: None; where a model runs is the server's choice.
        url: HOST:PORT of the server's gRPC port.
        timeout: seconds that a batch of tiles may take, waiting included.

    Raises:
        RuntimeError: there is no server, or it does not answer.
        FolderError: it has no such model, or one that does not fit its manifest.
        ValueError: an argument is not what it should be.
    """
    if device is not None:
        raise ValueError(f"device: where a model runs is the server's choice (config.pbtxt); got {device!r}")
    if not re.fullmatch(r"[^/\s]+:\d{1,5}", url):
        raise ValueError(f"url must be HOST:PORT of the server's gRPC port, such as localhost:8001; got {url!r}")
    if not (timeout > 0 and math.isfinite(timeout)):
        raise ValueError(f"timeout must be more than 0 seconds; got {timeout}")
    server = _Server(grpc.InferenceServerClient(url), url, timeout)
    try:
        server.client.is_server_live(client_timeout=_PATIENCE)
    except InferenceServerException as error:
        raise server.fault(error, _PATIENCE) from None
    name = name or NAME
    manifest = _manifest(server, name)
    configs = {graph: server.config(model_name(name, graph)) for graph in manifest.graphs}
    for graph, config in configs.items():
        if config is None:
            raise FolderError(f"{url}: model {name} needs {model_name(name, graph)}, which is not there")
        _check(server, config, manifest, manifest.graphs[graph])
    if batched(manifest.profile):
        low, usual, _ = manifest.profile.batch
        most = min(config.max_batch_size for config in configs.values())
        manifest = replace(manifest, profile=replace(manifest.profile, batch=(low, min(usual, most), most)))
    sessions = {graph: TritonSession(server, manifest, graph, model_name(name, graph)) for graph in manifest.graphs}
    return manifest, sessions


def _manifest(server: _Server, name: str) -> Manifest:
    found = (server.config(model_name(name, graph)) for graph in _STARTS)
    config = next((c for c in found if c is not None), None)
    if config is None:
        raise FolderError(f"{server.url}: no model {name} is ready there; ready: {server.names()}")
    if MANIFEST not in config.parameters:
        raise FolderError(
            f"{server.url}: model {name} was not written by engine.build --triton-repository (no {MANIFEST})"
        )
    try:
        return manifests.parse(config.parameters[MANIFEST].string_value.encode())
    except FolderError as error:
        raise FolderError(f"{server.url}: {MANIFEST} of model {name}: {error}") from None


def _check(server: _Server, config: Any, manifest: Manifest, graph: Graph) -> None:
    """Refuse a configuration that is not the manifest's."""
    joined, theirs = batched(manifest.profile), f"max_batch_size {config.max_batch_size}"
    if joined != (config.max_batch_size > 0):
        raise _misfit(
            server, f"model {config.name} has {theirs}", "a batch of any size" if joined else "one size of batch"
        )
    for kind, tensors, ours in (("input", config.input, graph.inputs), ("output", config.output, (graph.output,))):
        shapes = {tensor.name: list(tensor.dims) for tensor in tensors}
        wanted = {tensor.name: dims(tensor, manifest.geometry, manifest.profile) for tensor in ours}
        if shapes != wanted:
            raise _misfit(server, f"{kind} of model {config.name} is {_shapes(shapes)}", _shapes(wanted))


def _misfit(server: _Server, found: str, wanted: str) -> FolderError:
    return FolderError(
        f"{server.url}: {found}, its manifest says {wanted}; write it again: python -m engine.build ONNX_FOLDER "
        "--triton-repository DIR"
    )


def _shapes(tensors: Mapping[str, list[int]]) -> str:
    return " and ".join(f"{name} [{','.join(map(str, shape))}]" for name, shape in tensors.items()) or "nothing"


class TritonSession:
    """A graph on a server."""

    at_once = AT_ONCE

    def __init__(self, server: _Server, manifest: Manifest, graph: str, name: str):
        self.manifest, self.entry = manifest, manifest.graphs[graph]
        self._server, self._name = server, name

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        return self.start(inputs)()

    def start(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], np.ndarray]:
        """Send a batch and return what waits for its result."""
        check_inputs(self.entry, self.manifest, inputs)
        sent = [grpc.InferInput(name, list(array.shape), "FP32") for name, array in inputs.items()]
        for tensor, array in zip(sent, inputs.values()):
            tensor.set_data_from_numpy(np.ascontiguousarray(array))
        done: Future[Any] = Future()

        def answered(result: Any, error: InferenceServerException | None) -> None:
            if error is None:
                done.set_result(result)
            else:
                done.set_exception(self._server.fault(error, self._server.timeout))

        output = self.entry.output.name
        self._server.client.async_infer(
            self._name, sent, answered, outputs=[grpc.InferRequestedOutput(output)], client_timeout=self._server.timeout
        )
        shape = output_shape(self.entry, self.manifest.geometry, inputs)

        def wait() -> np.ndarray:
            result = done.result().as_numpy(output)
            if result is None or result.shape != shape or result.dtype != np.float32:
                got = "nothing" if result is None else f"{result.dtype} {result.shape}"
                raise RuntimeError(
                    f"{self._server.url}: model {self._name} must answer {output} float32 {shape}; got {got}"
                )
            return result

        return wait
