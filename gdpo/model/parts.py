"""The parts of a model folder: read, where the error names the file or the folder whatever is wrong with it; and its
index and pipeline.py, which are written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from engine.io.files import naming
from engine.runtime.foreign import is_checkpoint, is_run


def read_json(file: Path) -> dict:
    """The object in a JSON file.

    Raises:
        ValueError: it is not one.
    """
    try:
        with naming(file):
            content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({first_line(error)})") from None
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


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Inside, a file that safetensors cannot write is an OSError that names `path`, as with every other writer."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def load_pretrained(kind: Any, folder: Path, dtype: torch.dtype | None = None) -> Any:
    """A model of diffusers or transformers from its folder, with every weight that its config.json asks for.

    The libraries fill a weight that is not in the file with random numbers and go on.

    Args:
        kind: the class, such as UNet2DConditionModel.

    Raises:
        FileNotFoundError: no weights. ValueError: they are damaged, or another model's.
    """
    names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    if not any(name.endswith((".safetensors", ".bin")) for name in names):
        raise FileNotFoundError(f"{folder}: no weights in it (*.safetensors); the model folder is incomplete")
    _check_size(kind, folder)
    options: dict[str, Any] = {} if dtype is None else {"torch_dtype": dtype}
    if variant := _variant(names):
        options["variant"] = variant
    try:
        model, found = kind.from_pretrained(str(folder), local_files_only=True, output_loading_info=True, **options)
    except Exception as error:  # of many kinds, some of which no library documents
        raise ValueError(f"{folder}: cannot be loaded ({type(error).__name__}: {first_line(error)})") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{folder}: its weights lack {len(missing)} of the tensors that its config.json asks for, such as "
            f"{missing[0]}; are they another model's?"
        )
    return model


# Of a model's configuration, before anything is built of it; the largest public ones stay far below.
_DEEPEST, _MOST_ENTRIES, _LONGEST_LIST, _LONGEST_TEXT = 6, 2000, 256, 1000
_MOST_LAYERS, _LARGEST = 256, 1 << 20


def read_config(file: Path) -> dict:
    """A model's config.json, whose numbers and lists are of sizes that a model has.

    Raises:
        ValueError: naming the entry that is none.
    """
    content = read_json(file)
    entries = 0

    def judge(name: str, value: Any, depth: int) -> None:
        nonlocal entries
        entries += 1
        expected = None
        if depth > _DEEPEST or entries > _MOST_ENTRIES:
            raise ValueError(f"{file}: {name[:80]}: nested deeper, or longer, than any model's configuration")
        if isinstance(value, dict | list):
            if len(value) > _LONGEST_LIST:
                raise ValueError(f"{file}: {name[:80]} must have at most {_LONGEST_LIST} entries; got {len(value)}")
            for key, part in value.items() if isinstance(value, dict) else ((name, part) for part in value):
                judge(str(key), part, depth + 1)
        elif isinstance(value, str):
            expected = f"have at most {_LONGEST_TEXT} characters" if len(value) > _LONGEST_TEXT else None
        elif isinstance(value, int | float) and not isinstance(value, bool):
            largest = _MOST_LAYERS if re.search(r"layers|blocks|^num_(?!train)", name) else _LARGEST
            expected = f"be a number up to {largest}" if not abs(value) <= largest else None
        if expected:
            raise ValueError(f"{file}: {name[:80]} must {expected}; got {value!r:.40}")

    for key, value in content.items():
        judge(key, value, 1)
    if not isinstance(content.get("_class_name", ""), str):
        raise ValueError(f"{file}: _class_name must be a text; got {content['_class_name']!r:.40}")
    return content


def _check_size(kind: Any, folder: Path) -> None:
    """Refuse a configuration of which no model can be built, or only one that is larger than its weights.

    Raises:
        ValueError: naming config.json.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; the model folder is incomplete")
    config = read_config(file)
    stored = sum(p.stat().st_size for pattern in ("*.safetensors", "*.bin") for p in folder.glob(pattern))
    try:
        with torch.device("meta"):
            model = kind(kind.config_class.from_dict(config)) if hasattr(kind, "config_class") else None
            model = kind.from_config(config) if model is None else model
    except Exception as error:  # of many kinds, some of which no library documents
        raise ValueError(f"{file}: no model can be built of it ({type(error).__name__}: {first_line(error)})") from None
    needed = sum(p.numel() for p in model.parameters())
    if needed > stored:  # a byte each, at the very least
        raise ValueError(f"{file} asks for {needed} parameters, but the weights beside it have {stored} bytes")


def refuse_checkpoint(folder: Path) -> None:
    """Say what to do with a checkpoint, or a run's folder, where a model is expected.

    Raises:
        ValueError: it is one.
    """
    if is_run(folder):
        model, merge = folder / "model", f"python -m gdpo.merge {folder}/checkpoint-N --out FOLDER"
        raise ValueError(f"{folder} is the folder of a training run; take {model if model.is_dir() else merge}")
    if is_checkpoint(folder):
        raise ValueError(
            f"{folder} is a checkpoint of a training run; make a model of it with: "
            f"python -m gdpo.merge {folder} --out FOLDER"
        )


def _variant(names: list[str]) -> str | None:
    """The variant ("fp16") of a folder that has its weights in no other form."""
    names_of_weights = r"(?:diffusion_pytorch_model|pytorch_model|model)"
    pattern = names_of_weights + r"(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
    found = {match["variant"] for name in names if (match := re.fullmatch(pattern, name))}
    return None if None in found or not found else min(found, key=lambda v: (v != "fp16", v))


def write_index(root: Path, vae: str | None, scheduler: str, text: bool) -> None:
    """Write model_index.json, by which diffusers loads a folder as a StableDiffusionPipeline.

    Args:
        vae, scheduler: class names; text: whether the folder has the text encoder and its tokenizer.
    """
    from diffusers import __version__

    nothing = [None, None]
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": __version__,
        "feature_extractor": nothing,
        "requires_safety_checker": False,
        "safety_checker": nothing,
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"] if text else nothing,
        "tokenizer": ["transformers", "CLIPTokenizer"] if text else nothing,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", vae] if vae else nothing,
    }
    (root / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


_PIPELINE = Path(__file__).resolve().parents[1] / "resources" / "pipeline.py"
_CONSTANTS = re.compile(r"(?m)^T_NOISE, T_DIFFUSION, VAE_LORA, PROMPT = .*$")


def write_pipeline(root: Path, t_noise: int, t_diffusion: int, vae_lora: bool, prompt: str) -> None:
    """Write pipeline.py, which makes a pipeline of diffusers enlarge pictures as this generator does.

    Args:
        vae_lora: whether the VAE has a live LoRA, which no pipeline of diffusers loads.
    """
    values = f"{t_noise}, {t_diffusion}, {vae_lora}, {json.dumps(prompt)}"
    line = f"T_NOISE, T_DIFFUSION, VAE_LORA, PROMPT = {values}"
    (root / "pipeline.py").write_text(_CONSTANTS.sub(lambda _: line, _PIPELINE.read_text("utf-8"), count=1), "utf-8")


def first_line(error: Exception) -> str:
    """What an error of a library says, without the advice that follows; its type where it says nothing."""
    return " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())[:300]
