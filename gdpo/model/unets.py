"""The networks of this project that work on pixel-unshuffled pictures (the `residual` parametrisation), by class name.

Each is a module with the call signature of a diffusers UNet and

    multiple              latent H and W must be multiples of it
    lora_targets          names of the layers that a LoRA adapts, a pattern
    config_dict()         what unet/config.json holds
    fold(t_diffusion)     makes the timestep a constant, in place, for an export

Two are built of their config alone (`PIXEL_UNETS`), and have from_config(), its inverse, and config_of(weights): the
config, read off the weights of an export. NetworkUNet is built of its weights (from_weights).

To add one: a module in gdpo/model/, a row of PIXEL_UNETS (`load_unet` in folders.py reads its class by that name), and,
where training is to make a fresh one, a branch in `pixel_unet`.
"""

from __future__ import annotations

from gdpo.model.compact import CompactUNet, CompactUNetConfig
from gdpo.model.network_unet import NetworkUNet
from gdpo.model.tiny import TinyUNet, TinyUNetConfig

PIXEL_UNETS: dict[str, type[TinyUNet] | type[CompactUNet]] = {"TinyUNet": TinyUNet, "CompactUNet": CompactUNet}


def pixel_unet(config: TinyUNetConfig | CompactUNetConfig | None = None) -> TinyUNet | CompactUNet:
    """A fresh network of this shape; None is the tiny preset's."""
    return CompactUNet(config) if isinstance(config, CompactUNetConfig) else TinyUNet(config)


def works_on_pixels(unet: object) -> bool:
    """Whether it is one of these networks, and not a UNet of diffusers."""
    return isinstance(unet, (*PIXEL_UNETS.values(), NetworkUNet))
