"""Weights in half the bytes: stored in fp16 behind a Cast, computed with in fp32.

A run time folds the casts when it loads the graph, so speed and memory are those of fp32.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

STORED = ("fp32", "fp16")
_LEAST = 256  # numbers; a smaller tensor's Cast costs more than it saves


@torch.no_grad()
def round_to_half(module: nn.Module) -> None:
    """Round the parameters to what fp16 holds, in place: what is exported is then what is compared with torch.

    Raises:
        ValueError: a weight is beyond fp16's range.
    """
    for name, parameter in module.named_parameters():
        half = parameter.half()
        if not half.isfinite().all():
            raise ValueError(f"{name} holds a number beyond fp16's range (65504); export with --weights fp32")
        parameter.copy_(half.float())


def store_as_half(file: Path) -> None:
    """Rewrite an ONNX file: every large fp32 initializer that fp16 holds to the bit becomes fp16 and a Cast."""
    model = onnx.load(str(file))
    graph, casts = model.graph, []
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or np.prod(tensor.dims) < _LEAST:
            continue
        values = numpy_helper.to_array(tensor)
        half = values.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), values):
            continue
        casts.append(onnx.helper.make_node("Cast", [f"{tensor.name}_fp16"], [tensor.name], to=onnx.TensorProto.FLOAT))
        tensor.CopyFrom(numpy_helper.from_array(half, f"{tensor.name}_fp16"))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, str(file))
