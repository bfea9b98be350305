"""A generator's folder on the disk: what is read of it, and how its UNet is written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from engine.runtime.foreign import is_engine
from gdpo.model import hub, lora
from gdpo.model.architectures import ARCHITECTURES, stored_unet, works_on_pixels
from gdpo.model.parts import load_pretrained, read_config, read_tensors, refuse_checkpoint


def resolve(folder: str | os.PathLike[str]) -> Path:
    """The local folder of a model: a path, or "hub:ORG/NAME", which is downloaded.

    Raises:
        FileNotFoundError: no such folder. ValueError: a checkpoint, or an engine folder. ConnectionError: no Hub.
    """
    text = os.fspath(folder)
    if text.startswith(hub.PREFIX):
        return hub.download(text)
    path = Path(text)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{text}: no such folder; a model is a diffusers folder (to download one: hub:ORG/NAME)"
        )
    refuse_checkpoint(path)
    if is_engine(path):
        raise ValueError(
            f"{text}: this is an engine folder, not a generator; name the generator that it was exported from, or make "
            f"one of it: python -m gdpo.convert {text} --out MODEL"
        )
    return path


def remembered(file: Path) -> dict:
    """What a saved folder remembers: timesteps and prompt."""
    saved = read_config(file) if file.is_file() else {}
    for name, kind in (("t_noise", int), ("t_diffusion", int), ("prompt", str)):
        if type(saved.get(name, kind())) is not kind:
            raise ValueError(f"{file}: {name} must be {kind.__name__}; got {saved[name]!r:.40}")
    return saved


def write_json(file: Path, content: dict) -> None:
    """Write a small file of a model folder."""
    file.write_text(json.dumps(content, indent=2) + "\n")


def without_origin(config: Path) -> None:
    """Take out of a config.json of diffusers where its model was read: a path of this machine, in a file for others."""
    if config.is_file() and (content := read_config(config)).pop("_name_or_path", None) is not None:
        write_json(config, content)


def load_unet(folder: Path, dtype: torch.dtype | None) -> Any:
    """The UNet of a `unet/` folder, of the class that its config.json names, in `dtype` (None: as stored).

    Raises:
        FileNotFoundError, ValueError: naming the file and what was expected in it.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder / 'config.json'}: no such file; a model folder needs unet/config.json")
    config = read_config(folder / "config.json")
    kind = config.get("_class_name")
    if kind in ARCHITECTURES:
        unet = stored_unet(config, read_tensors(folder / "diffusion_pytorch_model.safetensors"), str(folder))
        return unet.to(dtype) if dtype else unet
    if kind != "UNet2DConditionModel":
        known = ", ".join(["UNet2DConditionModel", *ARCHITECTURES])
        raise ValueError(f"{folder / 'config.json'}: _class_name is {kind!r}; known are {known}")
    from diffusers import UNet2DConditionModel

    return load_pretrained(UNet2DConditionModel, folder, dtype)


def without_lora(module: Any) -> Any:
    """The module itself when it has no adapter, else a copy with the bare base weights."""
    inner = getattr(module, "vae", module)
    if not lora.adapters(inner):
        return module
    import copy

    bare = copy.deepcopy(module)
    lora.merge(getattr(bare, "vae", bare), 0.0)
    return bare


def save_unet(unet: Any, folder: Path) -> None:
    """Write a UNet without its LoRA as the `unet/` folder."""
    unet = without_lora(unet)
    if works_on_pixels(unet):
        from safetensors.torch import save_file

        folder.mkdir()
        write_json(folder / "config.json", unet.config_dict())
        state = {k: v.detach().cpu().contiguous() for k, v in unet.state_dict().items()}
        save_file(state, folder / "diffusion_pytorch_model.safetensors")
    else:
        unet.save_pretrained(folder)
