"""Fold a LoRA into the weights: `python -m gdpo.merge FOLDER --out OUT [--strength S] [--base BASE]`.

FOLDER is a model folder with a live LoRA, or a checkpoint of a run (RUN/checkpoint-N), of which this makes a model.
The strength interpolates between the model that training started from (0) and the trained one (1): every LoRA layer
becomes W + strength * scale * B A, every layer trained whole (1 - strength) * base + strength * trained. A model of
which every weight was trained does not hold its base; --base names it (weight interpolation: Wang et al. 2018,
arXiv 1809.00219, section 3.4; Wortsman et al. 2022, arXiv 2109.01903). A strength above 1 goes on in the direction of
training, further than the trained model (Zheng et al. 2024, arXiv 2404.16792).
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from jsonargparse.typing import NonNegativeFloat

from engine.io.cli import Parser, run
from engine.io.folders import check_target
from engine.runtime.foreign import is_checkpoint
from gdpo.generator import OneStepGenerator
from gdpo.model import lora


def merge(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    strength: float = 1.0,
    *,
    base: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write `folder` with its LoRA (UNet's and VAE's) merged as the model folder `out`, whole or not at all.

    Args:
        folder: a model folder with unet_lora/ or vae_lora/, or a checkpoint.
        out: the folder to make.
        strength: at least 0.
        base: the model at strength 0 of a `folder` without a LoRA: a model folder or what `model.pretrained` takes.
        overwrite: replace an `out` that holds a model.

    Raises:
        ValueError: neither a LoRA in `folder` nor a base, or both; a base of another kind; a strength below 0, or a
            damaged checkpoint. FileExistsError: `out` exists.
    """
    target = check_target(out, overwrite, folder)
    checkpoint = is_checkpoint(Path(folder))
    generator = generator_of(Path(folder)) if checkpoint else OneStepGenerator.from_pretrained(folder)
    own = any(lora.adapters(model) for model in (generator.unet, generator.vae))
    if base is not None:
        if own:
            raise ValueError(f"{os.fspath(folder)}: it has a LoRA and so its own base; leave --base away")
        interpolate(generator, base_of(base), strength)
    elif not own and not checkpoint:
        raise ValueError(f"{os.fspath(folder)}: no unet_lora/ or vae_lora/ in it: there is nothing to merge")
    elif not own and strength != 1:
        raise ValueError(
            f"{os.fspath(folder)}: this run trained all weights; say with --base which model strength 0 is"
        )
    generator.merge_lora(strength).save_pretrained(target)


@torch.no_grad()
def interpolate(trained: OneStepGenerator, base: OneStepGenerator, strength: float) -> None:
    """Give `trained` the weights (1 - strength) * base + strength * trained.

    Raises:
        ValueError: the two are not of one architecture, or of other timesteps; strength below 0.
    """
    lora.check_strength(strength)
    steps = [(g.t_noise, g.t_diffusion, g.parametrization) for g in (trained, base)]
    weights, others = trained.state_dict(), base.state_dict()
    if steps[0] != steps[1] or {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in others.items()}:
        raise ValueError(
            "--base: another architecture, or other timesteps, than the model's; it must be what it started from"
        )
    for name, weight in weights.items():
        if weight.is_floating_point():
            weight.copy_(torch.lerp(others[name].to(weight), weight, strength))


def base_of(name: str | os.PathLike[str]) -> OneStepGenerator:
    """The generator that training would start from; what makes it needs the packages of training."""
    from gdpo.train.options import ModelConfig
    from gdpo.train.start import starting_generator

    return starting_generator(ModelConfig(pretrained=os.fspath(name)), seed=0)


def generator_of(checkpoint: Path) -> OneStepGenerator:
    """The generator of a checkpoint; what reads it needs the packages of training."""
    from gdpo.train.at_checkpoint import generator_at

    return generator_at(checkpoint)


def main() -> None:
    description = "Merge a LoRA into the weights of its model, or make a model from a checkpoint."
    parser = Parser(prog="python -m gdpo.merge", description=description)
    parser.add_argument("folder", type=str, help="a model folder with unet_lora/ or vae_lora/, or RUN/checkpoint-N")
    parser.add_argument("--out", type=str, required=True, help="the model folder to make")
    parser.add_argument(
        "--strength", type=NonNegativeFloat, default=1.0, help="0: the base, 1: the trained model, 2: twice as far"
    )
    parser.add_argument("--base", type=str, help="the model at strength 0, if every weight was trained (no LoRA)")
    parser.add_argument("--overwrite", action="store_true", help="replace an --out that holds a model")
    args = parser.parse_args()
    merge(args.folder, args.out, args.strength, base=args.base, overwrite=args.overwrite)
    print(f"{args.out}: what {args.folder} trained, merged at strength {args.strength:g}")


if __name__ == "__main__":
    run(main)
