"""GDPO: group direct preference optimisation of a trained one-step generator (paper, section 3.2 and 3.3).

Other algorithms (`algorithm`) learn from the same groups, for comparison: gdpo.train.losses.preference. To add one: its
name in gdpo.train.config, its loss there, a branch in `_compare`, and, where it compares pairs, a row in `_pairs`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple, assert_never

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from gdpo.generator import NO_NOISE
from gdpo.kernels import gdpo_loss, use_triton
from gdpo.model import lora
from gdpo.model.diffusers_patches import (
    fold_padding,
    fuse_gates,
    fuse_norms,
    fuse_residuals,
    transformers_channels_last,
)
from gdpo.model.training_patches import constant_time
from gdpo.photos.dataset import Batch
from gdpo.randomness import moved
from gdpo.scores.group import GroupReward, Judged
from gdpo.scores.remote import Patience
from gdpo.scores.rewards import build_rewards, require_finite
from gdpo.train.config import GDPOConfig
from gdpo.train.gain import compare
from gdpo.train.group import Group, pick
from gdpo.train.losses.preference import diffusion_dpo_loss, dp2o_loss, grpo_loss, nft_loss
from gdpo.train.methods.base import Backward, Columns, Method, Metrics
from gdpo.train.setup import add_lora, group_noise


class Predictions(NamedTuple):
    """Of the noise that was added to a group's latents, fp32 [B,K,C,h,w] each."""

    policy: Tensor
    reference: Tensor
    noise: Tensor


