"""Model folders with a part missing, damaged, or of another model: refused, naming the file or the folder."""

from __future__ import annotations

import shutil
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
