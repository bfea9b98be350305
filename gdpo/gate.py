"""Give a compact generator a gate: `python -m gdpo.gate --config F.yaml --model.pretrained MODEL --out OUT`.

The gate keeps most of what the network draws off clean pictures (gdpo.model.gate). It is fitted on the crops and the
degradation of a NAOSD config, whose mix must hold `bicubic`: crops that are only reduced are the clean ones. All other
weights stay, but for the last convolution's scale: --degraded 1.2 draws a fifth more on degraded pictures. It prints
what share is drawn on held-out crops of both kinds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from jsonargparse.typing import ClosedUnitInterval, PositiveFloat, PositiveInt

from engine.io.cli import Parser, run
from engine.io.folders import check_target

if TYPE_CHECKING:
    from gdpo.generator import OneStepGenerator
    from gdpo.model.gate import Seen
    from gdpo.photos.dataset import CropDataset
    from gdpo.train.config import NAOSDConfig


def batches(generator: OneStepGenerator, crops: CropDataset, config: NAOSDConfig, steps: int) -> Iterator[Seen]:
    """What the gate sees of crops, half of them clean: a function of the config's seed.

    Raises:
        ValueError: the degradation is always or never clean.
    """
    import torch

    from gdpo.degradation import Degradation
    from gdpo.model.gate import Seen
    from gdpo.train.setup import group_noise
    from gdpo.train.teacher import upsampled

    degrade, each, sample = Degradation(config.degradation), config.train_batch_size // 2, 0
    if not degrade.config.mix.get("bicubic") or degrade.config.preset == "bicubic":
        raise ValueError("degradation.mix must hold bicubic beside another preset: the gate learns to tell them apart")
    features: list[torch.Tensor] = []
    hook = generator.unet.gate.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    for _ in range(steps):
        kinds: dict[bool, list[int]] = {True: [], False: []}
        while min(map(len, kinds.values())) < each:
            kinds[degrade.preset_of(config.seed, sample) == "bicubic"].append(sample)
            sample += 1
        samples = kinds[True][:each] + kinds[False][:each]
        found = [crops.item(crops.index_of(s, seed=config.seed), seed=config.seed, sample=s)["hr"] for s in samples]
        lr, _ = degrade(torch.stack(found), seed=config.seed, samples=samples)
        with torch.no_grad():
            latents = generator.encode(upsampled(lr))
            generator.predict(latents, group_noise(latents.shape, config.seed, "gate", samples, 1))
        yield Seen(features.pop(), torch.arange(len(samples)) < each)
    hook.remove()


def gated(config: NAOSDConfig, channels: int, clean: float, degraded: float, steps: int) -> OneStepGenerator:
    """The generator of config.model.pretrained with a gate fitted on the config's crops.

    Args:
        clean, degraded: the share of the residual that is to be drawn on pictures of each kind.

    Raises:
        ValueError: it is not a compact network; see `batches`.
    """
    import torch
    from tqdm import tqdm

    from gdpo.generator import OneStepGenerator
    from gdpo.model.compact import CompactUNet
    from gdpo.model.gate import fit
    from gdpo.photos.dataset import CropDataset
    from gdpo.train.config import several
    from gdpo.train.setup import base_of

    source = base_of(config.model, config.seed)
    if not isinstance(source.unet, CompactUNet):
        raise ValueError(
            f"{config.model.pretrained}: only a compact network can have a gate; got {type(source.unet).__name__}"
        )
    timesteps = {"t_noise": source.t_noise, "t_diffusion": source.t_diffusion}
    generator = OneStepGenerator.tiny(replace(source.unet.config, gate=channels), seed=config.seed, **timesteps)
    weights = {name: w for name, w in source.unet.state_dict().items() if not name.startswith("gate.")}
    for name in ("conv_out.weight", "conv_out.bias"):  # the gate is at most 1
        weights[name] = degraded * weights[name]
    generator.unet.load_state_dict(generator.unet.state_dict() | weights)
    generator.requires_grad_(False).eval()
    gate = generator.unet.gate.requires_grad_(True)
    [folder] = several(config.data.folder)
    crops = CropDataset(folder, "train", config.data.crop_size)
    fit(
        gate,
        tqdm(batches(generator, crops, config, steps), total=steps, desc="gate", file=sys.stderr),
        steps,
        clean=clean,
    )
    gate.requires_grad_(False)
    shares: dict[bool, list[float]] = {True: [], False: []}
    for seen in batches(generator, crops.held_out(), config, max(1, steps // 10)):
        for clean_one, share in zip(seen.clean.tolist(), (degraded * gate(seen.features)).mean((1, 2, 3)).tolist()):
            shares[clean_one].append(share)
    for kind, values in (("clean", shares[True]), ("degraded", shares[False])):
        mean, low, high = torch.tensor(values).mean(), min(values), max(values)
        print(f"held-out {kind} crops: {mean:.2f} of the residual is drawn ({low:.2f} to {high:.2f})")
    return generator


def main() -> None:
    from gdpo.train.__main__ import ConfigFile
    from gdpo.train.config import NAOSDConfig

    parser = Parser(prog="python -m gdpo.gate", description="Give a compact generator a gate, and fit it.")
    parser.add_argument("--out", type=str, required=True, help="the model folder to make")
    parser.add_argument("--clean", type=ClosedUnitInterval, default=0.3, help="share of the residual on clean pictures")
    parser.add_argument("--degraded", type=PositiveFloat, default=1.0, help="share of it on degraded pictures")
    parser.add_argument("--steps", type=PositiveInt, default=300, help="batches to fit on")
    parser.add_argument("--channels", type=PositiveInt, default=16, help="channels of the gate")
    parser.add_argument("--overwrite", action="store_true", help="replace an --out that holds a model")
    parser.add_argument("--config", action=ConfigFile, help="YAML file of `gdpo.train naosd`: crops and degradation")
    parser.add_class_arguments(NAOSDConfig, nested_key=None)
    values = vars(parser.instantiate(parser.parse_args()))
    out, overwrite, _ = (values.pop(name) for name in ("out", "overwrite", "config"))
    clean, degraded, steps, channels = (values.pop(name) for name in ("clean", "degraded", "steps", "channels"))
    if clean >= degraded:
        raise ValueError(f"--clean must be below --degraded {degraded:g}: clean pictures need less; got {clean:g}")
    config = NAOSDConfig(**values)
    config.validate()
    target = check_target(out, overwrite, config.model.pretrained)
    gated(config, channels, clean, degraded, steps).save_pretrained(target)
    print(f"{out}: {config.model.pretrained} with a gate")


if __name__ == "__main__":
    run(main)
