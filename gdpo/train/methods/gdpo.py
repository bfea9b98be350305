"""GDPO: group direct preference optimisation of a trained one-step generator (paper, section 3.2 and 3.3)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tqdm import tqdm

from gdpo.degradation import Degradation
from gdpo.kernels import attribute_ratios, attribute_reward, attribute_statistics, gdpo_loss
from gdpo.kernels.dispatch import use_triton
from gdpo.model import lora
from gdpo.model.norms import fuse_norms
from gdpo.photos.dataset import Batch
from gdpo.randomness import moved
from gdpo.scores.registry import build_rewards, require_finite
from gdpo.train.config import GDPOConfig
from gdpo.train.gain import compare, group_reward, luma
from gdpo.train.setup import Prompts, base_generator, group_noise, lora_targets, save_trained


class GDPO:
    """The method: what is trained, and one micro-batch of it."""

    def __init__(self, config: GDPOConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.generator = base_generator(config, accelerator)
        model = config.model
        if self._frozen_norms_are_fused():
            fuse_norms(self.generator.codec)
        lora.add(
            self.generator.unet, model.lora_rank, lora_targets(self.generator), alpha=model.lora_alpha, seed=config.seed
        )  # fmt: skip
        if accelerator.mixed_precision != "no":
            lora.leave_casts_to_autocast(self.generator.unet)
        self.generator.requires_grad_(False)
        self.trained = lora.parameters(self.generator.unet)
        for p in self.trained.values():
            p.requires_grad_(True)
        self.groups = {"policy": (config.learning_rate, self.trained)}
        self.degrade = Degradation(config.degradation)
        self.prompts = Prompts(self.generator, config.data.captions, accelerator.device)
        self.rewards = build_rewards(config.reward_funcs, device=accelerator.device)
        self.samples_at_once = config.sample_batch_size  # 0: all
        self._make_frozen_calls()

    def _frozen_norms_are_fused(self) -> bool:
        """Whether the autoencoder, which needs no gradient, takes the fused kernel: torch's on a GPU first copies
        channels-last features into the other order. The UNet keeps torch's: policy and reference alike.
        """
        if self.accelerator.mixed_precision == "no" or self.config.compile_frozen:
            return False
        return self.config.model.channels_last and use_triton("auto", next(self.generator.unet.parameters()))

    def _make_frozen_calls(self) -> None:
        """The sampler and the autoencoder, compiled if asked for.

        The reference of the LOSS is not among them: it is subtracted from the policy, and beta = 5000 would turn the
        roundings in which a compiled UNet differs from an eager one into a margin.
        """
        generator = self.generator
        calls: tuple[Callable[..., torch.Tensor], ...] = (
            generator.encode, lambda z, n, c: generator.predict(z, n, c).x0, generator.decode,
        )  # fmt: skip
        if self.config.compile_frozen:
            calls = tuple(torch.compile(call, dynamic=False) for call in calls)
        self.encode, self.sample, self.decode = calls

    def step(self, batch: Batch, step: int, backward: Callable[[torch.Tensor], None]) -> dict[str, torch.Tensor]:
        """One micro-batch: sample a group, score it, learn from the comparison. Shapes: B images, G samples each."""
        config, generator, g = self.config, self.generator, self.config.num_generations
        hr = batch.hr * 2 - 1  # [B,3,H,W]
        _, lr_up = self.degrade(batch.hr, seed=config.seed, step=step, samples=batch.samples)
        with torch.no_grad(), self.accelerator.autocast():
            text = self.prompts(batch)
            text = None if text is None else self._grouped(text)
            condition = self._grouped(self.encode(lr_up * 2 - 1))  # [B*G,C,h,w], image after image
            noise = moved(group_noise(condition.shape, config.seed, "sample", batch.samples, g), condition)
            with generator.reference():
                x0 = self._chunked(self.sample, condition, noise, text)
            images = self._chunked(self.decode, x0).unflatten(0, (-1, g))  # [B,G,3,H,W]
        advantage, mask, scores, metrics = self._advantage(images.float(), hr)

        if config.algorithm == "dpo":  # best against worst: a group of two
            best, worst = advantage.argmax(1), advantage.argmin(1)
            keep = torch.stack([best, worst], dim=1)  # [B,2]
            told_apart = (advantage.gather(1, keep).diff(dim=1) != 0).float()  # a tie teaches nothing
            advantage = torch.cat([told_apart, -told_apart], dim=1)
        else:
            keep = torch.arange(g, device=images.device).expand(len(images), -1)
        advantage, images = advantage.float(), _pick(images, keep)
        x0, condition = _pick(x0.unflatten(0, (-1, g)), keep), _pick(condition.unflatten(0, (-1, g)), keep)
        text = None if text is None else _pick(text.unflatten(0, (-1, g)), keep).flatten(0, 1)

        with torch.no_grad(), self.accelerator.autocast():
            flat = condition.flatten(0, 1)
            if config.reuse_latents:
                latents = x0.flatten(0, 1)
            else:
                latents = self._chunked(self.encode, images.flatten(0, 1))
            fresh = moved(group_noise(latents.shape, config.seed, "loss", batch.samples, g), latents)
            fresh = fresh.unflatten(0, (-1, g))
            fresh = fresh[:, :1].expand_as(fresh) if config.shared_noise else fresh
            fresh = _pick(fresh, keep).flatten(0, 1)
            with generator.reference():  # whole, as the policy: other sizes of batch round otherwise
                ref_pred = generator.predict(latents, fresh, text, flat).noise_pred
        with self.accelerator.autocast():
            pred = generator.predict(latents, fresh, text, flat).noise_pred
        k = keep.shape[1]
        loss, margin = gdpo_loss(
            pred.float().unflatten(0, (-1, k)),
            fresh.float().unflatten(0, (-1, k)),
            ref_pred.float().unflatten(0, (-1, k)),
            advantage,
            beta=config.beta,
            weight=self._loss_weight(mask, latents),
            backend=config.backend,
        )
        backward(loss)
        require_finite(scores)  # on a GPU only now: until here the host has queued kernels without waiting for one
        metrics |= {
            "loss": loss,
            "rewards/margins": margin.mean(),
            "rewards/accuracies": (margin > 0).float().mean(),
        }
        return {k: v.detach() for k, v in metrics.items()}

    @torch.no_grad()
    def _advantage(self, images: torch.Tensor, hr: torch.Tensor):
        """Samples [B,G,3,H,W] -> advantage [B,G], texture mask [B,H,W], each reward's scores, metrics for the log."""
        config = self.config
        smooth, texture, mask = attribute_ratios(luma(hr), threshold=config.texture_threshold, backend=config.backend)
        if config.rho == "auto":
            smooth, texture = (smooth * 100).round() / 100, (texture * 100).round() / 100  # as the released code
        else:
            smooth = torch.full_like(smooth, float(config.rho))
            texture = 1 - smooth
        statistics = attribute_statistics(images, hr, mask, backend=config.backend)
        scores = {r.name: r.score(images, hr, statistics) for r in self.rewards}  # [B,G] each, higher is better
        kinds = {k: [scores[r.name] for r in self.rewards if r.kind == k] for k in ("fidelity", "perceptual")}
        fidelity, perceptual = (
            torch.stack(kinds[k], dim=-1) if kinds[k] else images.new_empty(*images.shape[:2], 0)
            for k in ("fidelity", "perceptual")
        )
        try:
            advantage = attribute_reward(
                fidelity, perceptual, smooth, texture,
                fidelity_weights=self._weights("fidelity", hr), perceptual_weights=self._weights("perceptual", hr),
                backend=config.backend,
            )  # fmt: skip
        except ValueError:  # it looks at values where that costs nothing, but cannot name the reward
            require_finite(scores)
            raise
        reward = group_reward([(r.kind, scores[r.name]) for r in self.rewards], smooth, texture)
        metrics = {"reward": reward.mean(), "reward_std": reward.std(dim=1).mean()}
        metrics |= {f"rewards/{name}/mean": s.mean() for name, s in scores.items()}
        metrics |= {f"rewards/{name}/std": s.std(dim=1).mean() for name, s in scores.items()}
        metrics |= {"advantages/max": advantage.amax(1).mean(), "advantages/min": advantage.amin(1).mean()}
        metrics["frac_reward_zero_std"] = (advantage == 0).all(dim=1).float().mean()
        metrics["texture_share"] = texture.mean()
        return advantage, mask, scores, metrics

    def _weights(self, kind: str, like: torch.Tensor) -> torch.Tensor | None:
        """`reward_weights` of one kind, in the order of its functions."""
        if self.config.reward_weights is None:
            return None
        weights = [w for r, w in zip(self.rewards, self.config.reward_weights) if r.kind == kind]
        return moved(torch.tensor(weights), like) if weights else None

    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        """[B,...] -> [B*G,...], the G copies of an image side by side (so that prompts and images stay together)."""
        return x.repeat_interleave(self.config.num_generations, dim=0)

    def _chunked(self, run: Callable[..., torch.Tensor], *inputs: torch.Tensor | None) -> torch.Tensor:
        """Run over the first dimension in pieces of sample_batch_size; without one, in the largest that fit."""
        n = next(len(x) for x in inputs if x is not None)
        while True:
            size = self.samples_at_once or n
            try:
                pieces = [run(*(None if x is None else x[i : i + size] for x in inputs)) for i in range(0, n, size)]
                return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            except torch.cuda.OutOfMemoryError:
                if self.config.sample_batch_size or size == 1:
                    raise
            # Behind the except: until its end, the error's traceback holds what was allocated.
            self.samples_at_once = fewer = -(-min(size, n) // 2)
            tqdm.write(f"{n} samples at once do not fit the GPU's memory: from now on {fewer}", file=sys.stderr)

    def _loss_weight(self, mask: torch.Tensor, latents: torch.Tensor) -> torch.Tensor | None:
        """The texture mask at the latent's resolution, or None (the paper)."""
        if not self.config.texture_weighted_loss:
            return None
        h, w = latents.shape[-2:]
        share = F.adaptive_avg_pool2d(mask.float()[:, None], (h, w))[:, 0]
        return share + 1e-3  # a picture without texture keeps a uniform weight

    @torch.no_grad()
    def preview(self, batch: Batch) -> tuple[list[tuple[str, torch.Tensor]], dict[str, float]]:
        """Columns of the before/after sheet for held-out pictures, and what the policy gained on its reference."""
        generator = self.generator
        lr, _ = self.degrade(batch.hr, seed=self.config.seed, step=0, samples=batch.samples)
        bicubic, hr = self.degrade.upsample(lr) * 2 - 1, batch.hr * 2 - 1
        with self.accelerator.autocast():
            found = compare(
                generator, bicubic, hr, self.rewards,
                samples=batch.samples, seed=self.config.seed, noises=2, text=self.prompts(batch),
            )  # fmt: skip
        columns = [("bicubic", bicubic), ("before", found.before), ("GDPO", found.after), ("HR", hr)]
        gains = {f"gain/{k}": float((v[:, 1] - v[:, 0]).mean()) for k, v in found.scores.items()}
        return columns, gains

    def save(self, folder: Path) -> None:
        """Write the base with the policy's LoRA beside it, so that `gdpo.merge --strength` can choose how much."""
        save_trained(self.generator, self.config, folder)


def _pick(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """x [B,G,...], keep [B,K] -> [B,K,...]."""
    return x[torch.arange(len(x), device=x.device)[:, None], keep]
