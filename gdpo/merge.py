"""Fold a LoRA into the weights: `python -m gdpo.merge FOLDER --out OUT [--strength 0..1]`.

FOLDER is a model folder with a live LoRA, or a checkpoint of a run (RUN/checkpoint-N), of which this makes a model.
The strength interpolates between the model that training started from (0) and the trained one (1): every LoRA layer
becomes W + strength * scale * B A, every layer trained whole (1 - strength) * base + strength * trained.
"""

from __future__ import annotations

import os
from pathlib import Path

from jsonargparse.typing import ClosedUnitInterval

from engine.io.cli import Parser, run
from engine.io.folders import check_target
from gdpo.generator import OneStepGenerator
from gdpo.model import lora
from gdpo.model.parts import is_checkpoint


def merge(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    strength: float = 1.0,
    *,
    overwrite: bool = False,
) -> None:
    """Write `folder` with its LoRA (UNet's and VAE's) merged as the model folder `out`, whole or not at all.

    Args:
        folder: a model folder with unet_lora/ or vae_lora/, or a checkpoint.
        out: the folder to make.
        strength: in [0,1].
        overwrite: replace an `out` that holds a model.

    Raises:
        ValueError: no LoRA in `folder`, a strength outside [0,1], or a damaged checkpoint. FileExistsError: `out`
            exists.
    """
    target = check_target(out, overwrite, folder)
    checkpoint = is_checkpoint(Path(folder))
    generator = generator_of(Path(folder)) if checkpoint else OneStepGenerator.from_pretrained(folder)
    if not any(lora.adapters(model) for model in (generator.unet, generator.vae)):
        if not checkpoint:
            raise ValueError(f"{os.fspath(folder)}: no unet_lora/ or vae_lora/ in it: there is nothing to merge")
        if strength != 1:
            raise ValueError(f"{os.fspath(folder)}: this run trained all weights, so there is no strength to choose")
    generator.merge_lora(strength).save_pretrained(target)


def generator_of(checkpoint: Path) -> OneStepGenerator:
    """The generator of a checkpoint; what reads it needs the packages of training."""
    from gdpo.train.at_checkpoint import generator_at

    return generator_at(checkpoint)


def main() -> None:
    description = "Fold a LoRA into the weights of its model, or make a model of a checkpoint."
    parser = Parser(prog="python -m gdpo.merge", description=description)
    parser.add_argument("folder", type=str, help="a model folder with unet_lora/ or vae_lora/, or RUN/checkpoint-N")
    parser.add_argument("--out", type=str, required=True, help="the model folder to make")
    parser.add_argument("--strength", type=ClosedUnitInterval, default=1.0, help="0: the base, 1: the trained model")
    parser.add_argument("--overwrite", action="store_true", help="replace an --out that holds a model")
    args = parser.parse_args()
    merge(args.folder, args.out, args.strength, overwrite=args.overwrite)
    print(f"{args.out}: what {args.folder} trained, merged at strength {args.strength:g}")


if __name__ == "__main__":
    run(main)
