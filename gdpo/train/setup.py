"""What both methods need before their first step: the generator on its device, prompts, noise; machine and versions."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn

from gdpo.generator import OneStepGenerator
from gdpo.model import lora
from gdpo.model.architectures import works_on_pixels
from gdpo.model.diffusers_patches import norms_in_own_precision, skip_divisions
from gdpo.model.prompts import PromptEncoder
from gdpo.model.training_patches import keep_and_fold_upsampling, undivided_attention
from gdpo.photos.dataset import Batch, CropDataset, loader
from gdpo.photos.mixture import HeldOut, Mixture
from gdpo.randomness import normal
from gdpo.train.config import TrainConfig
from gdpo.train.options import ModelConfig, several
from gdpo.train.start import starting_generator

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def precision(config: TrainConfig) -> Literal["no", "bf16", "fp16"]:
    """The autocast precision: "auto" is bf16 where the hardware computes in it, else none.

    A CPU without AVX512-BF16 emulates it, several times slower than fp32.

    Raises:
        ValueError: fp16 without a GPU, where accelerate would train in fp32 or fail at the first backward pass.
    """
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("mixed_precision must be bf16 or no on a CPU (fp16 needs a CUDA GPU); got fp16")
    if config.mixed_precision != "auto":
        return config.mixed_precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "no"


# What accelerate needs of each tracker, and the extra of this package that installs it.
TRACKERS = {"tensorboard": ("torch.utils.tensorboard", "SummaryWriter", "train"), "wandb": ("wandb", "init", "cluster")}


def tracker(config: TrainConfig) -> str | None:
    """The tracker for accelerate, or None.

    Raises:
        ValueError: its package is missing; accelerate would only warn and train untracked.
    """
    if config.report_to == "none":
        return None
    module, needed, extra = TRACKERS[config.report_to]
    try:
        getattr(import_module(module), needed)  # a mere folder called wandb/ can be imported too
    except (ImportError, AttributeError):
        raise ValueError(
            f"report_to {config.report_to} needs the package {config.report_to}, which is not installed; "
            f"pip install 'gdpo-sr[{extra}]', or report_to none (metrics.jsonl is written all the same)"
        ) from None
    return config.report_to


def base_generator(config: TrainConfig, accelerator: Accelerator) -> OneStepGenerator:
    """The frozen base on its device, held once, in the training precision when only a LoRA is trained on it.

    Raises:
        ValueError: crops that this model cannot take.
    """
    model, generator = config.model, starting_generator(config.model, config.seed)
    if config.data.crop_size % generator.multiple:
        raise ValueError(
            f"data.crop_size must be a multiple of {generator.multiple} for this model; got {config.data.crop_size}"
        )
    own = accelerator.device.type == "cuda" and accelerator.mixed_precision != "no" and not model.full
    if own:
        keep_and_fold_upsampling(generator.codec)
    if not model.full:
        generator.to(HALVES.get(accelerator.mixed_precision, torch.float32))
    if model.gradient_checkpointing:
        generator.unet.enable_gradient_checkpointing()
    if model.channels_last:
        generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator.to(accelerator.device).eval()  # dropout has no place here; LoRA trains all the same
    for part in (generator.unet, generator.codec):
        skip_divisions(part)
        undivided_attention(part)
    if own:
        norms_in_own_precision(generator)  # a CPU's autocast leaves them so
    return generator


def save_trained(generator: OneStepGenerator, config: TrainConfig, folder: Path) -> None:
    """Write the trained generator, its LoRA apart from the base as that was read.

    Training may hold the base in half precision; a merge at strength 0 must give the base back to the bit all the same.

    Raises:
        ValueError: the folder of the base holds other weights now than when training read it.
    """
    if config.model.full:
        return generator.save_pretrained(folder)
    base = starting_generator(config.model, config.seed)
    with tempfile.TemporaryDirectory() as work:
        for name, trained, own in (("unet", generator.unet, base.unet), ("vae", generator.vae, base.vae)):
            if trained is None:
                continue
            if lora.adapters(trained):
                lora.save(trained, Path(work, name))
                lora.load(own, Path(work, name))
            held, loras = dict(trained.named_parameters()), lora.parameters(own)
            for key, p in own.named_parameters():
                if key not in loras and not torch.equal(p.to(held[key].dtype), held[key].cpu()):
                    raise ValueError(
                        f"{config.model.pretrained} has changed since training read it (first: {name}, {key}), and the "
                        "LoRA fits what it was: put that back and resume from the last checkpoint, which has the LoRA"
                    )
    base.save_pretrained(folder)


def dataset_of(config: TrainConfig, accelerator: Accelerator) -> CropDataset | Mixture:
    """The training pictures; what was left out of them is said. One process looks into new folders first.

    Raises:
        ValueError: output_dir is among them; or see CropDataset.
    """
    data, pairs = config.data, config.data.pairs
    sources: list[tuple[str, str | None]] = [(hr, lr) for hr, lr in zip(several(pairs.hr), several(pairs.lr))]
    real, whole = len(sources), bool(sources) and pairs.ratio == 1
    sources += [] if whole else [(folder, None) for folder in several(data.folder)]
    for folder in (name for pair in sources for name in pair if name is not None):
        if Path(folder).is_dir() and Path(config.output_dir).resolve().is_relative_to(Path(folder).resolve()):
            raise ValueError(
                f"output_dir must lie outside the pictures, else the run's own sheets are trained on; "
                f"got {config.output_dir}, which is in {folder}"
            )
    with accelerator.local_main_process_first():
        parts = [
            CropDataset(
                folder,
                "train",
                data.crop_size,
                lr=lr,
                skip_small=data.skip_small,
                skip_broken=data.on_error == "skip",
                captions=data.captions,
                progress=accelerator.is_local_main_process,
            )
            for folder, lr in sources
        ]
    for note in (n for part in parts for n in part.notes) if accelerator.is_main_process else ():
        print(note, file=sys.stderr)
    if len(parts) == 1:
        return parts[0]
    shares = []
    for share, some, weights in (
        (pairs.ratio, parts[:real], pairs.weights),
        (1 - pairs.ratio, parts[real:], data.weights),
    ):
        weights = weights or [len(part) for part in some]
        shares += [(share if 0 < real < len(parts) else 1) * weight / sum(weights) for weight in weights]
    return Mixture(parts, shares)


def validation_batch(config: TrainConfig, dataset: CropDataset | Mixture, count: int) -> Batch | None:
    """`count` held-out pictures, for the sheets or the guard: real pairs of data.validation, else the val split of each
    source of the training pictures, spread over it.
    """
    data = config.data
    if not count:
        return None
    if data.validation.hr is not None:
        lr, skip = data.validation.lr, data.on_error == "skip"
        held: CropDataset | HeldOut = CropDataset(
            data.validation.hr, "val", data.crop_size, lr=lr, skip_small=True, skip_broken=skip, captions=data.captions
        )
    elif isinstance(dataset, Mixture):
        held = HeldOut([part.held_out() for part in dataset.parts])
    else:
        held = dataset.held_out()
    samples = held.spread(count)
    return next(iter(loader(held, [samples], seed=0, on_error=data.on_error)))


def add_lora(generator: OneStepGenerator, model: ModelConfig, seed: int, *, train_whole: tuple[str, ...] = ()) -> None:
    """Give the generator's UNet the LoRA that the options describe.

    Raises:
        ValueError: it has no module of a name in lora_target_modules.
    """
    unet = generator.unet
    targets = unet.lora_targets if works_on_pixels(unet) else lora.UNET_TARGETS
    if model.lora_target_modules is not None:
        targets = model.lora_target_modules
        names = [name for name, _ in unet.named_modules()]
        for wanted in targets:
            if not any(f".{name}".endswith(f".{wanted}") for name in names):
                layers = [name for name, m in unet.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
                known = sorted({leaf for name in layers if not (leaf := name.rpartition(".")[2]).isdigit()})
                raise ValueError(
                    f"model.lora_target_modules must be (last parts of) names of the UNet's modules, such as "
                    f"{', '.join(known[:8])}; got {wanted!r}"
                )
    lora.add(
        unet,
        model.lora_rank,
        targets,
        alpha=model.lora_alpha,
        rslora=model.use_rslora,
        dora=model.use_dora,
        train_whole=train_whole,
        seed=seed,
    )
    if model.channels_last and not model.use_dora:  # as the layers beside it; peft's DoRA takes no such order
        unet.to(memory_format=torch.channels_last)


class Prompts:
    """Prompt embeddings of a batch: the fixed prompt, or the captions; each distinct text is encoded once."""

    def __init__(self, generator: OneStepGenerator, captions: bool, device: torch.device):
        self.generator, self.captions = generator, captions
        self.encoder: PromptEncoder | None = generator.prompt_encoder
        if self.encoder is not None:
            self.encoder.device = device
        if captions and not generator.uses_text:
            raise ValueError("data.captions is set, but this model has no cross-attention and takes no text")

    def __call__(self, batch: Batch) -> torch.Tensor | None:
        """-> [B,L,D], or None for a model without text."""
        if not self.generator.uses_text:
            return None
        if not self.captions or self.encoder is None:
            return self.generator.text_embeds(len(batch.samples))
        if batch.captions is None:
            raise ValueError("data.captions is set, but the data folder has no captions.jsonl")
        return self.encoder([f"{c}, {self.generator.prompt}" for c in batch.captions])


def group_noise(shape: torch.Size, seed: int, stream: str, samples: list[int], group: int) -> torch.Tensor:
    """Noise [B*group,C,h,w]: each picture a function of (seed, stream, global sample number, group index)."""
    return torch.stack([normal(shape[1:], seed, stream, s, g) for s in samples for g in range(group)])


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """What a run was made with."""
    versions: dict[str, str | None] = {}
    for name in ("gdpo-sr", "torch", "triton", "diffusers", "peft", "accelerate", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else platform.processor() or "cpu",
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        "versions": versions,
    }
