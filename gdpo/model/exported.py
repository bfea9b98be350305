"""A tiny generator back from its ONNX export, to continue training it: the bundled model is such a folder.

An export has put what a TinyUNet's timestep scales and shifts into the first convolution of each block. These are taken
as they are, and the projections of the time start at zero, as in a fresh generator: the same pictures come out.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch

from engine.runtime import manifest
from engine.runtime.nodes import is_grouped
from gdpo.generator import OneStepGenerator
from gdpo.model.compact import CompactUNet
from gdpo.model.compact_step import unet_weights
from gdpo.model.tiny import TinyUNet

_STEP, _UNET = "step.", "step.unet."


def from_export(folder: str | os.PathLike[str]) -> OneStepGenerator:
    """The generator of a folder that engine.export wrote of a tiny model, whole and in fp32.

    Raises:
        ValueError: a damaged folder (FolderError), another kind of model, a split, reduced or built one.
        RuntimeError: the package onnx is not installed.
    """
    folder = Path(folder)
    about = manifest.load(folder)
    kind = (about.model.get("parametrization"), about.precision, about.backend, *about.graphs)
    if kind != ("residual", "fp32", "onnx", "generator"):
        raise ValueError(
            f"{folder} must be the export of a tiny model, whole and in fp32 (residual, fp32, onnx, generator); "
            f"got {', '.join(map(str, kind))}"
        )
    if about.options.get("weights", "fp32") != "fp32":
        raise ValueError(
            f"{folder} stores its weights in {about.options['weights']}, which are rounded; train on the "
            "model that it was exported from, or on the bundled tiny or faithful"
        )
    try:
        import onnx
    except ImportError:
        raise RuntimeError("reading an export needs the package onnx: pip install 'gdpo-sr[export]'") from None
    content, _ = about.read(folder, "generator")  # checked against the manifest's hash
    graph = onnx.load_model_from_string(content).graph
    stored = {w.name: torch.from_numpy(onnx.numpy_helper.to_array(w).copy()) for w in graph.initializer}
    timesteps = {t: int(about.model[t]) for t in ("t_noise", "t_diffusion")}
    if "step.unet.recover.weight" in stored:
        raise ValueError(
            f"{folder} is the export of an earlier version, whose borders were others; export its model again: "
            "python -m engine.export MODEL --out FOLDER"
        )
    try:
        if "step.recover.weight" in stored:
            return _compact(graph, stored, timesteps)
        weights = {k.removeprefix(_UNET): v for k, v in stored.items() if k.startswith(_UNET)}
        generator = OneStepGenerator.tiny(TinyUNet.config_of(weights), **timesteps)
        kept = {k: v for k, v in generator.unet.state_dict().items() if "time" in k}
        generator.unet.load_state_dict(kept | weights)
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder}: its graph is not a tiny generator's ({reason})") from None
    return generator


def _compact(graph: Any, stored: dict[str, torch.Tensor], timesteps: dict[str, int]) -> OneStepGenerator:
    """A generator with a compact network, of a graph with a CompactStep."""
    step = {k.removeprefix(_STEP): v for k, v in stored.items() if k.startswith(_STEP)}
    # Reshaped, or equal to another's, a weight may have lost its name.
    alone = [[stored[name] for name in node.input[1:]] for node in graph.node if is_grouped(node)]
    for i, (weight, bias) in enumerate(alone):
        step |= {f"acts.{i}.rest.weight": weight, f"acts.{i}.rest.bias": bias}
    shapes = unet_weights(step, 1, 1)
    generator = OneStepGenerator.tiny(CompactUNet.config_of(shapes), **timesteps)
    weights = unet_weights(step, math.sqrt(generator.a_n), math.sqrt(generator.b_n))
    generator.unet.load_state_dict(weights)
    return generator
