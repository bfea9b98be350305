"""Options of the model and the data, and how an option is declared and checked (gdpo.train.config has the rest)."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field, fields, is_dataclass
from operator import attrgetter
from typing import Any, Literal, get_args, get_type_hints


def resumable(default: Any, *, path: bool = False) -> Any:
    """An option that a resumed run may set anew, because the trained weights do not depend on it; perhaps a path."""
    return field(default=default, metadata={"resumable": True, "path": path})


def future(default: Any) -> Any:
    """An option that a resumed run may change, which is said: only the steps to come depend on it."""
    return field(default=default, metadata={"future": True})


def path_option(default: str) -> Any:
    """An option that is a path; see `expand_paths`."""
    return field(default=default, metadata={"path": True})


def several(value: list[str] | str | None) -> list[str]:
    """An option that takes one or more."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def at_least(least: int, config: Any, *names: str) -> None:
    """Raise ValueError naming the first of the options that is below `least`."""
    for name in names:
        value = attrgetter(name)(config)
        require(value >= least, name, f"at least {least}", value)


def above_0(config: Any, *names: str) -> None:
    """Raise ValueError naming the first of the options that is not above 0."""
    for name in names:
        require(getattr(config, name) > 0, name, "above 0", getattr(config, name))


def require(ok: bool, name: str, expected: str, actual: object) -> None:
    """Raise ValueError naming the option, what it must be, and what it is."""
    if not ok:
        raise ValueError(f"{name} must be {expected}; got {actual}")


def require_values(options: Any, prefix: str = "") -> None:
    """Raise ValueError naming the first option that is null where it needs a value, or a number that is not finite."""
    types = get_type_hints(type(options))
    for f in fields(options):
        name, value = f"{prefix}{f.name}", getattr(options, f.name)
        if is_dataclass(value):
            require_values(value, f"{name}.")
        elif value is None:
            require(type(None) in get_args(types[f.name]), name, "given", "null")
        else:
            numbers = value if isinstance(value, (list, tuple)) else [value]
            finite = all(math.isfinite(n) for n in numbers if isinstance(n, float))
            require(finite, name, "finite", value)


def expand_paths(options: Any, prefix: str = "") -> None:
    """Fill in ~ and environment variables ($NAME, ${NAME}) in every path, as a shell does; a YAML file has no shell.

    Raises:
        ValueError: a variable that is not set, naming the option.
    """
    for f in fields(options):
        name, value = f"{prefix}{f.name}", getattr(options, f.name)
        if is_dataclass(value):
            expand_paths(value, f"{name}.")
        elif f.metadata.get("path") and value is not None:
            paths = [_expanded(name, one) for one in several(value)]
            setattr(options, f.name, paths[0] if isinstance(value, str) else paths)


def _expanded(name: str, path: str) -> str:
    if os.path.exists(path):
        return path
    filled = os.path.expanduser(os.path.expandvars(path))
    if unset := re.search(r"\$(\w+|\{\w+\})", filled):
        raise ValueError(f"{name} must name environment variables that are set; {unset[0]} is not (in {path})")
    return filled


@dataclass
class ModelConfig:
    """Where the generator comes from and what of it is trained.

    Args:
        pretrained: a model folder (diffusers layout); "tiny", a fresh generator of the tiny preset; or "compact", the
            compact network with the weights of Real-ESRGAN animevideov3 (python -m gdpo.assets real-esrgan).
        t_noise: timestep of the noise added to the latent; None: as the model folder says; -1: no noise.
        t_diffusion: timestep at which the UNet is called; None: as the model folder says.
        full: train every weight of the UNet instead of a LoRA (naosd only; for the tiny preset).
        lora_rank: rank of the UNet's LoRA (and of the VAE encoder's in naosd).
        lora_alpha: the LoRA scale is lora_alpha/lora_rank; None means equal to the rank.
        lora_target_modules: modules of the UNet that get a LoRA, by the last parts of their names, such as to_q or
            attn1.to_out.0 (peft's target_modules); None: as in the paper.
        use_rslora: use lora_alpha/sqrt(lora_rank) as the scale (arXiv 2312.03732).
        use_dora: train the magnitude of each output channel apart from its direction (arXiv 2402.09353).
        prompt: fixed prompt of models with cross-attention; None: as the model folder says.
        gradient_checkpointing: recompute activations in the backward pass.
        channels_last: keep convolution weights and activations in channels-last memory format.
        block_out_channels: widths of a fresh tiny UNet.
        layers_per_block: residual blocks per width of a fresh tiny UNet.
    """

    pretrained: str = path_option("tiny")
    t_noise: int | None = None
    t_diffusion: int | None = None
    full: bool = False
    lora_rank: int = 4
    lora_alpha: int | None = None
    lora_target_modules: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    prompt: str | None = None
    gradient_checkpointing: bool = resumable(False)
    channels_last: bool = True
    block_out_channels: tuple[int, ...] = (64, 96, 128)
    layers_per_block: int = 2


