"""A stand-in for Triton Inference Server: its gRPC protocol and its strictness, with ONNX Runtime behind it."""

from __future__ import annotations

import threading
import time
from concurrent import futures
from pathlib import Path

import grpc
import numpy as np
import onnxruntime
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

FLOAT = model_config_pb2.TYPE_FP32


def read_config(model: Path) -> model_config_pb2.ModelConfig:
    """config.pbtxt of a model's folder, as the server parses it."""
    config = text_format.Parse((model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert config.name == model.name  # the server demands it
    return config


class TritonStandIn(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Serves the models of a repository on a free port of the loopback, until the block ends.

    Attributes:
        delay: seconds that each answer waits.
        crop: rows that each answer lacks.
        batches: sizes of the requests, in order.
        most: requests that were under way at a time.
    """

    def __init__(self, repository: Path):
        self.configs = {path.name: read_config(path) for path in sorted(repository.iterdir())}
        self.sessions = {
            name: onnxruntime.InferenceSession(repository / name / "1" / "model.onnx") for name in self.configs
        }
        self.delay, self.crop, self.batches, self.most, self._running = 0.0, 0, [], 0, 0
        self._lock = threading.Lock()
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self._server = grpc.server(futures.ThreadPoolExecutor(16), options=options)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.url = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> TritonStandIn:
        self._server.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.stop(0).wait()

    def ServerLive(self, request, context):
        return service_pb2.ServerLiveResponse(live=True)

    def RepositoryIndex(self, request, context):
        answer = service_pb2.RepositoryIndexResponse()
        for name in self.configs:
            answer.models.add(name=name, version="1", state="READY")
        return answer

    def ModelConfig(self, request, context):
        if request.name not in self.configs:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        return service_pb2.ModelConfigResponse(config=self.configs[request.name])

    def ModelInfer(self, request, context):
        with self._lock:
            self._running += 1
            self.most = max(self.most, self._running)
        try:
            time.sleep(self.delay)
            return self._infer(request, context)
        finally:
            with self._lock:
                self._running -= 1

    def _infer(self, request, context):
        config, inputs = self.configs[request.model_name], {}
        known = {tensor.name: tensor for tensor in config.input}
        for tensor, content in zip(request.inputs, request.raw_input_contents, strict=True):
            expected = [-1, *known[tensor.name].dims] if config.max_batch_size else list(known[tensor.name].dims)
            given = list(tensor.shape)
            fits = len(given) == len(expected) and all(e in (-1, g) for e, g in zip(expected, given))
            if tensor.datatype != "FP32" or known[tensor.name].data_type != FLOAT or not fits:
                reason = f"unexpected shape for input '{tensor.name}'. Expected {expected}, got {given}"
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, reason)
            inputs[tensor.name] = np.frombuffer(content, np.float32).reshape(given)
        count = len(next(iter(inputs.values())))
        if config.max_batch_size and count > config.max_batch_size:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"inference request batch-size must be <= {count}")
        with self._lock:
            self.batches.append(count)
            output = self.sessions[request.model_name].run([request.outputs[0].name], inputs)[0]
        output = np.ascontiguousarray(output[:, :, self.crop :])
        answer = service_pb2.ModelInferResponse(model_name=request.model_name, model_version="1")
        answer.outputs.add(name=request.outputs[0].name, datatype="FP32", shape=output.shape)
        answer.raw_output_contents.append(output.tobytes())
        return answer
