"""`python -m gdpo.train naosd|gdpo --config F.yaml [--any.key value]`, also under `accelerate launch` or `torchrun`."""

from __future__ import annotations

from jsonargparse import Namespace

from engine.cli import Parser, run

from .config import GDPOConfig, NAOSDConfig, TrainConfig

CONFIGS: dict[str, type[TrainConfig]] = {"naosd": NAOSDConfig, "gdpo": GDPOConfig}


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
        sub.add_argument("--config", action="config", help="a YAML file of the options below")
        sub.add_class_arguments(config, nested_key=None)
        methods.add_subcommand(name, sub, help=texts[name])
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

    from ..data import CropDataset
    from .loop import Loop
    from .setup import precision, tracker, validation_batch

    torch.manual_seed(config.seed)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # else accelerate ignores a launcher on a machine without GPU
        mixed_precision=precision(config),
        log_with=tracker(config),
        project_dir=config.output_dir,
    )
    dataset = CropDataset(config.data.folder, "train", config.data.crop_size)
    loop = Loop(config, accelerator, dataset, validation_batch(config))
    if isinstance(config, GDPOConfig):
        from .gdpo import GDPO

        loop.run(GDPO(config, accelerator))
    elif isinstance(config, NAOSDConfig):
        from .naosd import NAOSD

        loop.run(NAOSD(config, accelerator))


if __name__ == "__main__":
    run(main)
