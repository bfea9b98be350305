"""Latent codecs behind one small interface: images [B,3,H,W] in [-1,1] <-> scaled latents [B,C,H/f,W/f]."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from gdpo.model.layers import shuffled, unshuffled
from gdpo.model.parts import load_pretrained, read_config


class Codec(Protocol):
    """`factor` is the spatial factor f, `channels` the latent's C.

    An export calls `encode_in` and `decode_in`: float32 at both ends, computed in `dtype`.
    """

    factor: int
    channels: int

    def encode(self, images: torch.Tensor, sample_posterior: bool = False) -> torch.Tensor: ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor: ...

    def encode_in(self, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor: ...

    def decode_in(self, latents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor: ...

    def save(self, folder: Path) -> None:
        """Write it as the `vae/` folder of a diffusers model."""


class PixelCodec(nn.Module):
    """VAE-free: pixel-unshuffle. Exact, free of parameters, and its own inverse."""

    def __init__(self, factor: int = 4):
        super().__init__()
        self.factor, self.channels = factor, 3 * factor**2

    def encode(self, images: torch.Tensor, sample_posterior: bool = False) -> torch.Tensor:
        return F.pixel_unshuffle(images, self.factor)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(latents, self.factor)

    def encode_in(self, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return unshuffled(images, self.factor)

    def decode_in(self, latents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return shuffled(latents, self.factor)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": "PixelCodec", "factor": self.factor}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


class _Autoencoder(nn.Module):
    """One of diffusers'; `levels` are the channels at each of its resolutions."""

    encode: Callable[..., torch.Tensor]

    def __init__(self, vae: Any, levels: Sequence[int]):
        super().__init__()
        self.vae: Any = vae
        self.scaling = float(vae.config.scaling_factor)
        self.factor = 2 ** (len(levels) - 1)
        self.channels = int(vae.config.latent_channels)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latents / self.scaling).sample

    def encode_in(self, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.encode(images.to(dtype)).float()

    def decode_in(self, latents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.decode(latents.to(dtype)).float()

    def save(self, folder: Path) -> None:
        self.vae.save_pretrained(folder)


class KLCodec(_Autoencoder):
    """Diffusers' AutoencoderKL (Stable Diffusion): the latent is scaled by `scaling_factor`."""

    def __init__(self, vae: Any):
        super().__init__(vae, vae.config.block_out_channels)

    def encode(self, images: torch.Tensor, sample_posterior: bool = False) -> torch.Tensor:
        posterior = self.vae.encode(images).latent_dist
        return (posterior.sample() if sample_posterior else posterior.mode()) * self.scaling


class TinyAutoencoderCodec(_Autoencoder):
    """Diffusers' AutoencoderTiny (TAESD family): deterministic, latents already at the UNet's scale."""

    def __init__(self, vae: Any):
        super().__init__(vae, vae.config.encoder_block_out_channels)

    def encode(self, images: torch.Tensor, sample_posterior: bool = False) -> torch.Tensor:
        return self.vae.encode(images).latents * self.scaling


def load_codec(folder: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The codec of a `vae/` folder, chosen by the `_class_name` in its config.json."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{config_file}: no such file; a model folder needs vae/config.json")
    config = read_config(config_file)
    kind = config.get("_class_name")
    if kind == "PixelCodec":
        factor = config.get("factor", 4)
        if type(factor) is not int or not 1 <= factor <= 64:
            raise ValueError(f"{config_file}: factor must be a whole number from 1 to 64; got {factor!r:.40}")
        return PixelCodec(factor)
    if kind not in ("AutoencoderKL", "AutoencoderTiny"):
        raise ValueError(
            f"{config_file}: _class_name is {kind!r}; known are AutoencoderKL, AutoencoderTiny, PixelCodec"
        )
    from diffusers import AutoencoderKL, AutoencoderTiny

    if kind == "AutoencoderKL":
        return KLCodec(load_pretrained(AutoencoderKL, folder, dtype))
    return TinyAutoencoderCodec(load_pretrained(AutoencoderTiny, folder, dtype))
