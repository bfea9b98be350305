"""Released weights as a model folder: `python -m gdpo.convert RELEASED --base SD_FOLDER --out FOLDER`.

RELEASED is either of the authors' two released forms, or this project's:
- the LoRA file (a torch.save of a dict): the folder is --base with the LoRA live in unet_lora/ and vae_lora/, so that
  `gdpo.merge --strength` can choose how much of it. A stage-one (NAOSD) file belongs on Stable Diffusion 2.1-base, a
  stage-two (GDPO) file on the NAOSD model that it was trained from; OSEDiff's file, on Stable Diffusion 2.1-base,
  remembers that no noise is added (t_noise -1) and that the UNet is called at timestep 999;
- the merged folder (unet/, vae/): the folder is these two with schedule and text encoder of --base;
- an exported tiny model, also by the name of a bundled one (tiny, faithful): no --base.

It may also be a published super-resolution network, x4 or x2, of an architecture that spandrel knows, or an ncnn file
of Real-ESRGAN's: the folder is a generator that gives the network's own pixels, and learns to use the noise in NAOSD.

And back: with --out NAME.safetensors RELEASED is a model folder, and the file a network that spandrel's users load.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveInt

from engine.io.cli import Parser, run
from engine.io.folders import check_target
from engine.runtime.foreign import is_engine
from engine.runtime.upscaler import BUNDLED
from gdpo.generator import NO_NOISE, OneStepGenerator
from gdpo.model import lora
from gdpo.model.codecs import load_codec
from gdpo.model.exported import from_export
from gdpo.model.parts import load_pretrained, read_json
from gdpo.model.prompts import PromptEncoder
from gdpo.model.released import ReleasedLora, read_released
from gdpo.model.single_file import save_single_file
from gdpo.model.spandrel_networks import PUBLISHED, is_network

RELEASED_ALPHA = 8  # peft's default, which the authors' code left: the scale is 8 / rank
OSEDIFF_TIMESTEPS = (NO_NOISE, 999)  # (t_noise, t_diffusion) of its released code


def convert(
    released: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    lora_alpha: int = RELEASED_ALPHA,
    t_noise: int | None = None,
    t_diffusion: int | None = None,
    noise: float = 0.0,
    overwrite: bool = False,
) -> None:
    """Write the model folder `out` of released weights, whole or not at all. No pickle is executed.

    Args:
        released: the LoRA file, a diffusers folder with unet/ and perhaps vae/, an exported tiny model or the name of a
            bundled one, or a network: a file of weights or a name of gdpo.model.spandrel_networks.PUBLISHED.
        out: the folder to make.
        base: the diffusers folder to complete them from; a released folder that is complete needs none.
        lora_alpha: the LoRA's scale is lora_alpha / rank.
        t_noise, t_diffusion: timesteps to remember; None means the paper's 250 and 100, or OSEDiff's for its file.
        noise: the network sees its LR with so much noise on it (standard deviation, 8-bit levels), so that the samples
            of a picture differ without a NAOSD; 0: none, until NAOSD has taught it to use the noise.
        overwrite: replace an `out` that holds a model.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: naming what was wrong, expected, and what to do.
    """
    released = Path(released)
    if not released.exists() and released.name == str(released) and is_engine(BUNDLED / released):
        released = BUNDLED / released
    target = check_target(out, overwrite, released, *([] if base is None else [base]))
    network = not released.is_dir() and is_network(str(released))
    if noise and network and base is not None:
        raise ValueError("--noise is for a network, and a network takes no --base; leave one of them out")
    if noise and released.exists() and not network:
        raise ValueError(f"{released} is not a network, and --noise is for networks alone")
    if (released / "manifest.json").is_file():
        if (base, t_noise, t_diffusion) != (None, None, None):
            raise ValueError(f"{released} is an exported model, whole as it is: no --base, --t-noise, --t-diffusion")
        generator = from_export(released)
    elif released.is_dir():
        generator = _from_folder(released, None if base is None else Path(base), t_noise, t_diffusion)
    elif base is None and network:
        timesteps = {"t_noise": t_noise, "t_diffusion": t_diffusion}
        generator = OneStepGenerator.of_network(str(released), noise, **timesteps)
    else:
        unet, vae, osediff = read_released(released)
        if base is None:
            raise ValueError(f"{released} is a LoRA file: --base must name the model folder that it belongs on")
        if osediff:
            t_noise = OSEDIFF_TIMESTEPS[0] if t_noise is None else t_noise
            t_diffusion = OSEDIFF_TIMESTEPS[1] if t_diffusion is None else t_diffusion
        generator = OneStepGenerator.from_pretrained(base, t_noise, t_diffusion).merge_lora()
        _note_another_base(released, generator.unet, unet, stage_two=vae is None)
        _attach(released, generator.unet, unet, lora_alpha)
        if vae is not None:
            _attach(released, generator.vae, vae, lora_alpha)
    generator.save_pretrained(target)


def to_network(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], *, seed: int = 0, overwrite: bool = False
) -> str:
    """Write a model folder as one .safetensors file for spandrel; see gdpo.model.single_file.

    Returns: the name of the architecture.

    Raises:
        FileExistsError: `out` exists. ValueError: see save_single_file.
    """
    if Path(out).exists() and not overwrite:
        raise FileExistsError(f"{os.fspath(out)} exists; --overwrite replaces it")
    return save_single_file(OneStepGenerator.from_pretrained(folder), Path(out), seed)


def _attach(file: Path, model: Any, released: ReleasedLora, alpha: int) -> None:
    """Add the released LoRA to a model, live. A conv_in that was trained whole and has a LoRA becomes one weight."""
    if model is None:
        raise ValueError(f"{file} has a LoRA for a VAE, but the base has no VAE: it is the base of another model")
    layers = dict(model.named_modules())
    for name, (a, b) in released.pairs.items():
        _check_pair(file, name, layers.get(name), released.rank, a, b)
    whole = ("conv_in",) if released.conv_in else ()
    targets = [name for name in released.pairs if name not in whole]
    if whole:
        _check_conv_in(file, layers.get("conv_in"), released.conv_in)
    lora.add(model, released.rank, targets, alpha=alpha, train_whole=whole)
    own = lora.parameters(model)
    with torch.no_grad():
        for name in targets:
            for side, value in zip("AB", released.pairs[name]):
                own.pop(f"{name}.lora_{side}.default.weight").copy_(value)
        for leaf, value in released.conv_in.items():
            trained = value.double()
            if leaf == "weight" and "conv_in" in released.pairs:
                a, b = released.pairs["conv_in"]
                trained = trained + alpha / released.rank * _product(a.double(), b.double())
            own.pop(f"conv_in.modules_to_save.default.{leaf}").copy_(trained)
    assert not own, f"not filled: {sorted(own)[:3]}"


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """B A of a convolution's pair: [rank,in,k,k], [out,rank,1,1] -> [out,in,k,k]."""
    return (b.flatten(1) @ a.flatten(1)).unflatten(1, a.shape[1:])


