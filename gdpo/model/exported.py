"""A tiny generator back from its ONNX export, to train it on: the model that ships is such a folder.

Folding (engine.export.graphs) has put the timestep's scale and shift into the first convolution of each block. These
are taken as they are, and the projections of the time start at zero, as in a fresh generator: the same pictures come
out.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from engine.runtime import manifest
from gdpo.generator import OneStepGenerator
from gdpo.model.tiny import TinyUNetConfig

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
    weights = {
        w.name.removeprefix(_PREFIX): torch.from_numpy(onnx.numpy_helper.to_array(w).copy())
        for w in onnx.load_model_from_string(content).graph.initializer
        if w.name.startswith(_PREFIX)
    }
    try:
        config = _config(weights)
        timesteps = {t: int(about.model[t]) for t in ("t_noise", "t_diffusion")}
        generator = OneStepGenerator.tiny(config, **timesteps)
        kept = {k: v for k, v in generator.unet.state_dict().items() if "time" in k}
        generator.unet.load_state_dict(kept | weights)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder}: its graph is not a tiny generator's ({str(error).splitlines()[0]})") from None
    return generator


def _config(weights: dict[str, torch.Tensor]) -> TinyUNetConfig:
    """The shape of the UNet, read off its weights."""
    levels = 1 + sum(name.startswith("downs.") and name.endswith(".weight") for name in weights)
    blocks = sum(name.startswith("encoder.0.") and name.endswith(".conv1.weight") for name in weights)
    sample = weights["conv_in.weight"].shape[1]
    return TinyUNetConfig(
        in_channels=sample,
        out_channels=sample // 2,
        block_out_channels=tuple(len(weights[f"encoder.{i}.0.conv1.bias"]) for i in range(levels)),
        layers_per_block=blocks,
        head_channels=(len(weights["head.conv1.bias"]), len(weights["head.conv2.bias"])),
    )
