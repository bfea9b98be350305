"""A smaller model from a larger one: `python -m gdpo.shrink MODEL --out OUT --crops CROPS --width 48`.

Two kinds of model can be made smaller, each with what it takes away fitted by least squares on degraded crops
(gdpo.model.shrink): a compact one gets fewer channels (`--width`), a generator of an RRDBNet such as Real-ESRGAN
x4plus fewer residual blocks (`--blocks`). NAOSD then trains it, with the larger one as teacher.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor

from engine.io.cli import Parser, run
from engine.io.folders import check_target
from gdpo.degradation import Degradation, DegradationConfig
from gdpo.generator import OneStepGenerator
from gdpo.model.compact import CompactUNet
from gdpo.model.network_unet import NetworkUNet
from gdpo.model.shrink import merge_blocks, narrow
from gdpo.photos.dataset import CropDataset

_CROP = 256
_MIX = {"bicubic": 0.6, "realesrgan": 0.5}  # beside the light degradation


def shrink(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    crops: str | os.PathLike[str],
    *,
    width: int | None = None,
    blocks: Sequence[int] | None = None,
    count: int = 60,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Write a smaller model as the folder `out`, whole or not at all.

    Args:
        model: a model folder; its LoRA, if any, is merged.
        crops: a folder of gdpo.prepare; degraded crops of its training part are what is fitted on.
        width: channels of every second activation of a compact model.
        blocks: numbers of an RRDBNet's blocks; see gdpo.model.shrink.merge_blocks.
        count: of crops.
        seed: of degradation and noise.
        overwrite: replace an `out` that holds a model.

    Raises:
        ValueError: not one of width and blocks, or not that of this model; see gdpo.model.shrink.
        FileNotFoundError, FileExistsError: naming the folder.
    """
    if (width is None) == (blocks is None):
        raise ValueError("one of --width (a compact model) and --blocks (an RRDBNet) must be given")
    target = check_target(out, overwrite, model)
    generator = OneStepGenerator.from_pretrained(model).merge_lora().requires_grad_(False).eval()
    unet = generator.unet
    option, kind = ("--width", CompactUNet) if blocks is None else ("--blocks", NetworkUNet)
    if not isinstance(unet, kind):
        what = "a compact model" if blocks is None else "a published network"
        raise ValueError(f"{os.fspath(model)}: {option} is for {what}; got a {type(unet).__name__}")
    lrs = degraded(Path(crops), count, seed)

    def progress(items):
        from tqdm import tqdm

        return tqdm(items, desc="shrink", file=sys.stderr)

    if isinstance(unet, NetworkUNet):
        generator.unet = merge_blocks(unet, lrs, blocks or [], progress)
    else:
        generator.unet = narrow(unet, samples(generator, lrs, seed), width or 0, progress)
    generator.save_pretrained(target)


def degraded(crops: Path, count: int, seed: int) -> Tensor:
    """LRs [count,3,64,64] in [0,1] of training crops, spread over the photos, from clean to heavily degraded."""
    dataset = CropDataset(crops, "train", _CROP, captions=False)
    degrade = Degradation(DegradationConfig(preset="light", mix=dict(_MIX)))
    found = []
    for i in range(count):
        hr = dataset.item(i * len(dataset) // count % len(dataset), seed=seed, sample=i)["hr"]
        found.append(degrade(hr[None], seed=seed, step=0, samples=[i])[0])
    return torch.cat(found).mul(255).round() / 255


def samples(generator: OneStepGenerator, lrs: Tensor, seed: int) -> Tensor:
    """What the UNet gets of LRs [N,3,h,w], [N,96,h,w]: the latent with noise, and without."""
    from gdpo.train.setup import group_noise
    from gdpo.train.teacher import upsampled

    latents = generator.encode(upsampled(lrs))
    noise = group_noise(latents.shape, seed, "shrink", list(range(len(lrs))), 1)
    return torch.cat([generator.a_n**0.5 * latents + generator.b_n**0.5 * noise, latents], dim=1)


def main() -> None:
    parser = Parser(
        prog="python -m gdpo.shrink",
        description="Make a smaller model from a larger one, fitted by least squares on degraded crops.",
    )
    parser.add_argument("model", type=str, help="a model folder with a compact network or an RRDBNet (ESRGAN)")
    parser.add_argument("--out", type=str, required=True, help="the model folder to make")
    parser.add_argument("--crops", type=str, required=True, help="a folder of gdpo.prepare")
    parser.add_argument("--width", type=PositiveInt | None, help="channels of every second activation, such as 48")
    parser.add_argument(
        "--blocks",
        type=list[int] | None,
        help="of an RRDBNet, such as [10,19,21,23] for four blocks: each stands for those of the whole network up to "
        "its number",
    )
    parser.add_argument("--count", type=PositiveInt, default=60, help="crops that are looked at")
    parser.add_argument("--seed", type=int, default=0, help="random seed of degradation and noise")
    parser.add_argument("--overwrite", action="store_true", help="replace an --out that holds a model")
    args = parser.parse_args()
    shrink(
        args.model,
        args.out,
        args.crops,
        width=args.width,
        blocks=args.blocks,
        count=args.count,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    print(f"{args.out}: a smaller {args.model}")


if __name__ == "__main__":
    run(main)