class GDPO(Method):
    """The method: what is trained, and one micro-batch of it."""

    config: GDPOConfig
    guarded_from = "start"  # it tunes a finished model

    def __init__(self, config: GDPOConfig, accelerator: Accelerator):
        super().__init__(config, accelerator)
        if self.generator.t_noise == NO_NOISE:
            raise ValueError(
                f"{config.model.pretrained} adds no noise, so the samples of a group would all be the same; train it "
                "with noise first (gdpo.train naosd --model.t_noise 250 --model.t_diffusion 100)"
            )
        unet = self.generator.unet
        fold_padding(self.generator.codec)  # frozen: no LoRA goes around its convolutions
        add_lora(self.generator, config.model, config.seed)
        if self.generator.uses_text:  # a UNet of diffusers'
            constant_time(unet, self.generator.t_diffusion)
        if self._kernels_are_fused():
            fuse_norms(self.generator.codec)
            fuse_residuals(self.generator.codec)
            if self.generator.uses_text:
                fuse_norms(unet)
                fuse_gates(unet)
                transformers_channels_last(unet)
        if accelerator.mixed_precision != "no":
            lora.leave_casts_to_autocast(unet)
        self.trained = lora.parameters(unet)
        self.train_only(self.trained)
        self.groups = {"policy": (config.learning_rate, self.trained)}
        self.reward = GroupReward(
            build_rewards(
                config.reward_funcs, accelerator.device, Patience(config.reward_timeout, config.reward_patience)
            ),
            config.reward_weights,
            config.reward_normalization,
            config.rho,
            config.texture_threshold,
            config.backend,
        )
        if (warning := self.reward.warning()) and accelerator.is_main_process:
            tqdm.write(f"warning: {warning}", file=sys.stderr)
        self.samples_at_once = config.sample_batch_size  # 0: all
        self._make_frozen_calls()

    def _kernels_are_fused(self) -> bool:
        """Whether normalisations and gates take the fused kernels, policy and reference alike: torch's normalisation on
        a GPU first copies channels-last features into the other order.
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
        calls: tuple[Callable[..., Tensor], ...] = (
            generator.encode, lambda z, n, c: generator.predict(z, n, c).x0, generator.decode,
        )  # fmt: skip
        if self.config.compile_frozen:
            calls = tuple(torch.compile(call, dynamic=False) for call in calls)
        self.encode, self.sample, self.decode = calls

    # ---- one micro-batch. Shapes: B images, G samples of each, K of them compared

    def step(self, batch: Batch, step: int, backward: Backward) -> Metrics:
        """Sample a group for each picture, score it, learn from the comparison."""
        group = self._sample(batch, step)
        pictures = group.images.float(), batch.hr * 2 - 1
        started = self.reward.start(*pictures)
        keep, predictions = None, None
        if started and self._compares_all():  # while other processes compute their rewards
            predictions = self._predict(group, batch.samples, None)
        judged = self._score(*pictures, started)
        if predictions is None:
            keep = self._kept(judged.reward)
            predictions = self._predict(group if keep is None else group.pick(keep), batch.samples, keep)
        loss, margin = self._compare(predictions, judged, keep)
        backward(loss)
        require_finite(judged.scores)  # on a GPU only now: until here the host has queued kernels without waiting
        metrics = {
            "loss": loss,
            "rewards/margins": margin.mean(),
            "rewards/accuracies": (margin > 0).float().mean(),
            "drift/prediction": (predictions.policy.detach() - predictions.reference).square().mean(),
        }
        return {k: v.detach() for k, v in (self._log(judged) | metrics).items()}

    @torch.no_grad()
    def _sample(self, batch: Batch, step: int) -> Group:
        """G samples of the reference for each picture, from independent noise."""
        config, g = self.config, self.config.num_generations
        image = self.inputs(batch, step=step)
        with self.accelerator.autocast():
            text = self.prompts(batch)
            text = None if text is None else self._grouped(text)
            condition = self._grouped(self.encode(image))  # [B*G,C,h,w], image after image
            noise = moved(group_noise(condition.shape, config.seed, "sample", batch.samples, g), condition)
            with self.generator.reference():
                x0 = self._chunked(self.sample, condition, noise, text)
            images = self._chunked(self.decode, x0)
        text = None if text is None else text.unflatten(0, (-1, g))
        images, x0, condition = (x.unflatten(0, (-1, g)) for x in (images, x0, condition))
        return Group(images, x0, condition, text)

    def _score(self, images: Tensor, hr: Tensor, started: dict[str, Callable[[], Tensor]] | None = None) -> Judged:
        """[B,G,3,H,W] against [B,3,H,W], both in [-1,1]; `started` as in GroupReward."""
        return self.reward(images, hr, started)

    def _compares_all(self) -> bool:
        """Whether the whole group is compared, whatever its rewards are."""
        return self._pairs() is None

    def _pairs(self) -> int | None:
        """How many of the best samples are compared with as many of the worst; None: the whole group is compared."""
        return {"diffusion_dpo": 1, "dp2o": self.config.num_pairs}.get(self.config.algorithm)

    def _kept(self, reward: Tensor) -> Tensor | None:
        """Which samples are compared: the numbers of the best and the worst, best first, [B,K]; None for all."""
        n = self._pairs()
        if n is None:
            return None
        order = reward.argsort(dim=1, descending=True, stable=True)
        return torch.cat([order[:, :n], order[:, -n:]], dim=1)

    def _predict(self, group: Group, samples: list[int], keep: Tensor | None) -> Predictions:
        """The noise in the group's latents, as the policy (with gradient) and the reference see it."""
        config, generator, flat = self.config, self.generator, group.flat()
        k = group.images.shape[1]
        with torch.no_grad(), self.accelerator.autocast():
            latents = flat.x0 if config.reuse_latents else self._chunked(self.encode, flat.images)
            fresh = group_noise(latents.shape, config.seed, "loss", samples, config.num_generations)
            fresh = moved(fresh, latents).unflatten(0, (len(samples), -1))
            fresh = fresh[:, :1].expand_as(fresh) if config.shared_noise else fresh
            fresh = (fresh if keep is None else pick(fresh, keep)).flatten(0, 1)
            with generator.reference():  # whole, as the policy: other sizes of batch round otherwise
                reference = generator.predict(latents, fresh, flat.text, flat.condition).noise_pred
        with self.accelerator.autocast():
            policy = generator.predict(latents, fresh, flat.text, flat.condition).noise_pred
        return Predictions(*(x.float().unflatten(0, (-1, k)) for x in (policy, reference, fresh)))

    def _compare(self, predictions: Predictions, judged: Judged, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Loss [] and margin [B]."""
        config, (policy, reference, noise) = self.config, predictions
        weight, advantage = self._loss_weight(judged.mask, noise), judged.advantage.float()
        reward = judged.reward if keep is None else judged.reward.gather(1, keep)
        seen, beta = (policy, noise, reference), config.beta
        if config.algorithm == "gdpo":
            return gdpo_loss(*seen, advantage, beta=beta, weight=weight, backend=config.backend)
        if config.algorithm == "grpo":
            return grpo_loss(*seen, advantage, beta=beta, epsilon=config.epsilon, kl=config.kl, weight=weight)
        if config.algorithm == "nft":
            return nft_loss(*seen, advantage, beta=beta, strength=config.nft_strength, weight=weight)
        if config.algorithm == "diffusion_dpo":
            return diffusion_dpo_loss(*seen, reward, beta=beta, weight=weight)
        if config.algorithm == "dp2o":
            spread = judged.reward.std(dim=1)
            return dp2o_loss(*seen, reward, spread, beta=beta, mean_spread=config.mean_reward_std, weight=weight)
        assert_never(config.algorithm)

    @torch.no_grad()
    def _log(self, judged: Judged) -> Metrics:
        """What a group scored, for the log."""
        reward, advantage = judged.reward, judged.advantage
        metrics = {"reward": reward.mean(), "reward_std": reward.std(dim=1).mean()}
        metrics |= {f"rewards/{name}/mean": s.mean() for name, s in judged.scores.items()}
        metrics |= {f"rewards/{name}/std": s.std(dim=1).mean() for name, s in judged.scores.items()}
        metrics |= {"advantages/max": advantage.amax(1).mean(), "advantages/min": advantage.amin(1).mean()}
        metrics["frac_reward_zero_std"] = (advantage == 0).all(dim=1).float().mean()
        metrics["texture_share"] = judged.texture.mean()
        return metrics

    def _grouped(self, x: Tensor) -> Tensor:
        """[B,...] -> [B*G,...], the G copies of an image side by side (so that prompts and images stay together)."""
        return x.repeat_interleave(self.config.num_generations, dim=0)

    def _chunked(self, run: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
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

    def _loss_weight(self, mask: Tensor, latents: Tensor) -> Tensor | None:
        """The texture mask [B,H,W] at the resolution of latents [...,h,w], or None (the paper)."""
        if not self.config.texture_weighted_loss:
            return None
        h, w = latents.shape[-2:]
        share = F.adaptive_avg_pool2d(mask.float()[:, None], (h, w))[:, 0]
        return share + 1e-3  # a picture without texture keeps a uniform weight

    # ---- what a person looks at

    @torch.no_grad()
    def preview(self, batch: Batch) -> tuple[Columns, dict[str, float]]:
        """Columns of the before/after sheet for held-out pictures, and what the policy gained on its reference."""
        bicubic, hr = self.inputs(batch, as_inference=True), batch.hr * 2 - 1
        with self.accelerator.autocast():
            found = compare(
                self.generator, bicubic, hr, self.reward,
                samples=batch.samples, seed=self.config.seed, noises=2, text=self.prompts(batch),
            )  # fmt: skip
        columns = [("bicubic", bicubic), ("before", found.before), ("GDPO", found.after), ("HR", hr)]
        gains = {f"gain/{k}": float((v[:, 1] - v[:, 0]).mean()) for k, v in found.scores.items()}
        return columns, gains

    @torch.no_grad()
    def group(self, batch: Batch) -> Columns:
        """A group of the policy's for each held-out picture, in the order of its rewards: what they like."""
        config, g = self.config, self.config.num_generations
        image = self.inputs(batch, as_inference=True)
        with self.accelerator.autocast():
            text = self.prompts(batch)
            condition = self._grouped(self.encode(image))
            noise = moved(group_noise(condition.shape, config.seed, "sample", batch.samples, g), condition)
            x0 = self._chunked(self.sample, condition, noise, None if text is None else self._grouped(text))
            images = self._chunked(self.decode, x0).unflatten(0, (-1, g)).float()
        order = self._score(images, batch.hr * 2 - 1).reward.argsort(dim=1, descending=True)
        titles = ["highest", *(f"{k + 1}." for k in range(1, g - 1)), "lowest"]
        return list(zip(titles, pick(images, order).unbind(1)))
