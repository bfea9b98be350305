"""Model folders with a part missing, damaged, or of another model: refused, naming the file or the folder."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gdpo.generator import OneStepGenerator
from gdpo.model import lora
from gdpo.model.tiny import TinyUNetConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A tiny model with a LoRA beside it."""
    generator = OneStepGenerator.tiny(TinyUNetConfig(block_out_channels=(8, 16), layers_per_block=1))
    lora.add(generator.unet, 2, generator.unet.lora_targets)
    generator.save_pretrained(folder := tmp_path_factory.mktemp("tiny") / "model")
    return folder


def remove(file: Path) -> None:
    file.unlink()


def break_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def change(file: Path, how) -> None:
    tensors = load_file(file)
    save_file(how(tensors, sorted(tensors)[3]), file, metadata={"format": "pt"})


def lose_one(file: Path) -> None:
    change(file, lambda tensors, one: {k: v for k, v in tensors.items() if k != one})


def reshape_one(file: Path) -> None:
    change(file, lambda tensors, one: tensors | {one: torch.zeros(5)})


def rename_all(file: Path) -> None:
    change(file, lambda tensors, _: {f"other.{k}": v for k, v in tensors.items()})


SD = [f"unet/{WEIGHTS}", f"vae/{WEIGHTS}", "text_encoder/model.safetensors"]
TINY = [f"unet/{WEIGHTS}", "unet_lora/adapter_model.safetensors"]
CASES = [
    *(("sd", file, how) for file in SD for how in (remove, break_off, lose_one, reshape_one, rename_all)),
    *(("sd", f"{part}/config.json", how) for part in ("unet", "vae") for how in (remove, break_off)),
    *(("sd", "scheduler/scheduler_config.json", how) for how in (remove, break_off)),
    *(("sd", "tokenizer/vocab.json", how) for how in (remove, break_off)),
    *(("tiny", file, how) for file in TINY for how in (remove, break_off, lose_one, reshape_one, rename_all)),
    *(("tiny", "vae/config.json", how) for how in (remove, break_off)),
    *(("tiny", "unet_lora/adapter_config.json", how) for how in (remove, break_off)),
    *(("tiny", file, break_off) for file in ("generator.json", "unet/config.json")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "file", "damage"), CASES)
def test_a_damaged_part_is_named(kind, file, damage, mini_sd, tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree({"sd": mini_sd, "tiny": tiny}[kind], folder)
    damage(folder / file)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        generator = OneStepGenerator.from_pretrained(folder)
        if generator.uses_text:
            generator.text_embeds(1)
    assert str((folder / file).parent) in str(refused.value)


@pytest.mark.parametrize("content", [b"{}", {"other": torch.zeros(1, 4, 8)}])
def test_a_prompt_embedding_that_is_none_is_named(content, mini_sd, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(mini_sd, folder)
    file = folder / "prompt_embeds.safetensors"
    file.write_bytes(content) if isinstance(content, bytes) else save_file(content, file)
    with pytest.raises(ValueError, match=str(file)):
        OneStepGenerator.from_pretrained(folder)


DEEP = "[" * 50 + "]" * 50
STRANGE = {
    "absurd layers": ("sd", "unet/config.json", {"layers_per_block": 10**6}, "layers_per_block must be a number up to"),
    "absurd width": ("sd", "unet/config.json", {"block_out_channels": [10**9] * 4}, "must be a number up to"),
    "larger than its weights": ("sd", "unet/config.json", {"block_out_channels": [1 << 13] * 4}, "asks for"),
    "endless list": ("sd", "unet/config.json", {"down_block_types": ["DownBlock2D"] * 10**4}, "at most 256 entries"),
    "a text for a number": ("sd", "unet/config.json", {"layers_per_block": "two"}, "no model can be built"),
    "nested": ("sd", "unet/config.json", {"block_out_channels": json.loads(DEEP)}, "nested deeper"),
    "text encoder": ("sd", "text_encoder/config.json", {"num_hidden_layers": 10**7}, "num_hidden_layers must be"),
    "vae": ("sd", "vae/config.json", {"layers_per_block": 10**5}, "layers_per_block must be"),
    "scaling": ("sd", "scheduler/scheduler_config.json", {"beta_start": "small"}, "beta_start must be a number"),
    "schedule": ("sd", "scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "must be a whole number"),
    "tiny width": ("tiny", "unet/config.json", {"block_out_channels": [1 << 19, 16]}, "asks for"),
    "tiny text": ("tiny", "unet/config.json", {"block_out_channels": "wide"}, "unet/config.json"),
    "tiny class": ("tiny", "unet/config.json", {"_class_name": ["TinyUNet"]}, "_class_name must be a text"),
    "codec class": ("tiny", "vae/config.json", {"_class_name": {}}, "_class_name must be a text"),
    "factor": ("tiny", "vae/config.json", {"factor": 10**5}, "factor must be a whole number from 1 to 64"),
    "timestep": ("tiny", "generator.json", {"t_noise": [1]}, "t_noise must be int"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_strangers_config_is_judged_before_anything_is_built(name, mini_sd, tiny, tmp_path):
    """Each would hang, try to allocate terabytes, or end in a message that names no file."""
    kind, file, change, message = STRANGE[name]
    folder = tmp_path / "model"
    shutil.copytree({"sd": mini_sd, "tiny": tiny}[kind], folder)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    start = time.process_time()
    with pytest.raises(ValueError, match=message) as refused:
        generator = OneStepGenerator.from_pretrained(folder)
        if generator.uses_text:
            generator.text_embeds(1)
    assert time.process_time() - start < 10 and "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_json_that_nests_without_end_is_named(mini_sd, tmp_path):
    shutil.copytree(mini_sd, tmp_path / "model")
    file = tmp_path / "model" / "unet" / "config.json"
    file.write_text("[" * 10**6 + "]" * 10**6)
    with pytest.raises(ValueError, match=f"{file}: not valid JSON"):
        OneStepGenerator.from_pretrained(tmp_path / "model")
