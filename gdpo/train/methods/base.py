"""What every training method is: a generator, what of it is trained, and one micro-batch. A method is a subclass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar, Literal

import torch
from accelerate import Accelerator
from torch import nn

from gdpo.degradation import Degradation
from gdpo.degradation.resize import resize
from gdpo.photos.dataset import Batch
from gdpo.randomness import moved
from gdpo.train.config import TrainConfig
from gdpo.train.setup import Prompts, base_generator, group_noise, save_trained

Metrics = dict[str, torch.Tensor]
Backward = Callable[[torch.Tensor], None]
Columns = list[tuple[str, torch.Tensor]]  # (title, images [B,3,H,W] in [-1,1]) of a sheet


class Method(ABC):
    """A training method.

    Attributes:
        config: the run's options; a subclass narrows the type.
        generator: the one that is trained, on its device.
        groups: name -> (learning rate, parameters by name), one optimiser group each; a subclass fills it.
        degrade: HR -> LR.
        prompts: batch -> prompt embeddings.
    """

    config: TrainConfig
    guarded_from: ClassVar[Literal["start", "best"]] = "best"  # what the limits of the guard are relative to
    groups: dict[str, tuple[float, dict[str, nn.Parameter]]]

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.generator = base_generator(config, accelerator)
        self.degrade = Degradation(config.degradation)
        pairs_alone = config.data.pairs.hr is not None and config.data.pairs.ratio == 1
        least, scale, side = self.degrade.smallest_side, config.degradation.scale, config.data.crop_size
        if not pairs_alone and (side < least or side % scale):
            raise ValueError(
                f"data.crop_size must be a multiple of {scale} and at least {least} for this degradation; got {side}"
            )
        self.prompts = Prompts(self.generator, config.data.captions, accelerator.device)

    def train_only(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Freeze the generator but for these parameters."""
        self.generator.requires_grad_(False)
        for p in parameters.values():
            p.requires_grad_(True)

    @torch.no_grad()
    def inputs(self, batch: Batch, *, step: int = 0, as_inference: bool = False) -> torch.Tensor:
        """What the generator is given, [B,3,H,W] in [-1,1]: the LR of real pairs upsampled, the HR of others degraded.

        Args:
            as_inference: upsample by bicubic, as inference does it, instead of a filter drawn for each sample.
        """
        if not batch.real:  # no index lists, for which the host would wait for the GPU
            lr, lr_up = self.degrade(batch.hr, seed=self.config.seed, step=step, samples=batch.samples)
            return (self.degrade.upsample(lr) if as_inference else lr_up) * 2 - 1
        size = (batch.hr.shape[2], batch.hr.shape[3])
        made = [i for i in range(len(batch.samples)) if i not in batch.real]
        image = torch.empty_like(batch.hr, dtype=torch.float32)
        if made:
            samples = [batch.samples[i] for i in made]
            lr, lr_up = self.degrade(batch.hr[made], seed=self.config.seed, step=step, samples=samples)
            image[made] = self.degrade.upsample(lr) if as_inference else lr_up
        for i, lr in batch.real.items():
            image[i] = resize(moved(lr, image)[None], size, "bicubic_antialias")[0].clamp(0, 1)
        return image * 2 - 1

    @torch.no_grad()
    def restored(self, batch: Batch, *, reference: bool = False) -> torch.Tensor:
        """Held-out pictures as the generator restores them now, [B,3,H,W] in [-1,1]; each has a noise of its own.

        Args:
            reference: with the LoRA switched off.
        """
        generator = self.generator
        with self.accelerator.autocast(), generator.reference() if reference else nullcontext():
            latents = generator.encode(self.inputs(batch, as_inference=True))
            noise = moved(group_noise(latents.shape, self.config.seed, "preview", batch.samples, 1), latents)
            return generator.decode(generator.predict(latents, noise, self.prompts(batch)).x0)

    @abstractmethod
    def step(self, batch: Batch, step: int, backward: Backward) -> Metrics:
        """One micro-batch. Calls `backward(loss)` itself, once or more, as adapters may have to be switched between.

        Returns: scalars for the log, "loss" among them.
        """

    @abstractmethod
    def preview(self, batch: Batch) -> tuple[Columns, dict[str, float]]:
        """Columns of the before/after sheet of held-out pictures, and figures for the log."""

    def group(self, batch: Batch) -> Columns:
        """Columns of a sheet of several restorations of the same held-out pictures, for methods that compare them."""
        return []

    def save(self, folder: Path) -> None:
        """Write the trained generator, its LoRA (if any) apart from the base."""
        save_trained(self.generator, self.config, folder)
