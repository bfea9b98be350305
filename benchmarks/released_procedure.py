"""One GDPO step the way the released code does it: the baseline of benchmarks/gdpo_step.py.

Written anew from what that code does, with its costs left in:
- two full UNets, the policy with its LoRA and the reference;
- sampling image by image, outside of mixed precision (fp32);
- every sample is encoded again (posterior sampled) and noised, and after the two predictions the images of BOTH models
  are decoded, the policy's with its graph, and thrown away;
- the text encoder runs on every sample's positive and negative prompt in every step.

Left out, because prompts are fixed here: the image tagger, which the released code runs twice per picture. Scores come
from the same functions in both procedures (its MUSIQ and MANIQA would cost the same), and so does the degradation.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from gdpo.degradation import Degradation, DegradationConfig
from gdpo.kernels import attribute_ratios, attribute_reward, attribute_statistics
from gdpo.model.prompts import NEGATIVE_PROMPT, POSITIVE_PROMPT
from gdpo.photos.dataset import Batch

LUMA = (0.299, 0.587, 0.114)
T_NOISE, T_DIFFUSION, BETA = 250, 100, 5000.0
TARGETS = ("to_k", "to_q", "to_v", "to_out.0", "conv", "proj_out", "proj_in", "ff.net.2", "ff.net.0.proj")


class ReleasedProcedure:
    """Model, optimiser and step. `folder` is a Stable Diffusion folder; G samples per picture, LoRA rank 4."""

    def __init__(self, folder: str | os.PathLike[str], accelerator: Accelerator, *, group: int = 6, rank: int = 4):
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from peft import LoraConfig
        from transformers import CLIPTextModel, CLIPTokenizer

        folder, device = Path(folder), accelerator.device
        self.accelerator, self.group = accelerator, group
        self.degrade = Degradation(DegradationConfig())
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        text_encoder: Any = CLIPTextModel.from_pretrained(folder / "text_encoder")
        self.text_encoder = text_encoder.to(device).requires_grad_(False)
        self.vae: Any = AutoencoderKL.from_pretrained(folder / "vae").to(device).requires_grad_(False).train()
        self.reference: Any = UNet2DConditionModel.from_pretrained(folder / "unet").to(device).requires_grad_(False)
        self.policy: Any = UNet2DConditionModel.from_pretrained(folder / "unet").to(device).requires_grad_(False)
        layers = [name.removesuffix(".weight") for name, _ in self.policy.named_parameters() if "norm" not in name]
        layers = [name for name in layers if not name.endswith(".bias") and any(t in name for t in TARGETS)]
        self.policy.add_adapter(LoraConfig(r=rank, init_lora_weights="gaussian", target_modules=layers))
        self.policy.train()
        self.unused: torch.Tensor | None = None
        self.trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=5e-5)
        self.alphas = DDPMScheduler.from_pretrained(folder / "scheduler").alphas_cumprod.to(device)

    def step(self, batch: Batch, step: int) -> float:
        """One optimiser step on one micro-batch; returns the loss."""
        hr = batch.hr * 2 - 1
        _, lr_up = self.degrade(batch.hr, seed=0, step=step, samples=batch.samples)
        samples = self._sample(lr_up * 2 - 1)  # [B,G,3,H,W]
        advantage = self._advantage(samples, hr)
        with self.accelerator.autocast():  # what accelerate wraps: the model's forward
            policy, reference, noise = self._predict(samples.flatten(0, 1))
        policy_error, reference_error = (
            (prediction.float() - noise.float()).square().mean(dim=(1, 2, 3)).view_as(advantage)
            for prediction in (policy, reference)
        )
        margin = -BETA / 2 * ((advantage * policy_error).sum(1) - (advantage * reference_error).sum(1))
        loss = -F.logsigmoid(margin).mean()
        self.accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.unused = (
            None  # kinder than the released loop, which keeps these images and their graph through the next step
        )
        return float(loss.detach())

    @torch.no_grad()
    def _sample(self, images: torch.Tensor) -> torch.Tensor:
        text = self._text([POSITIVE_PROMPT] * len(images))
        latents = self.vae.encode(images).latent_dist.sample() * self.vae.config.scaling_factor
        groups = []
        for one, words in zip(latents, text):
            z = one.expand(self.group, -1, -1, -1)
            noisy = self._noised(z, torch.randn_like(z))
            eps = self.reference(noisy, T_DIFFUSION, words.expand(self.group, -1, -1)).sample
            groups.append(self._decode(self._clean(noisy, eps)))
        return torch.stack(groups)

    def _predict(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        text = self._text([POSITIVE_PROMPT] * len(images))
        self._text([NEGATIVE_PROMPT] * len(images))
        with torch.no_grad():
            latents = self.vae.encode(images).latent_dist.sample() * self.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        noisy = self._noised(latents, noise)
        policy = self.policy(noisy, T_DIFFUSION, text).sample
        self.unused = self._decode(self._clean(noisy, policy))  # returned to the caller, so its graph lives
        with torch.no_grad():
            reference = self.reference(noisy, T_DIFFUSION, text).sample
            self._decode(self._clean(noisy, reference))
        return policy, reference, noise

    def _advantage(self, samples: torch.Tensor, hr: torch.Tensor) -> torch.Tensor:
        gray = ((hr + 1) / 2 * hr.new_tensor(LUMA)[:, None, None]).sum(1)
        smooth, texture, mask = attribute_ratios(gray)
        statistics = attribute_statistics(samples, hr, mask)
        return attribute_reward(statistics.psnr_y[..., None], statistics.detail[..., None], smooth, texture)

    @torch.no_grad()
    def _text(self, prompts: list[str]) -> torch.Tensor:
        ids = self.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        return self.text_encoder(ids.input_ids.to(self.accelerator.device))[0]

    def _noised(self, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        a = self.alphas[T_NOISE]
        return a.sqrt() * latents + (1 - a).sqrt() * noise

    def _clean(self, noisy: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        a = self.alphas[T_DIFFUSION]
        return (noisy - (1 - a).sqrt() * eps) / a.sqrt()

    def _decode(self, x0: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(x0 / self.vae.config.scaling_factor).sample.clamp(-1, 1)
