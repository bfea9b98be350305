"""The generator that a run had at one of its checkpoints, as `python -m gdpo.merge RUN/checkpoint-N` takes it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from gdpo.generator import OneStepGenerator
from gdpo.model import lora, lora_files
from gdpo.train import checkpoint as checkpoints
from gdpo.train.options import ModelConfig
from gdpo.train.start import starting_generator

_BESIDE = ("fake", "discriminator")  # groups of parameters that are not the generator's
_ADAPTED = re.compile(r"(?P<name>.+\.(lora_A|lora_B|lora_magnitude_vector))\.default(?P<leaf>\.weight|\.bias)?")
_WHOLE = ".modules_to_save.default."


def generator_at(folder: Path) -> OneStepGenerator:
    """The base that the run started from, with what it had trained by then: a live LoRA, or whole weights.

    The moving average is taken where the run keeps one, as for the model at its end.

    Raises:
        ValueError: a checkpoint that is damaged, or whose base is another model now. FileNotFoundError: no base.
    """
    found = checkpoints.load(folder)
    identity = found.state.identity
    if not isinstance(identity.get("model"), dict):
        raise ValueError(
            f"{folder}: state.json does not tell which model was trained; is it a checkpoint of gdpo.train?"
        )
    options = {k: v for k, v in identity["model"].items() if k in ModelConfig.__dataclass_fields__}
    model = ModelConfig(**options)
    generator = starting_generator(model, int(identity.get("seed", 0)))
    trained = found.tensors["ema"] if found.tensors.get("ema") else found.tensors["trainable"]
    for part, module in (("unet", generator.unet), ("vae", generator.vae)):
        tensors = _of_part(trained, part)
        if not tensors:
            continue
        if module is None:
            raise ValueError(f"{folder} trained a {part}, but {model.pretrained} has none: it is another model now")
        if model.full:
            _replace(folder, module, tensors)
        else:
            alpha = None if model.lora_alpha is None else float(model.lora_alpha)
            adapter = lora_files.Adapter(_bare(tensors), alpha, rslora=model.use_rslora, dora=model.use_dora)
            lora.attach(module, adapter, str(folder))
    return generator.requires_grad_(False).eval()


def _of_part(trained: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    """The tensors of the generator's UNet or VAE by their names in it; a method trains other models beside."""
    found = {}
    for key, value in trained.items():
        group, _, name = key.partition("/")
        prefix, _, rest = name.partition(".")
        if prefix not in ("unet", "vae"):  # gdpo trains the UNet alone
            prefix, rest = "unet", name
        if group not in _BESIDE and prefix == part:
            found[rest] = value
    return found


def _bare(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names without the adapter's."""
    bare = {}
    for key, value in tensors.items():
        match = _ADAPTED.fullmatch(key)
        bare[f"{match['name']}{match['leaf'] or ''}" if match else key.replace(_WHOLE, ".")] = value
    return bare


def _replace(folder: Path, module: Any, tensors: dict[str, torch.Tensor]) -> None:
    own = dict(module.named_parameters())
    for name, value in tensors.items():
        if name not in own or own[name].shape != value.shape:
            raise ValueError(f"{folder} does not fit the model that it names (first: {name}): another model's?")
        with torch.no_grad():
            own[name].copy_(value)