def _check_pair(file: Path, name: str, layer: Any, rank: int, a: torch.Tensor, b: torch.Tensor) -> None:
    expected: tuple[tuple[int, ...], tuple[int, ...]]
    if isinstance(layer, torch.nn.Linear):
        expected = (rank, layer.in_features), (layer.out_features, rank)
    elif isinstance(layer, torch.nn.Conv2d):
        expected = (rank, layer.in_channels, *layer.kernel_size), (layer.out_channels, rank, 1, 1)
    else:
        raise ValueError(f"{file}: it adapts {name[:80]!r}, a layer that the base does not have: it is another model's")
    if (tuple(a.shape), tuple(b.shape)) != expected:
        raise ValueError(
            f"{file}: the LoRA of {name} must have the shapes {expected[0]} and {expected[1]} on this base; "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError(f"{file}: the LoRA of {name} holds values that are not finite")


def _check_conv_in(file: Path, layer: Any, released: dict[str, torch.Tensor]) -> None:
    expected = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    got = {name: tuple(value.shape) for name, value in released.items()}
    if got != expected:
        raise ValueError(f"{file}: conv_in must have the shapes {expected} on this base; got {got}")
    if not all(value.isfinite().all() for value in released.values()):
        raise ValueError(f"{file}: conv_in holds values that are not finite")


def _note_another_base(file: Path, unet: Any, released: ReleasedLora, stage_two: bool) -> None:
    """Stage two leaves conv_in as it was, so its copy tells whether the base is the one it was trained from."""
    theirs = released.conv_in.get("weight")
    ours = unet.conv_in.weight
    if stage_two and theirs is not None and theirs.shape == ours.shape:
        distance = float((theirs - ours).norm() / ours.norm())
        if distance > 0.01:  # half precision alone gives 0.0003
            print(
                f"note: conv_in of {file} is not that of --base (relative distance {distance:.2g}): a stage-two LoRA "
                "belongs on the NAOSD model that it was trained from",
                file=sys.stderr,
            )


def _from_folder(released: Path, base: Path | None, t_noise: int | None, t_diffusion: int | None) -> OneStepGenerator:
    """A merged release: its unet/ and vae/, the rest from the base."""
    from diffusers import UNet2DConditionModel

    for part in ("unet", "vae", "scheduler", "text_encoder", "tokenizer"):
        if not (released / part).is_dir() and (part == "unet" or base is None):
            remedy = "" if part == "unet" else "; name a --base that has it"
            raise FileNotFoundError(f"{released / part}: no such folder{remedy}")

    def home(part: str) -> Path:
        return released if (released / part).is_dir() or base is None else base

    unet = load_pretrained(UNet2DConditionModel, released / "unet")
    codec: Any = load_codec(home("vae") / "vae")
    text_home = home("text_encoder")
    schedule_file = home("scheduler") / "scheduler" / "scheduler_config.json"
    width_file = text_home / "text_encoder" / "config.json"
    for file in (schedule_file, width_file):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; a model folder needs it")
    width = read_json(width_file).get("hidden_size")
    if (unet.config.in_channels, unet.config.cross_attention_dim) != (codec.channels, width):
        raise ValueError(
            f"{released / 'unet'} takes {unet.config.in_channels} channels and text of width "
            f"{unet.config.cross_attention_dim}; the VAE gives {codec.channels} and the text encoder {width}: they are "
            "parts of different models"
        )
    return OneStepGenerator(
        unet,
        codec,
        read_json(schedule_file),
        t_noise=t_noise,
        t_diffusion=t_diffusion,
        prompt_encoder=PromptEncoder(text_home),
    )


def main() -> None:
    parser = Parser(
        prog="python -m gdpo.convert",
        description="Convert released weights to a model folder, or a model folder to a file for spandrel.",
    )
    parser.add_argument(
        "released",
        type=str,
        help="the authors' LoRA file (.pkl) or merged folder; an exported tiny model (tiny and faithful are bundled); "
        "or a super-resolution network: a file "
        f"(.pth, .safetensors, .param) or one of {', '.join(PUBLISHED)}",
    )
    parser.add_argument("--base", type=str | None, help="diffusers folder of the base model")
    parser.add_argument(
        "--out", type=str, required=True, help="the model folder to make, or NAME.safetensors: a network for spandrel"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the noise in NAME.safetensors")
    parser.add_argument(
        "--lora-alpha", type=PositiveInt, default=RELEASED_ALPHA, help="alpha of the LoRA: its scale is alpha / rank"
    )
    parser.add_argument(
        "--t-noise", type=int | None, help="timestep of the added noise; -1: none (default: 250; OSEDiff: -1)"
    )
    parser.add_argument(
        "--t-diffusion", type=int | None, help="timestep given to the UNet (default: 100; OSEDiff: 999)"
    )
    parser.add_argument(
        "--noise",
        type=NonNegativeFloat,
        default=0.0,
        help="noise that a network sees on its LR, a standard deviation in 8-bit levels such as 1.3: the samples of a "
        "picture differ from the start; with 0, NAOSD teaches the network to use noise",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an --out that holds a model")
    args = parser.parse_args()
    if Path(args.out).suffix == ".safetensors":
        if args.noise:
            raise ValueError("--noise makes a model folder; --out must not end in .safetensors")
        name = to_network(args.released, args.out, seed=args.seed, overwrite=args.overwrite)
        print(f"{args.out}: {args.released} as a network of spandrel's architecture {name}")
        return
    convert(
        args.released,
        args.out,
        args.base,
        lora_alpha=args.lora_alpha,
        t_noise=args.t_noise,
        t_diffusion=args.t_diffusion,
        noise=args.noise,
        overwrite=args.overwrite,
    )
    live = any((Path(args.out) / name).is_dir() for name in ("unet_lora", "vae_lora"))
    hint = f" (its LoRA is live; to fold it in: python -m gdpo.merge {args.out} --out FOLDER)" if live else ""
    print(f"{args.out}: {args.released} converted{hint}")


if __name__ == "__main__":
    run(main)
