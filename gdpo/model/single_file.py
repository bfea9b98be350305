"""A generator as one .safetensors file that other programs load, through spandrel: a plain network, its noise fixed."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch

from engine.io.files import atomic_path
from engine.runtime.noise import noise_field
from gdpo.generator import OneStepGenerator
from gdpo.model.network_unet import NetworkUNet
from gdpo.model.parts import disk_errors

SIDE = 64  # of the square of noise, in LR pixels


def save_single_file(generator: OneStepGenerator, file: Path, seed: int = 0) -> str:
    """Write the generator with its LoRA merged, whole or not at all, and return the architecture's name for spandrel.

    A published network is written as itself, without noise; the tiny and the compact one as the architecture GDPO-SR
    (integrations/spandrel), with the noise of `seed`.

    Raises:
        ValueError: a Stable Diffusion model, or a seed out of range.
    """
    from safetensors.torch import save_file

    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2^64); got {seed}")
    if generator.uses_text:
        raise ValueError("a Stable Diffusion model does not fit one file of a network; save its folder instead")
    made = copy.deepcopy(generator).merge_lora()
    if isinstance(made.unet, NetworkUNet):
        name, state = made.unet.architecture, made.unet.network.state_dict()
    else:
        made.unet.fold(made.t_diffusion)
        noise = noise_field(seed, made.codec.channels, (0, SIDE), (0, SIDE))[None]
        name, state = "GDPO-SR", {f"unet.{k}": v for k, v in made.unet.state_dict().items()}
        state["noise"] = torch.from_numpy(noise.copy())
        state["amounts"] = torch.tensor([math.sqrt(made.a_n), math.sqrt(made.b_n)])
    tensors = {k: v.detach().cpu().clone() for k, v in state.items()}
    with disk_errors(Path(file)), atomic_path(file) as staged:
        save_file(tensors, staged, {"format": "pt"})
    return name
