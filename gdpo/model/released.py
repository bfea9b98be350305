"""Read the authors' LoRA files (a torch.save of a dict) as data, whatever a stranger may have put into them.

A pickle is a program, so the file is judged before any of it runs: it must be a plain torch.save archive (stored, not
compressed, no name twice), and its pickle may name nothing but the constructors of tensors. Only then
`torch.load(weights_only=True)`, which enforces nearly the same once more, reads the bytes that were judged.
"""

from __future__ import annotations

import io
import os
import pickletools
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine.io.files import naming

ALLOWED_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double")),
}
# Opcodes of later protocols that name or make objects; torch.save writes protocol 2 and needs none of them.
FORBIDDEN_OPCODES = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "PERSID"}
MAX_BYTES = 2**31  # the released files have 16 to 50 MB; a rank of 256 would still fit
LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.default_(encoder|decoder|others)\.weight")
CONV_IN_KEY = re.compile(r"conv_in\.(base_layer\.)?(?P<name>weight|bias)")


@dataclass(frozen=True)
class ReleasedLora:
    """What a released file holds for one model (UNet or VAE).

    Attributes:
        rank: of every pair.
        pairs: module name -> (A, B), linear [rank,in], [out,rank] or convolution [rank,in,k,k], [out,rank,1,1].
        conv_in: "weight" and "bias" of the UNet's first convolution, which stage one trains whole; else empty.
    """

    rank: int
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    conv_in: dict[str, torch.Tensor]


class Released(NamedTuple):
    """A released file: `vae` None where it adapts the UNet alone; `osediff`: it is OSEDiff's, which adds no noise."""

    unet: ReleasedLora
    vae: ReleasedLora | None
    osediff: bool


def read_released(path: str | os.PathLike[str]) -> Released:
    """The LoRAs of a released file. Nothing in it is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the file and what in it is not what a released file holds.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the authors' LoRA file (.pkl) or a model folder")
    content = _load(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}; a released LoRA file holds a dict")
    if "unet_lora_encoder_modules_pix" in content:
        raise ValueError(
            f"{path} is PiSA-SR's: its UNet predicts what is to be subtracted from the latent, not noise, so no model "
            "folder can hold it; OSEDiff's, NAOSD's and GDPO-SR's files can be converted"
        )
    unet = _part(path, content, "unet", ("encoder", "decoder", "others"))
    # OSEDiff's file, the first of the family, adapts the VAE's encoder alone and lists nothing else of it.
    groups = tuple(g for g in ("encoder", "decoder", "others") if g == "encoder" or f"vae_lora_{g}_modules" in content)
    vae = _part(path, content, "vae", groups) if "state_dict_vae" in content else None
    return Released(unet, vae, osediff=vae is not None and groups == ("encoder",))


def _load(path: Path) -> Any:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: refused: {path.stat().st_size / 2**30:.1f} GiB is too large for a LoRA file")
    with naming(path):
        raw = path.read_bytes()
    _judge_archive(path, raw)
    try:
        return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # hostile bytes can raise anything; torch's own advice (load it unsafely) is withheld
        first = (str(error).splitlines() or [""])[0][:120]
        raise ValueError(f"{path}: refused: not a readable LoRA file ({type(error).__name__}: {first})") from None


def _judge_archive(path: Path, raw: bytes) -> None:
    """Refuse whatever torch.save would not have written for a dict of names, numbers and tensors."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            pickles = [name for name in names if name.split("/")[-1].lower().endswith(".pkl")]
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or len(set(names)) != len(names) or sum(entry.file_size for entry in entries) > len(raw):
                raise ValueError(
                    f"{path}: refused: compressed, repeated or overlapping entries; torch.save writes none"
                )
            if len(pickles) != 1 or not pickles[0].endswith("/data.pkl"):
                raise ValueError(f"{path}: refused: expected one data.pkl in it; got {', '.join(pickles) or 'none'}")
            program = archive.read(pickles[0])
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError):
        raise ValueError(
            f"{path}: refused: not an archive that torch.save writes (a whole file, by PyTorch 1.6 or newer)"
        ) from None
    _judge_pickle(path, program)


def _judge_pickle(path: Path, program: bytes) -> None:
    """Walk the opcodes without running them; every object that they name must be a constructor of tensors."""
    try:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "GLOBAL" and argument not in ALLOWED_GLOBALS:
                name = str(argument).replace(" ", ".")[:80]
                raise _Refused(f"it names {name!r}, which no LoRA file needs; nothing of it was executed")
            if opcode.name in FORBIDDEN_OPCODES:
                raise _Refused(f"it uses the pickle opcode {opcode.name}; nothing of it was executed")
    except _Refused as refused:
        raise ValueError(f"{path}: refused: {refused}") from None
    except Exception as error:  # the walker asserts and raises at will on bytes that are no pickle
        raise ValueError(f"{path}: refused: its data.pkl is not a pickle ({type(error).__name__})") from None


class _Refused(Exception):
    pass


def _part(path: Path, content: dict, model: str, groups: tuple[str, ...]) -> ReleasedLora:
    """One model's part of the dict, checked for type, completeness and consistency."""
    listed: set[str] = set()
    for group in groups:
        key = f"{model}_lora_{group}_modules"
        modules = content.get(key)
        if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
            raise ValueError(f"{path}: {key} must be a list of module names; got {type(modules).__name__}")
        listed.update(modules)
    rank, state = content.get(f"rank_{model}"), content.get(f"state_dict_{model}")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{path}: rank_{model} must be a positive integer; got {rank!r:.40}")
    if not isinstance(state, dict):
        raise ValueError(f"{path}: state_dict_{model} must be a dict; got {type(state).__name__}")
    sides: dict[str, dict[str, torch.Tensor]] = {"A": {}, "B": {}}
    conv_in = {}
    for key, tensor in state.items():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not tensor.is_floating_point():
            raise ValueError(f"{path}: state_dict_{model}[{key!r:.80}] must be a floating-point tensor")
        tensor = tensor.detach()
        if match := LORA_KEY.fullmatch(str(key)):
            sides[match["side"]][match["module"]] = tensor
        elif model == "unet" and (match := CONV_IN_KEY.fullmatch(str(key))):
            conv_in[match["name"]] = tensor
        else:
            raise ValueError(f"{path}: state_dict_{model} holds {key!r:.80}, which is neither LoRA nor conv_in")
    for side, found in sides.items():
        if odd := sorted(listed ^ set(found)):
            raise ValueError(
                f"{path}: the {model}'s list of modules and its lora_{side} weights differ by {len(odd)} modules, "
                f"such as {odd[0]!r:.80}; is the file complete?"
            )
    return ReleasedLora(rank, {name: (sides["A"][name], sides["B"][name]) for name in sorted(listed)}, conv_in)
