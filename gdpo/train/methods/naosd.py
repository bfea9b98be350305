"""NAOSD: supervised training of the noise-aware one-step generator (paper, section 3.1).

loss = pixel (L2) + 2 * perceptual + VSD

With a teacher (not in the paper), part of the samples are windows of its targets; their losses look at the teacher's
picture as well as at the HR. A discriminator (not in the paper either) may compare what is restored with the targets.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from gdpo.generator import OneStepGenerator
from gdpo.model import lora
from gdpo.photos.dataset import Batch
from gdpo.randomness import moved, uniform
from gdpo.scores.features import load_perceptual
from gdpo.scores.registry import SCORES
from gdpo.train.config import NAOSDConfig
from gdpo.train.losses.adversarial import Discriminator
from gdpo.train.losses.chroma import chroma_distance
from gdpo.train.losses.energy import EnergyScore
from gdpo.train.losses.grid import grid_penalty, lattice_penalty, spectrum_penalty
from gdpo.train.losses.vsd import VSD
from gdpo.train.methods.base import Backward, Columns, Method, Metrics
from gdpo.train.options import several
from gdpo.train.setup import add_lora, group_noise
from gdpo.train.teacher import SELF, Targets, upsampled, with_grain

_HELD_OUT = ("psnr_y", "ssim_y", "grid_artefact", "lattice_artefact")  # logged with each sheet
_EASIEST = 0.003  # of [-1,1]: an input with less error than this counts as one that has it


class Taught(NamedTuple):
    """The samples of a batch that a teacher has drawn, by position, and its pictures [N,3,H,W] in [-1,1]."""

    rows: list[int]
    pictures: torch.Tensor


class NAOSD(Method):
    """The method: what is trained, and one micro-batch of it."""

    config: NAOSDConfig

    def __init__(self, config: NAOSDConfig, accelerator: Accelerator):
        super().__init__(config, accelerator)
        self.perceptual: Any = None
        if config.perceptual_weight:
            blocks = config.perceptual_blocks
            score = EnergyScore(blocks) if config.diversity else load_perceptual(config.perceptual, blocks)
            self.perceptual = score.to(accelerator.device)
        self.targets = self.own_teacher = None
        if config.teacher.is_generator:
            self.own_teacher = self._own_teacher()
        elif config.teacher.name:
            crops = config.teacher.crops(several(config.data.folder))
            self.targets = Targets(config.teacher, crops, self.degrade, config.seed, accelerator.device)
            if self.generator.vae is not None and config.teacher.noise:
                raise ValueError("teacher.noise must be 0 for a model with a VAE: its latents' noise is none of the LR")
        self._make_trainable()
        self.groups = {"generator": (config.learning_rate, self.trained)}
        self.vsd = None
        if config.vsd_weight:
            self.vsd = VSD(self.generator, config)
            self.groups["fake"] = (config.vsd_learning_rate, self.vsd.parameters)
        self.discriminator = None
        if config.adversarial_weight:
            self.discriminator = Discriminator(config.seed).to(accelerator.device)
            weights = dict(self.discriminator.named_parameters())
            self.groups["discriminator"] = (config.adversarial_learning_rate, weights)

    def _make_trainable(self) -> None:
        """Every weight of the UNet, or its LoRA with conv_in whole and the LoRA of the VAE's encoder."""
        config, generator = self.config.model, self.generator
        if config.full:
            self.trained: dict[str, nn.Parameter] = {f"unet.{k}": p for k, p in generator.unet.named_parameters()}
        else:
            whole = ("conv_in",) if generator.uses_text else ()
            add_lora(generator, config, self.config.seed, train_whole=whole)
            self.trained = {f"unet.{k}": p for k, p in lora.parameters(generator.unet).items()}
            if generator.vae is not None and type(generator.vae).__name__ == "AutoencoderKL":
                lora.add(
                    generator.vae,
                    config.lora_rank,
                    lora.VAE_ENCODER_TARGETS,
                    alpha=config.lora_alpha,
                    rslora=config.use_rslora,
                    dora=config.use_dora,
                    seed=self.config.seed,
                )
                self.trained |= {f"vae.{k}": p for k, p in lora.parameters(generator.vae).items()}
            if self.accelerator.mixed_precision != "no":
                lora.leave_casts_to_autocast(generator)
        self.train_only(self.trained)

    def step(self, batch: Batch, step: int, backward: Backward) -> Metrics:
        """One micro-batch: degrade, restore in one step, compare."""
        config, generator = self.config, self.generator
        hr = batch.hr * 2 - 1
        image, taught, grain = self.inputs(batch, step=step), None, None
        drawn = self.targets.drawn(batch.samples) if self.targets is not None else []
        if self.targets is not None and (rows := [i for i in drawn if i not in batch.real]):
            windows = self.targets.windows([batch.samples[i] for i in rows], config.data.crop_size)
            hr[rows], image[rows] = moved(windows.hr * 2 - 1, hr), moved(upsampled(windows.lr), image)
            taught, grain = Taught(rows, moved(windows.picture * 2 - 1, hr)), moved(windows.grain, hr)
        text = self.prompts(batch)
        with self.accelerator.autocast():
            latents = generator.encode(image).repeat_interleave(config.num_noises, dim=0)
            noise = moved(group_noise(latents.shape, config.seed, "naosd", batch.samples, config.num_noises), latents)
            if taught is not None and grain is not None and config.teacher.noise:
                noise[taught.rows] = with_grain(noise[taught.rows], grain.to(noise))
            many_text = None if text is None else text.repeat_interleave(config.num_noises, dim=0)
            if self.own_teacher is not None:
                taught = self._own_teacher_drew(batch, latents, noise, many_text)
            x0 = generator.predict(latents, noise, many_text).x0
            restored = generator.decode(x0)
            loss, metrics = self._losses(restored.float(), hr, batch, taught, image.float())
            if self.vsd is not None:
                vsd = self.vsd.loss(x0.float(), many_text, batch.samples)
                loss = loss + config.vsd_weight * vsd
                metrics["vsd"] = vsd
        judged = None if self.discriminator is None else self._judged(restored.float(), hr, taught)
        if self.discriminator is not None:  # processes log the same figures, whatever is in their batches
            metrics["adversarial"] = metrics["discriminator"] = loss.new_zeros(())
        if self.discriminator is not None and judged is not None:
            metrics["adversarial"] = self.discriminator.generator_loss(judged[0])
            loss = loss + config.adversarial_weight * metrics["adversarial"]
        backward(loss)
        if self.discriminator is not None and judged is not None:
            metrics["discriminator"] = self.discriminator.own_loss(*judged)
            backward(metrics["discriminator"])
        if self.vsd is not None:
            with self.accelerator.autocast():
                fake = self.vsd.fake_loss(x0.detach().float(), many_text, batch.samples)
            with self.vsd.training_fake():  # gradient checkpointing recomputes inside backward
                backward(fake)
            metrics["vsd_fake"] = fake
        return {"loss": loss.detach(), **{k: v.detach() for k, v in metrics.items()}}

    def _judged(
        self, restored: torch.Tensor, hr: torch.Tensor, taught: Taught | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What the discriminator compares: restored [N,3,H,W] and the HR, or the teacher's pictures where it drew any.

        None: a teacher, and none of its pictures in this batch.
        """
        if self.targets is None and self.own_teacher is None:
            return restored, hr.repeat_interleave(self.config.num_noises, dim=0)
        return None if taught is None else (restored[taught.rows], taught.pictures)

    def _own_teacher(self) -> OneStepGenerator:
        """A generator as the teacher, frozen: the model before training, or that of a folder."""
        name, ours = self.config.teacher.name, self.generator
        if name == SELF:
            return copy.deepcopy(ours).requires_grad_(False)
        teacher = OneStepGenerator.from_pretrained(name).merge_lora().requires_grad_(False)
        kinds = [(g.parametrization, g.t_noise, g.codec.factor, g.codec.channels) for g in (teacher, ours)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"teacher.name: {name} must have the parametrisation, t_noise, factor and channels of the model that "
                f"is trained, {', '.join(map(str, kinds[1]))}; got {', '.join(map(str, kinds[0]))}"
            )
        return teacher.to(self.accelerator.device).eval()

    @torch.no_grad()
    def _own_teacher_drew(
        self, batch: Batch, latents: torch.Tensor, noise: torch.Tensor, text: torch.Tensor | None
    ) -> Taught | None:
        """What a generator as teacher makes of the same input and noise, of the samples that teacher.on names."""
        assert self.own_teacher is not None
        on, seed = self.config.teacher.on, self.config.seed
        clean = [
            i not in batch.real and self.degrade.preset_of(seed, s) == "bicubic" for i, s in enumerate(batch.samples)
        ]
        rows = [i for i, c in enumerate(clean) if on == "all" or c == (on == "clean")]
        if not rows:
            return None
        x0 = self.own_teacher.predict(latents[rows], noise[rows], None if text is None else text[rows]).x0
        return Taught(rows, self.own_teacher.decode(x0).float())

    def _losses(
        self,
        restored: torch.Tensor,
        hr: torch.Tensor,
        batch: Batch,
        taught: Taught | None,
        image: torch.Tensor,
    ):
        """Pixel and perceptual distance of restored [B*K,3,H,W] to hr [B,3,H,W], with the spread of the K noises.

        image [B,3,H,W] is the input, against whose error that of `restored` may be weighed.
        """
        config, k = self.config, self.config.num_noises
        target = hr.repeat_interleave(k, dim=0)
        distance = F.mse_loss if config.pixel == "l2" else F.l1_loss
        if taught is None:
            pixel, shown = distance(restored, target), target
            if config.pixel_relative:
                each = distance(restored, target, reduction="none").mean((1, 2, 3))
                pixel = (each * self._ease(image, hr).repeat_interleave(k)).mean()
        else:
            shown = target.clone()
            shown[taught.rows] = taught.pictures
            of_hr = distance(restored, target, reduction="none").mean((1, 2, 3))
            plain = [i for i in range(len(hr)) if i not in taught.rows]
            of_hr[plain] = of_hr[plain] * self._ease(image[plain], hr[plain])
            of_teacher = distance(restored[taught.rows], taught.pictures, reduction="none").mean((1, 2, 3))
            pixel = self._shared(of_hr, taught.rows, of_teacher).mean()
        loss, metrics = config.pixel_weight * pixel, {str(config.pixel): pixel}
        if taught is not None:
            metrics["taught"] = of_teacher.mean()
        elif config.teacher.name:  # none in this batch; every process logs the same figures
            metrics["taught"] = restored.new_zeros(())
        if config.grid_weight:
            grid = grid_penalty(restored, shown)
            loss, metrics["grid"] = loss + config.grid_weight * grid, grid
        if config.lattice_weight:
            lattice = lattice_penalty(restored, shown)
            loss, metrics["lattice"] = loss + config.lattice_weight * lattice, lattice
        if config.spectrum_weight:
            rows = taught.rows if taught is not None else slice(None)
            spectrum = spectrum_penalty(restored[rows], shown[rows])
            loss, metrics["spectrum"] = loss + config.spectrum_weight * spectrum, spectrum
        if config.chroma_weight:
            chroma = chroma_distance(restored, shown)
            loss, metrics["chroma"] = loss + config.chroma_weight * chroma, chroma
        if self.perceptual is not None:
            perceptual, spread = self._perceptual(restored, target, shown, batch, taught)
            loss, metrics["perceptual"] = loss + config.perceptual_weight * perceptual, perceptual
            if config.diversity:
                loss, metrics["spread"] = loss - 0.5 * config.diversity * config.perceptual_weight * spread, spread
        return loss, metrics

    def _ease(self, image: torch.Tensor, hr: torch.Tensor) -> torch.Tensor:
        """What the pixel loss of each sample is multiplied by, [B]: the less its input errs, the more it counts."""
        if not self.config.pixel_relative:
            return torch.ones(len(hr), device=hr.device)
        distance = F.mse_loss if self.config.pixel == "l2" else F.l1_loss
        return self.config.pixel_relative / (distance(image, hr, reduction="none").mean((1, 2, 3)) + _EASIEST)

    def _perceptual(
        self,
        restored: torch.Tensor,
        target: torch.Tensor,
        shown: torch.Tensor,
        batch: Batch,
        taught: Taught | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean perceptual distance of restored [B*K,3,H,W] to the HR or the teacher's pictures, and the spread.

        Of samples left out by perceptual_share the others stand for them: the expected value does not change.
        """
        config, k, samples = self.config, self.config.num_noises, batch.samples
        rows = self._looked_at(batch, taught)
        none = restored.new_zeros(())
        if not rows:
            return none, none
        each = [i * k + j for i in rows for j in range(k)]
        restored, target, shown = (
            self._crop(x[each], [samples[i] for i in rows], k) for x in (restored, target, shown)
        )
        share = len(rows) / (len(samples) * config.perceptual_share)
        if config.diversity:
            distance, spread = self.perceptual(restored.unflatten(0, (-1, k)), target[::k])
            return share * distance, share * spread
        if taught is not None:  # compared with the teacher's picture or the HR: one pass, not two
            weight = config.teacher.weight
            of_teacher = [uniform(config.seed, "compared with", samples[i]) < weight for i in rows]
            target = torch.where(torch.tensor(of_teacher, device=target.device)[:, None, None, None], shown, target)
        return share * self.perceptual(restored, target).mean(), none

    def _looked_at(self, batch: Batch, taught: Taught | None) -> list[int]:
        """The samples, by position, whose perceptual distance is computed: a function of (seed, sample)."""
        config, samples = self.config, batch.samples
        rows = [i for i, s in enumerate(samples) if uniform(config.seed, "looked at", s) < config.perceptual_share]
        if config.perceptual_on == "degraded":
            worn = {*batch.real, *(taught.rows if taught is not None else ())}
            rows = [i for i in rows if i in worn or self.degrade.preset_of(config.seed, samples[i]) != "bicubic"]
        return rows

    def _shared(self, of_hr: torch.Tensor, rows: list[int], of_teacher: torch.Tensor) -> torch.Tensor:
        """Distances [B] to the HR and [N] to the teacher's pictures of `rows` -> [B], weighed where there are both."""
        weight = torch.zeros_like(of_hr)
        weight[rows] = self.config.teacher.weight
        drawn = torch.zeros_like(of_hr).index_put((torch.tensor(rows, device=of_hr.device),), of_teacher)
        return (1 - weight) * of_hr + weight * drawn

    def _crop(self, images: torch.Tensor, samples: list[int], k: int) -> torch.Tensor:
        """The window of each picture that the perceptual distance looks at (the same for its K noises)."""
        size = self.config.perceptual_size
        if not size or size >= min(images.shape[-2:]):
            return images
        windows = []
        for i, sample in enumerate(samples):
            y = int(uniform(self.config.seed, "window-y", sample) * (images.shape[-2] - size + 1))
            x = int(uniform(self.config.seed, "window-x", sample) * (images.shape[-1] - size + 1))
            windows.append(images[i * k : (i + 1) * k, :, y : y + size, x : x + size])
        return torch.cat(windows)

    @torch.no_grad()
    def preview(self, batch: Batch) -> tuple[Columns, dict[str, float]]:
        """Columns of the before/after sheet for a batch of held-out pictures, and scores that nothing optimises."""
        bicubic, restored, hr = self.inputs(batch, as_inference=True), self.restored(batch), batch.hr * 2 - 1
        figures = {}
        for name in _HELD_OUT if min(hr.shape[2:]) >= 64 else ():  # smaller crops are too few pixels for some
            build = SCORES[name].build
            assert build is not None  # these are scores of single pictures
            values = build(batch.hr.device)(restored.float().clamp(-1, 1) / 2 + 0.5, batch.hr)
            figures[f"heldout/{name}"] = float(values.double().mean())
        return [("bicubic", bicubic), ("restored", restored), ("HR", hr)], figures