@dataclass
class PairsConfig:
    """Real pairs: LR pictures as cameras and networks made them, and the HR of the same scenes.

    Args:
        lr: LR pictures: folder, list file, shards or dataset on disk, as data.folder; or several. Of the HR's size or 2
            to 8 times smaller; matched by name. May be the same as hr if the names tell LR from HR.
        hr: HR pictures, in the same forms.
        ratio: share of the samples that are real pairs; the others are degraded from data.folder. 1: pairs only.
        weights: with several, how often each is drawn relative to the others; None: in proportion to its pictures.
    """

    lr: list[str] | str | None = resumable(None, path=True)  # noqa: RUF009
    hr: list[str] | str | None = resumable(None, path=True)  # noqa: RUF009
    ratio: float = 0.5
    weights: list[float] | None = None


@dataclass
class ValidationConfig:
    """Real pairs for the sheets and the scores of held-out pictures; None: held-out pictures of the training data.

    Args:
        lr: LR pictures, as in data.pairs.
        hr: HR pictures, as in data.pairs.
    """

    lr: str | None = resumable(None, path=True)
    hr: str | None = resumable(None, path=True)


@dataclass
class DataConfig:
    """The photos.

    Args:
        folder: a folder made by `python -m gdpo.prepare`, or any folder of pictures; a list file (LIST.txt, one path
            per line), shards (F-{000..012}.tar, F-*.tar), or a dataset that save_to_disk wrote; or several of these.
        weights: with several, how often each is drawn relative to the others; None: in proportion to its pictures.
        pairs: real pairs of LR and HR, mixed with degraded pictures of the folder.
        validation: real pairs for the sheets.
        crop_size: side of the square HR crops.
        skip_small: leave out pictures smaller than a crop, instead of refusing the folder.
        num_workers: number of data loader processes; 0: load in this process.
        on_error: when a picture cannot be read: "stop" saves the steps before it and ends the run; "skip" names it,
            counts it (`skipped` in metrics.jsonl) and takes another.
        captions: use the captions.jsonl of the folder as prompts instead of the fixed prompt.
    """

    folder: list[str] | str = resumable("data/crops", path=True)  # noqa: RUF009
    weights: list[float] | None = None
    pairs: PairsConfig = field(default_factory=PairsConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    crop_size: int = 512
    skip_small: bool = resumable(False)
    num_workers: int = resumable(0)
    on_error: Literal["stop", "skip"] = resumable("stop")
    captions: bool = False

    def validate(self) -> None:
        """Raise ValueError naming the option."""
        pairs, validation = self.pairs, self.validation
        for name, one in (("data.pairs", pairs), ("data.validation", validation)):
            require((one.lr is None) == (one.hr is None), name, "both lr and hr, or neither", [one.lr, one.hr])
        require(0 < pairs.ratio <= 1, "data.pairs.ratio", "above 0, at most 1", pairs.ratio)
        lr, hr, folders = (several(x) for x in (pairs.lr, pairs.hr, self.folder))
        require(len(lr) == len(hr), "data.pairs", "as many lr as hr", f"{len(lr)} and {len(hr)}")
        require(bool(folders), "data.folder", "at least one", folders)
        for name, weights, of in (("data.weights", self.weights, folders), ("data.pairs.weights", pairs.weights, hr)):
            if weights is not None:
                fits = len(weights) == len(of) and min(weights, default=1) > 0 and math.isfinite(sum(weights))
                require(fits, name, f"a number above 0 for each of {len(of)}", weights)
