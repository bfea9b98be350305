"""The generator's architectures by the class name in unet/config.json. To add one, add a row to ARCHITECTURES.

Stable Diffusion's UNet is diffusers' own class (UNet2DConditionModel) and has no row. The others work on
pixel-unshuffled pictures (the `residual` parametrisation). Each is a module in gdpo/model/ with the call signature of a
diffusers UNet and

    multiple              latent H and W must be multiples of it
    lora_targets          names of the layers that a LoRA adapts, a pattern
    config_dict()         what unet/config.json holds
    fold(t_diffusion)     makes the timestep a constant, in place, for an export
    enable_gradient_checkpointing()

One that is made of a config has from_config(), the inverse of config_dict(), and config_of(weights), which reads the
config off the weights of an export. NetworkUNet, a published network, is made of its weights (from_weights). It also
takes the share of the picture in a noisy latent (`signal`), and check() says whether its trained weights can be saved.

`OneStepGenerator.tiny(CONFIG)` makes a fresh generator. For `gdpo.train --model.pretrained NAME` to start from one, add
a row to FRESH in gdpo/train/start.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gdpo.model.compact import CompactUNet, CompactUNetConfig
from gdpo.model.compact_step import CompactStep
from gdpo.model.network_unet import NetworkUNet
from gdpo.model.parts import first_line
from gdpo.model.tiny import TinyUNet, TinyUNetConfig


class Architecture(NamedTuple):
    """A UNet's class, and what differs from one to the next.

    Args:
        config: the class of its config; None where it is made of its weights alone.
        step: (folded UNet, sqrt(a_n), sqrt(b_n)) -> a module latent, noise -> x0, in an export; None is the usual one.
        for_cpu: gives a folded UNet, in place, the layers that a CPU runs faster.
    """

    unet: Any
    config: type | None
    step: Callable[[Any, float, float], nn.Module] | None = None
    for_cpu: Callable[[Any], None] = lambda unet: None


ARCHITECTURES = {
    "TinyUNet": Architecture(TinyUNet, TinyUNetConfig),
    "CompactUNet": Architecture(CompactUNet, CompactUNetConfig, CompactStep, CompactUNet.split_slopes),
    "NetworkUNet": Architecture(NetworkUNet, None),
}


def fresh_unet(config: TinyUNetConfig | CompactUNetConfig) -> Any:
    """A UNet of this shape with initial weights."""
    return next(a.unet for a in ARCHITECTURES.values() if a.config is type(config))(config)


def stored_unet(config: dict, weights: dict[str, Tensor], folder: str) -> Any:
    """The UNet of a folder's config, whose `_class_name` is one of ARCHITECTURES, and weights.

    Raises:
        ValueError: the two do not fit; `folder` is named.
    """
    architecture = ARCHITECTURES[config["_class_name"]]
    if architecture.config is None:
        return architecture.unet.from_weights(config, weights, folder)
    with torch.device("meta"):  # judged before anything of its size is made
        needed = sum(p.numel() for p in architecture.unet.from_config(config).parameters())
    if needed > 2 * sum(value.numel() for value in weights.values()):
        raise ValueError(f"{folder}/config.json asks for {needed} parameters; its weights are fewer")
    unet = architecture.unet.from_config(config)
    try:
        unet.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{folder}: the weights do not fit config.json: {first_line(error)}") from None
    return unet


OF_DIFFUSERS = Architecture(None, None)


def architecture_of(unet: object) -> Architecture:
    """Its row, or that of diffusers' UNets."""
    return next((a for a in ARCHITECTURES.values() if isinstance(unet, a.unet)), OF_DIFFUSERS)


def works_on_pixels(unet: object) -> bool:
    """Whether it is one of ARCHITECTURES, and not a UNet of diffusers."""
    return architecture_of(unet) is not OF_DIFFUSERS
