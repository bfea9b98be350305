"""`python -m gdpo.train naosd|gdpo --config F.yaml [--any.key value]`, also under `accelerate launch` or `torchrun`."""

from __future__ import annotations

import json
import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ActionConfigFile, Namespace

from engine.io.cli import Parser, run
from engine.io.files import naming
from gdpo.train.config import GDPOConfig, NAOSDConfig, TrainConfig


class Entry(NamedTuple):
    """A training method: its options, its class (module:class, imported when it runs), and what it is."""

    config: type[TrainConfig]
    method: str
    about: str


METHODS = {
    "naosd": Entry(
        NAOSDConfig, "gdpo.train.methods.naosd:NAOSD", "noise-aware one-step diffusion: supervised training"
    ),
    "gdpo": Entry(
        GDPOConfig, "gdpo.train.methods.gdpo:GDPO", "group direct preference optimisation of a trained generator"
    ),
}


class OptionsLoader(yaml.SafeLoader):
    """YAML 1.2: `on` and `no` are words (teacher.on), 1e-4 is a number, a key comes once. PyYAML knows 1.1 only, and
    of a key that comes twice it takes the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, key in enumerate(keys):
            if key in keys[:i] and key != "<<":
                where = node.value[i][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"{key} comes twice", where)
        return super().construct_mapping(node, deep)


OptionsLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag.rpartition(":")[2] not in ("bool", "float", "timestamp")]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
OptionsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), [*"tTfF"]
)
OptionsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$"
    ),
    [*"-+.0123456789"],
)


class ConfigFile(ActionConfigFile):
    """--config: a YAML file of options. One that cannot be read is named; jsonargparse tells what, but not where."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        if os.path.isfile(values):
            try:
                with naming(values):
                    options = yaml.load(Path(values).read_text("utf-8"), OptionsLoader)
            except (UnicodeDecodeError, yaml.YAMLError) as error:
                raise ValueError(f"{values} is not a YAML file ({error})") from None
            if not isinstance(options, dict):
                raise ValueError(f"{values} must hold options, a line each (learning_rate: 1.0e-4); it holds none")
            values = json.dumps(options)
        super().__call__(parser, cfg, values, option_string)


def parser() -> Parser:
    """The command line: one subcommand per method, every field of its config an option."""
    top = Parser(prog="python -m gdpo.train", description="Train a one-step super-resolution generator.")
    methods = top.add_subcommands(dest="method")
    for name, entry in METHODS.items():
        sub = Parser(prog=f"python -m gdpo.train {name}", description=entry.about)
        sub.add_argument("--config", action=ConfigFile, help="a YAML file of the options below")
        sub.add_class_arguments(entry.config, nested_key=None)
        prog = sub.prog
        methods.add_subcommand(name, sub, help=entry.about)
        sub.prog = prog  # jsonargparse puts "[options]" into it, which no shell takes
    return top


def main() -> None:
    arguments: Namespace = parser().parse_args()
    method = arguments.method
    values = parser().instantiate(arguments)[method]
    config = METHODS[method].config(**{k: v for k, v in vars(values).items() if k != "config"})
    config.validate()
    train(method, config)


def train(method: str, config: TrainConfig) -> None:
    """Run a method with a validated config."""
    import torch
    from accelerate import Accelerator

    from gdpo.train.guard import Guard
    from gdpo.train.loop import alone_in, train_loop
    from gdpo.train.setup import dataset_of, precision, tracker, validation_batch

    torch.manual_seed(config.seed)
    config.mixed_precision = precision(config)  # the run's record says what "auto" was
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # else accelerate ignores a launcher on a machine without GPU
        mixed_precision=config.mixed_precision,
        log_with=tracker(config),
        project_dir=config.output_dir,
    )
    config.accumulate(accelerator.num_processes)
    dataset = dataset_of(config, accelerator)
    if config.data.captions and dataset.captions is None:
        raise ValueError(f"data.captions is set, but {config.data.folder} has no captions.jsonl")
    validation = validation_batch(config, dataset, config.validation_images)
    guard = Guard(config, accelerator, validation_batch(config, dataset, config.guard_images) if config.guard else None)
    module, _, name = METHODS[method].method.partition(":")
    made = getattr(import_module(module), name)(config, accelerator)
    with alone_in(Path(config.output_dir), accelerator.is_main_process):
        train_loop(config, accelerator, made, dataset, validation, guard)


if __name__ == "__main__":
    run(main)
