"""Nodes of ONNX graphs, for those who change a graph (engine.build) or read one back (gdpo.model.exported)."""

from __future__ import annotations

from typing import Any


def is_grouped(node: Any) -> bool:
    """Whether a node is a convolution of groups of channels apart; in our models each channel by itself."""
    return node.op_type == "Conv" and any(a.name == "group" and a.i > 1 for a in node.attribute)
