"""Variational score distillation (ProlificDreamer, as in OSEDiff): a frozen teacher against a LoRA "fake" beside.

Teacher, fake and generator are ONE UNet with its adapters switched: none, "fake", "default".
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F

from gdpo.generator import OneStepGenerator
from gdpo.model import lora, lora_layers
from gdpo.model.prompts import NEGATIVE_PROMPT
from gdpo.randomness import moved, normal, uniform
from gdpo.train.config import NAOSDConfig


class VSD:
    """The VSD gradient for the generator's latents, and the diffusion loss that keeps the fake up to date."""

    def __init__(self, generator: OneStepGenerator, config: NAOSDConfig):
        if not generator.uses_text or generator.prompt_encoder is None:
            raise ValueError("vsd_weight must be 0 for a model without text encoder: VSD guides its teacher by prompts")
        self.generator, self.config = generator, config
        rank, whole = config.vsd_lora_rank, ("conv_in",)
        lora.add(generator.unet, rank, lora.UNET_TARGETS, train_whole=whole, adapter="fake", seed=config.seed)
        lora.activate(generator.unet, "default")
        self.parameters = lora.parameters(generator.unet, "fake")
        for p in self.parameters.values():
            p.requires_grad_(True)
        self.negative = generator.prompt_encoder([config.negative_prompt or NEGATIVE_PROMPT])

    def loss(self, latents: torch.Tensor, text: torch.Tensor | None, samples: list[int]) -> torch.Tensor:
        """MSE(z, stopgrad(z - grad)), grad = (x0_fake - x0_real) / mean|z - x0_real| (design: NAOSD loss)."""
        with torch.no_grad():
            t, noise = self._draw(latents, samples, "vsd")
            noisy, a, b = self._noised(latents, noise, t)
            with lora.using([self.generator.unet], None):
                unguided = self._unet(noisy, t, self.negative.expand(len(latents), -1, -1))
                guided = self._unet(noisy, t, text)
            teacher = unguided + self.config.vsd_cfg * (guided - unguided)
            with lora.using([self.generator.unet], "fake"):
                fake = self._unet(noisy, t, text)
            real_x0, fake_x0 = (noisy - b.sqrt() * teacher) / a.sqrt(), (noisy - b.sqrt() * fake) / a.sqrt()
            scale = (latents - real_x0).abs().mean(dim=(1, 2, 3), keepdim=True)
            grad = torch.nan_to_num((fake_x0 - real_x0) / scale.clamp_min(1e-8))
        return F.mse_loss(latents, (latents - grad).detach())

    def fake_loss(self, latents: torch.Tensor, text: torch.Tensor | None, samples: list[int]) -> torch.Tensor:
        """The diffusion loss |eps_fake - eps|^2 on the generator's (detached) latents, t uniform in [0, T)."""
        t, noise = self._draw(latents, samples, "vsd-fake", (0.0, 1.0))
        noisy, _, _ = self._noised(latents, noise, t)
        with lora.using([self.generator.unet], "fake"):
            return F.mse_loss(self._unet(noisy, t, text), noise)

    def training_fake(self) -> AbstractContextManager[None]:
        """The adapter that the fake's backward pass recomputes with."""
        return lora.using([self.generator.unet], "fake")

    def _draw(self, latents: torch.Tensor, samples: list[int], stream: str, span: tuple[float, float] | None = None):
        """Timesteps [N] and noise like latents; each a function of (seed, stream, sample, copy)."""
        low, high = span or self.config.vsd_t
        total, copies = len(self.generator.alphas_cumprod), len(latents) // len(samples)
        keys = [(s, c) for s in samples for c in range(copies)]
        at = [int((low + (high - low) * uniform(self.config.seed, stream, "t", *k)) * total) for k in keys]
        noise = torch.stack([normal(latents.shape[1:], self.config.seed, stream, *k) for k in keys])
        return torch.tensor(at, device=latents.device).clamp_(0, total - 1), moved(noise, latents)

    def _noised(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor):
        a = self.generator.alphas_cumprod.to(latents.device)[t].to(latents.dtype)[:, None, None, None]
        return a.sqrt() * latents + (1 - a).sqrt() * noise, a, 1 - a

    def _unet(self, noisy: torch.Tensor, t: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
        with lora_layers.cast_together(self.generator.unet):
            return self.generator.unet(noisy, t, encoder_hidden_states=text).sample.float()
