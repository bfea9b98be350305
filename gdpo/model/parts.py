"""Reading the parts of a model folder. Whatever is wrong with one, the error names the file or the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def read_json(file: Path) -> dict:
    """The object in a JSON file.

    Raises:
        ValueError: it is not one.
    """
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must hold a JSON object; got {type(content).__name__}")
    return content


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        FileNotFoundError: no such file. ValueError: it is damaged, or another kind of file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; the model's weights are missing")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({first_line(error)})") from None


def load_pretrained(kind: Any, folder: Path, dtype: torch.dtype | None = None) -> Any:
    """A model of diffusers or transformers from its folder, with every weight that its config.json asks for.

    The libraries fill a weight that is not in the file with random numbers and go on.

    Args:
        kind: the class, such as UNet2DConditionModel.

    Raises:
        FileNotFoundError: no weights. ValueError: they are damaged, or another model's.
    """
    if not any(path.is_file() for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern)):
        raise FileNotFoundError(f"{folder}: no weights in it (*.safetensors); the model folder is incomplete")
    try:
        options = {} if dtype is None else {"torch_dtype": dtype}
        model, found = kind.from_pretrained(str(folder), local_files_only=True, output_loading_info=True, **options)
    except Exception as error:  # of many kinds, some of which no library documents
        raise ValueError(f"{folder}: cannot be loaded ({type(error).__name__}: {first_line(error)})") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{folder}: its weights lack {len(missing)} of the tensors that its config.json asks for, such as "
            f"{missing[0]}; are they another model's?"
        )
    return model


def first_line(error: Exception) -> str:
    """What an error of a library says, without the advice that follows."""
    return (str(error).strip().splitlines() or ["no reason given"])[0][:300]
