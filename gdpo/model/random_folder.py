"""Random-weight model folders, shaped exactly like Stable Diffusion 2.1-base: for tests, benchmarks, dry runs.

    python -m gdpo.random_folder OUT --size mini|small|sd21 [--vae kl|taesd] [--seed 0] [--dtype float32]

The folder has what the public one has (model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/) and loads
with diffusers, so whatever runs on it runs on the real weights. Every size has the same blocks in the same order, with
cross-attention, linear projections and latents of 4 channels at 1/8 of the picture:

    mini   narrow and shallow, for tests: made in seconds
    small  a fifth of the widths of SD 2.1-base, so that UNet and VAE keep their shares of the time: for CPU benchmarks
    sd21   the public configuration of stable-diffusion-2-1-base, gdpo/resources/sd21.yaml (865 M parameters in UNet)
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn

from engine.io import cli
from engine.io.folders import staged_folder
from gdpo.model.parts import write_index


def _text(width: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": width // 2,
    }


PUBLIC = Path(__file__).resolve().parents[1] / "resources" / "sd21.yaml"
NARROWER: dict[str, dict[str, dict[str, Any]]] = {  # what the other sizes have instead
    "mini": {
        "unet": {
            "block_out_channels": [16, 32, 32, 32],
            "attention_head_dim": [1, 2, 4, 4],
            "layers_per_block": 1,
            "cross_attention_dim": 32,
            "norm_num_groups": 8,
        },
        "vae": {"block_out_channels": [8, 16, 16, 16], "layers_per_block": 1, "norm_num_groups": 4},
        "text_encoder": _text(32, 2, 4),
    },
    "small": {
        "unet": {
            "block_out_channels": [64, 128, 256, 256],
            "attention_head_dim": [1, 2, 4, 4],
            "cross_attention_dim": 192,
        },
        "vae": {"block_out_channels": [24, 48, 96, 96], "norm_num_groups": 8},
        "text_encoder": _text(192, 4, 4),
    },
    "sd21": {},
}
SIZES = tuple(NARROWER)
# The public text encoder has 49408 tokens: 512 bytes (alone and at a word's end), 48894 merges, start and end of text.
MERGES = 49408 - 512 - 2
WORDS = ["clean", "high", "resolution", "photo", "detailed", "sharp", "texture", "blurry", "painting", "low", "quality"]


def architecture(size: str) -> dict[str, dict[str, Any]]:
    """Keyword arguments of unet, vae, text_encoder and scheduler: resources/sd21.yaml, narrowed for the other sizes."""
    public = yaml.safe_load(PUBLIC.read_text(encoding="utf-8"))
    return {part: values | NARROWER[size].get(part, {}) for part, values in public.items()}


def build_folder(
    out: str | os.PathLike[str],
    size: Literal["mini", "small", "sd21"] = "mini",
    seed: int = 0,
    vae: Literal["kl", "taesd"] = "kl",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a random-weight folder at `out`, whole or not at all, and return its path.

    Args:
        out: the folder to make; it must not exist.
        size: see above.
        seed: alone determines every weight.
        vae: "kl" is Stable Diffusion's AutoencoderKL, "taesd" an AutoencoderTiny.
        dtype: of the weights on the disk.

    Raises:
        ValueError: an unknown size or vae. FileExistsError: `out` exists.
    """
    out = Path(out)
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}; got {size!r}")
    if vae not in ("kl", "taesd"):
        raise ValueError(f"vae must be kl or taesd; got {vae!r}")
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or choose another folder")
    shape = architecture(size)
    merges = _clip_merges() if size == "sd21" else _word_merges(WORDS)
    with staged_folder(out) as root, torch.random.fork_rng(devices=[]):
        parts = {
            "unet": lambda: _unet(shape["unet"]),
            "vae": lambda: _taesd(size) if vae == "taesd" else _vae(shape["vae"]),
            "text_encoder": lambda: _text_encoder(shape["text_encoder"], 512 + len(merges) + 2),
        }
        for number, (name, build) in enumerate(parts.items()):
            torch.manual_seed(seed * len(parts) + number)
            nn.Module.to(build(), dtype).save_pretrained(root / name)
        _write_tokenizer(root / "tokenizer", merges)
        _scheduler(shape["scheduler"]).save_pretrained(root / "scheduler")
        write_index(root, "AutoencoderKL" if vae == "kl" else "AutoencoderTiny", "DDPMScheduler", text=True)
    return out


def _unet(config: dict[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**config)


def _vae(config: dict[str, Any]) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(**config)


def _taesd(size: str) -> Any:
    from diffusers import AutoencoderTiny

    if size == "sd21":
        return AutoencoderTiny()  # its defaults are madebyollin/taesd
    width, deep = {"mini": (8, 1), "small": (24, 3)}[size]
    return AutoencoderTiny(
        encoder_block_out_channels=(width,) * 4,
        decoder_block_out_channels=(width,) * 4,
        num_encoder_blocks=(1, deep, deep, deep),
        num_decoder_blocks=(deep, deep, deep, 1),
    )


def _text_encoder(config: dict[str, Any], vocabulary: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(vocab_size=vocabulary, **config))


def _write_tokenizer(folder: Path, merges: list[tuple[str, str]]) -> None:
    """The files of the public tokenizer/: every byte, every byte at a word's end, the merges, start and end of text."""
    letters = _byte_letters()
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokens = [*letters, *(b + "</w>" for b in letters), *(a + b for a, b in merges), start, end]
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": "!"}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in a byte-level vocabulary, in CLIP's order.

    Printable Latin-1 bytes stand for themselves and come first; the others get letters from U+0100 on.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def _word_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges that build each word from left to right: a small but genuine byte-pair vocabulary."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        left, *rest = [*word[:-1], word[-1] + "</w>"]
        for right in rest:
            merges[left, right] = None
            left += right
    return list(merges)


def _clip_merges() -> list[tuple[str, str]]:
    """CLIP's own merges from the package openai-clip (found without importing it: it would load torchvision); without
    it as many made-up ones, which cost and weigh the same."""
    spec = importlib.util.find_spec("clip")
    file = Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz") if spec and spec.origin else None
    if file is None or not file.is_file():
        print("openai-clip is not installed: the vocabulary is made up, of the same size", file=sys.stderr)
        letters = _byte_letters()
        made_up = dict.fromkeys([*_word_merges(WORDS), *((a, b) for a in letters for b in letters)])
        return list(made_up)[:MERGES]
    with gzip.open(file, "rt", encoding="utf-8") as f:
        lines = f.read().split("\n")[1 : MERGES + 1]
    return [(left, right) for left, right in map(str.split, lines)]


def _scheduler(config: dict[str, Any]) -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(**config)


def main() -> None:
    parser = cli.Parser(
        prog="python -m gdpo.random_folder",
        description="Make a model folder with random weights, in the shape of Stable Diffusion 2.1-base.",
    )
    parser.add_argument("out", type=str, help="the folder to make")
    parser.add_argument(
        "--size", type=Literal["mini", "small", "sd21"], default="mini", help="size of the UNet, VAE and text encoder"
    )
    parser.add_argument("--vae", type=Literal["kl", "taesd"], default="kl", help="AutoencoderKL or AutoencoderTiny")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the weights")
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "float16", "bfloat16"],
        default="float32",
        help="number format of the weights",
    )
    args = parser.parse_args()
    print(build_folder(args.out, args.size, args.seed, args.vae, getattr(torch, args.dtype)))
