"""Weights that an exported graph stores in fp16 or int8 (engine.export --weights), in fp32 again."""

from __future__ import annotations

from typing import Any

import numpy as np


def widened(model: Any) -> Any:
    """An ONNX model with the weights that its Cast and Mul nodes would make of fp16 or int8 ones: in place."""
    from onnx import TensorProto, numpy_helper

    narrow = (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8)
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type in narrow}
    wide, used, kept = {}, set(), []
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in stored:
            used.add(node.input[0])
            wide[node.output[0]] = stored[node.input[0]].astype(np.float32)
        elif node.op_type == "Mul" and all(name in wide for name in node.input):
            levels, scale = (wide.pop(name) for name in node.input)
            wide[node.output[0]] = levels * scale
        else:
            kept.append(node)
    rest = [t for t in model.graph.initializer if t.name not in used]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend([*rest, *(numpy_helper.from_array(v, name) for name, v in wide.items())])
    return model
