"""`python -m gdpo.train naosd|gdpo --config F.yaml [--any.key value]`, also under `accelerate launch` or `torchrun`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, Namespace

from engine.io.cli import Parser, run
from gdpo.train.config import GDPOConfig, NAOSDConfig, TrainConfig

CONFIGS: dict[str, type[TrainConfig]] = {"naosd": NAOSDConfig, "gdpo": GDPOConfig}


class ConfigFile(ActionConfigFile):
    """--config: a YAML file of options. One that cannot be read is named; jsonargparse tells what, but not where."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        if os.path.isfile(values):
            try:
                options = yaml.safe_load(Path(values).read_text("utf-8"))
            except (UnicodeDecodeError, yaml.YAMLError) as error:
                raise ValueError(f"{values} is not a YAML file ({error})") from None
            if not isinstance(options, dict):
                raise ValueError(f"{values} must hold options, a line each (learning_rate: 1.0e-4); it holds none")
        super().__call__(parser, cfg, values, option_string)


def parser() -> Parser:
    """The command line: one subcommand per method, every field of its config an option."""
    top = Parser(prog="python -m gdpo.train", description="Train a one-step super-resolution generator.")
    methods = top.add_subcommands(dest="method")
    texts = {
        "naosd": "noise-aware one-step diffusion: supervised training",
        "gdpo": "group direct preference optimisation of a trained generator",
    }
    for name, config in CONFIGS.items():
        sub = Parser(prog=f"python -m gdpo.train {name}", description=texts[name])
        sub.add_argument("--config", action=ConfigFile, help="a YAML file of the options below")
        sub.add_class_arguments(config, nested_key=None)
        prog = sub.prog
        methods.add_subcommand(name, sub, help=texts[name])
        sub.prog = prog  # jsonargparse puts "[options]" into it, which no shell takes
    return top


def main() -> None:
    arguments: Namespace = parser().parse_args()
    method = arguments.method
    values = parser().instantiate(arguments)[method]
    config = CONFIGS[method](**{k: v for k, v in vars(values).items() if k != "config"})
    config.validate()
    train(method, config)


def train(method: str, config: TrainConfig) -> None:
    """Run a method with a validated config."""
    import torch
    from accelerate import Accelerator

    from gdpo.photos.dataset import CropDataset
    from gdpo.train.loop import Loop
    from gdpo.train.setup import precision, tracker, validation_batch

    torch.manual_seed(config.seed)
    config.mixed_precision = precision(config)  # the run's record says what "auto" was
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # else accelerate ignores a launcher on a machine without GPU
        mixed_precision=config.mixed_precision,
        log_with=tracker(config),
        project_dir=config.output_dir,
    )
    dataset = CropDataset(config.data.folder, "train", config.data.crop_size)
    if config.data.captions and dataset.captions is None:
        raise ValueError(f"data.captions is set, but {config.data.folder} has no captions.jsonl")
    loop = Loop(config, accelerator, dataset, validation_batch(config))
    if isinstance(config, GDPOConfig):
        from gdpo.train.methods.gdpo import GDPO

        loop.run(GDPO(config, accelerator))
    elif isinstance(config, NAOSDConfig):
        from gdpo.train.methods.naosd import NAOSD

        loop.run(NAOSD(config, accelerator))


if __name__ == "__main__":
    run(main)
