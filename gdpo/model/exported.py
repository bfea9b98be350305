"""A tiny generator back from its ONNX export, to continue training it: the bundled model is such a folder.

An export has put what a TinyUNet's timestep scales and shifts into the first convolution of each block. These are taken
as they are, and the projections of the time start at zero, as in a fresh generator: the same pictures come out.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from engine.runtime import manifest
from engine.runtime.nodes import is_grouped
from gdpo.generator import OneStepGenerator
from gdpo.model.architectures import ARCHITECTURES
from gdpo.model.compact import CompactUNet

_PREFIX = "step.unet."


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
    try:
        import onnx
    except ImportError:
        raise RuntimeError("reading an export needs the package onnx: pip install 'gdpo-sr[export]'") from None
    content, _ = about.read(folder, "generator")  # checked against the manifest's hash
    graph = onnx.load_model_from_string(content).graph
    stored = {w.name: torch.from_numpy(onnx.numpy_helper.to_array(w).copy()) for w in graph.initializer}
    weights = {k.removeprefix(_PREFIX): v for k, v in stored.items() if k.startswith(_PREFIX)}
    # Reshaped, or equal to another's, a weight may have lost its name.
    slopes = [node.input[1] for node in graph.node if node.op_type == "PRelu"]
    weights |= {f"acts.{i}.weight": stored[name].flatten() for i, name in enumerate(slopes)}
    alone = [node.input[1] for node in graph.node if is_grouped(node)]
    for i, (rest, through) in enumerate(zip(alone[::2], alone[1::2])):
        weights |= {f"acts.{i}.rest.weight": stored[rest], f"acts.{i}.through.weight": stored[through]}
    try:
        kind_of_unet = "CompactUNet" if "recover.weight" in weights else "TinyUNet"
        if not slopes and kind_of_unet == "CompactUNet":
            weights = CompactUNet.join_slopes(weights)
        config = ARCHITECTURES[kind_of_unet].unet.config_of(weights)
        timesteps = {t: int(about.model[t]) for t in ("t_noise", "t_diffusion")}
        generator = OneStepGenerator.tiny(config, **timesteps)
        kept = {k: v for k, v in generator.unet.state_dict().items() if "time" in k}
        generator.unet.load_state_dict(kept | weights)
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder}: its graph is not a tiny generator's ({reason})") from None
    return generator
