"""Weights in half or a quarter of the bytes: stored in fp16 or in int8, computed with in fp32.

A graph holds them behind a Cast, int8 also behind a Mul with a bf16 scale for each 3x3 kernel (a fifth of a byte for a
weight) or, where kernels are small, for each output channel. A run time folds these when it loads the graph, so speed
and memory are those of fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

STORED = ("fp32", "fp16", "int8")
_LEAST = 256  # numbers; a smaller tensor's nodes cost more than they save
_LEVELS = 127
_KERNEL = 9  # numbers; a smaller kernel has no scale of its own


@torch.no_grad()
def round_to(stored: str, module: nn.Module) -> None:
    """Round the parameters to what fp16 or int8 holds, in place: what is exported is then what is compared with torch.

    Raises:
        ValueError: a weight that is not finite, or beyond fp16's range.
    """
    for name, parameter in module.named_parameters():
        if stored == "fp16":
            half = parameter.half()
            if not half.isfinite().all():
                raise ValueError(f"{name} holds a number beyond fp16's range (65504); export with --weights fp32")
            parameter.copy_(half.float())
        elif not parameter.isfinite().all():
            raise ValueError(f"{name} holds a number that is not finite")
        elif _is_large(parameter):
            parameter.copy_(_nearest(parameter.float()))


def _is_large(tensor: Tensor) -> bool:
    return tensor.ndim > 1 and tensor.numel() >= _LEAST


def _scaled(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a weight [O,...] that have one scale."""
    has_kernels = len(shape) == 4 and shape[2] * shape[3] >= _KERNEL
    return (2, 3) if has_kernels else tuple(range(1, len(shape)))


def _nearest(weight: Tensor) -> Tensor:
    """weight [O,...] in 255 levels around 0; the largest is level 127, for bf16 rounds a scale by a quarter level."""
    scale = (weight.abs().amax(_scaled(weight.shape), keepdim=True) / _LEVELS).bfloat16().float()
    return (weight / scale.where(scale > 0, 1.0)).round() * scale


def store_as(stored: str, file: Path) -> None:
    """Rewrite an ONNX file: every large fp32 initializer that fp16 or int8 holds is stored as that."""
    model = onnx.load(str(file))
    graph, nodes = model.graph, list[NodeProto]()
    split: Callable[[TensorProto], tuple[list[TensorProto], list[NodeProto]]] = {"fp16": _half, "int8": _int8}[stored]
    kept = []
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) >= _LEAST:
            made, before = split(tensor)
            kept += made
            nodes += before
        else:
            kept.append(tensor)
    nodes += graph.node
    del graph.node[:], graph.initializer[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)
    onnx.save(model, str(file))


def _half(tensor: TensorProto) -> tuple[list[TensorProto], list[NodeProto]]:
    values, name = numpy_helper.to_array(tensor), tensor.name
    half = values.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), values):
        return [tensor], []
    cast = helper.make_node("Cast", [f"{name}_fp16"], [name], to=TensorProto.FLOAT)
    return [numpy_helper.from_array(half, f"{name}_fp16")], [cast]


def _int8(tensor: TensorProto) -> tuple[list[TensorProto], list[NodeProto]]:
    values, name = numpy_helper.to_array(tensor), tensor.name
    for axes in [_scaled(values.shape), (0,)][: values.ndim]:  # the exporter turns the matrix of a Linear
        scale = np.abs(values).max(axis=axes, keepdims=True) / np.float32(_LEVELS)
        bits = scale.view(np.uint32) >> 16
        levels = np.round(values / np.where(scale > 0, scale, 1))
        if np.array_equal(levels * (bits << 16).astype(np.uint32).view(np.float32), values):
            break
    else:
        return [tensor], []
    nodes = [
        helper.make_node("Cast", [f"{name}_int8"], [f"{name}_levels"], to=TensorProto.FLOAT),
        helper.make_node("Cast", [f"{name}_bf16"], [f"{name}_scale"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}_levels", f"{name}_scale"], [name]),
    ]
    made = [
        numpy_helper.from_array(levels.astype(np.int8), f"{name}_int8"),
        helper.make_tensor(f"{name}_bf16", TensorProto.BFLOAT16, scale.shape, bits.astype("<u2").tobytes(), raw=True),
    ]
    return made, nodes
