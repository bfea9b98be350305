"""Fold a model folder's LoRA into its weights: `python -m gdpo.merge FOLDER --out OUT [--strength 0..1]`.

The strength is the knob between the model that training started from (0) and the trained one (1): every LoRA layer
becomes W + strength * scale * B A, every layer trained whole (1 - strength) * base + strength * trained.
"""

from __future__ import annotations

import os

from jsonargparse.typing import ClosedUnitInterval

from engine.io.cli import Parser, run
from engine.io.folders import check_target
from gdpo.generator import OneStepGenerator
from gdpo.model import lora


def merge(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    strength: float = 1.0,
    *,
    overwrite: bool = False,
) -> None:
    """Write `folder` with its LoRA (UNet's and VAE's) merged as the model folder `out`, whole or not at all.

    Args:
        folder: a model folder with unet_lora/ or vae_lora/.
        out: the folder to make.
        strength: in [0,1].
        overwrite: replace an `out` that holds a model.

    Raises:
        ValueError: no LoRA in `folder`, or a strength outside [0,1]. FileExistsError: `out` exists.
    """
    target = check_target(out, overwrite, folder)
    generator = OneStepGenerator.from_pretrained(folder)
    if not any(lora.adapters(model) for model in (generator.unet, generator.vae)):
        raise ValueError(f"{os.fspath(folder)}: no unet_lora/ or vae_lora/ in it: there is nothing to merge")
    generator.merge_lora(strength).save_pretrained(target)


def main() -> None:
    parser = Parser(prog="python -m gdpo.merge", description="Fold a model folder's LoRA into its weights.")
    parser.add_argument("folder", type=str, help="a model folder with unet_lora/ or vae_lora/")
    parser.add_argument("--out", type=str, required=True, help="the model folder to make")
    parser.add_argument("--strength", type=ClosedUnitInterval, default=1.0, help="0: the base, 1: the trained model")
    parser.add_argument("--overwrite", action="store_true", help="replace an --out that holds a model")
    args = parser.parse_args()
    merge(args.folder, args.out, args.strength, overwrite=args.overwrite)
    print(f"{args.out}: the LoRA of {args.folder} merged at strength {args.strength:g}")


if __name__ == "__main__":
    run(main)
