"""OneStepGenerator: the noise-aware one-step diffusion generator (NAOSD) with unequal timesteps.

A picture's way: LR, upsampled to the output size -> `encode` -> `predict` (noise added at t_noise, one UNet call at
t_diffusion) -> `decode`. Paper: arXiv 2603.16769, section 3.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from gdpo.model import folders, hub, lora, lora_files, lora_layers
from gdpo.model.architectures import fresh_unet, works_on_pixels
from gdpo.model.codecs import PixelCodec, load_codec
from gdpo.model.compact import CompactUNetConfig
from gdpo.model.network_unet import NetworkUNet
from gdpo.model.parts import (
    disk_errors,
    read_json,
    read_tensors,
    write_index,
    write_pipeline,
)
from gdpo.model.prompts import POSITIVE_PROMPT, PromptEncoder
from gdpo.model.spandrel_networks import PUBLISHED, load_network
from gdpo.model.tiny import TinyUNetConfig

DEFAULT_SCHEDULE = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
# (t_noise, t_diffusion): the paper's for Stable Diffusion; the tiny preset sees a clean copy beside and needs less.
TIMESTEPS = {"epsilon": (250, 100), "residual": (60, 50)}
NO_NOISE = -1  # as t_noise: none is added; the cumulative product before the first step is 1


class Prediction(NamedTuple):
    noise_pred: torch.Tensor
    x0: torch.Tensor


def alphas_cumprod(schedule: dict) -> torch.Tensor:
    """The cumulative product of 1 - beta, float64 [T], of a scheduler_config.json (scaled_linear or linear)."""
    start, end = schedule.get("beta_start", 0.00085), schedule.get("beta_end", 0.012)
    steps = schedule.get("num_train_timesteps", 1000)
    for name, beta in (("beta_start", start), ("beta_end", end)):
        if not isinstance(beta, int | float) or not 0 < beta < 1:
            raise ValueError(f"scheduler {name} must be a number between 0 and 1; got {beta!r:.40}")
    if type(steps) is not int or not 2 <= steps <= 100_000:
        raise ValueError(f"scheduler num_train_timesteps must be a whole number up to 100000; got {steps!r:.40}")
    kind = schedule.get("beta_schedule", "scaled_linear")
    if kind == "scaled_linear":
        beta = torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64) ** 2
    elif kind == "linear":
        beta = torch.linspace(start, end, steps, dtype=torch.float64)
    else:
        raise ValueError(f"scheduler beta_schedule is {kind!r}; scaled_linear and linear are supported")
    return torch.cumprod(1 - beta, dim=0)


class OneStepGenerator(nn.Module):
    """UNet, latent codec, schedule and prompt of a one-step generator.

    Two parametrisations share every line around them:
    - "epsilon" (Stable Diffusion): the UNet sees z~ and returns the noise; x0 = (z~ - sqrt(b_d) eps) / sqrt(a_d).
    - "residual" (tiny): the UNet sees z~ beside the clean condition and returns x0 - condition;
      eps = (z~ - sqrt(a_d) x0) / sqrt(b_d), the same equation solved the other way.
    """

    def __init__(
        self,
        unet: Any,
        codec: Any,
        schedule: dict | None = None,
        *,
        parametrization: str = "epsilon",
        t_noise: int | None = None,
        t_diffusion: int | None = None,
        prompt: str = POSITIVE_PROMPT,
        prompt_embeds: torch.Tensor | None = None,
        prompt_encoder: PromptEncoder | None = None,
    ):
        super().__init__()
        if parametrization not in TIMESTEPS:
            raise ValueError(f"parametrization must be one of {', '.join(TIMESTEPS)}; got {parametrization!r}")
        self.unet: Any = unet
        self.codec: Any = codec
        self.schedule = dict(schedule or DEFAULT_SCHEDULE)
        prediction = self.schedule.get("prediction_type", "epsilon")
        if prediction != "epsilon":
            raise ValueError(
                f"scheduler prediction_type is {prediction!r}; this generator needs an epsilon model "
                "(stable-diffusion-2-1-base, not stable-diffusion-2-1)"
            )
        self.parametrization = parametrization
        default_noise, default_diffusion = TIMESTEPS[parametrization]
        self.t_noise = default_noise if t_noise is None else int(t_noise)
        self.t_diffusion = default_diffusion if t_diffusion is None else int(t_diffusion)
        cumprod = alphas_cumprod(self.schedule)
        for name, t, least in (("t_noise", self.t_noise, NO_NOISE), ("t_diffusion", self.t_diffusion, 0)):
            if not least <= t < len(cumprod):
                raise ValueError(f"{name} must be in [{least}, {len(cumprod) - 1}]; got {t}")
        self.alphas_cumprod = cumprod
        self.a_n = 1.0 if self.t_noise == NO_NOISE else float(cumprod[self.t_noise])
        self.a_d = float(cumprod[self.t_diffusion])
        self.b_n, self.b_d = 1 - self.a_n, 1 - self.a_d
        self.prompt, self.prompt_encoder = prompt, prompt_encoder
        self.prompt_embeds: torch.Tensor | None
        self.register_buffer("prompt_embeds", prompt_embeds, persistent=False)

    # ---- making, loading, saving

    @classmethod
    def tiny(
        cls, config: TinyUNetConfig | CompactUNetConfig | None = None, *, seed: int = 0, **kwargs
    ) -> OneStepGenerator:
        """A fresh generator without a VAE, of this shape (None: the tiny preset's), initialised by `seed` alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(fresh_unet(config or TinyUNetConfig()), PixelCodec(4), parametrization="residual", **kwargs)

    @classmethod
    def of_network(cls, name: str, noise: float = 0.0, **kwargs) -> OneStepGenerator:
        """A generator that gives a published x4 or x2 network's own picture, whatever the noise, until it is trained.

        Args:
            name: a file of weights, or a name of gdpo.model.spandrel_networks.PUBLISHED, which gdpo.assets has fetched.
            noise: the network sees its LR with so much noise (standard deviation, 8-bit levels, at most 64); 0: none.

        Raises:
            FileNotFoundError, ValueError, RuntimeError: see gdpo.model.spandrel_networks.load_network and
                NetworkUNet.see_noise; a generator without noise (t_noise -1) has none to see.
        """
        file = Path(name)
        if name in PUBLISHED:
            from gdpo.assets import asset

            folder, stem = PUBLISHED[name]
            file = asset(folder) / f"{stem}.bin"
        network, source = load_network(file)
        unet = NetworkUNet(network, source)
        generator = cls(unet, PixelCodec(4), parametrization="residual", **kwargs).requires_grad_(False).eval()
        unet.signal = math.sqrt(generator.a_n)
        if noise:
            if generator.t_noise == NO_NOISE:
                raise ValueError(f"noise {noise:g} for the network to see, but t_noise {NO_NOISE} adds none")
            unet.see_noise(noise)
        unet.check()
        return generator

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        t_noise: int | None = None,
        t_diffusion: int | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> OneStepGenerator:
        """Load a diffusers folder (unet/ vae/ scheduler/ ...), with its `generator.json` and LoRA folders if any.

        Args:
            folder: a local folder, or "hub:ORG/NAME", perhaps "@REVISION" (the only form that touches the network).
            t_noise, t_diffusion: override the timesteps that the folder remembers.
            dtype: of the base weights (LoRA weights stay fp32).

        Raises:
            FileNotFoundError, ValueError: naming the file and what was expected in it. ConnectionError: no Hub.
        """
        root = folders.resolve(folder)
        saved = folders.remembered(root / "generator.json")
        schedule_file = root / "scheduler" / "scheduler_config.json"
        schedule = read_json(schedule_file) if schedule_file.is_file() else None
        unet = folders.load_unet(root / "unet", dtype)
        if schedule is None and not works_on_pixels(unet):
            raise FileNotFoundError(f"{schedule_file}: no such file; it says what the model's timesteps mean")
        codec = load_codec(root / "vae", dtype)
        embeds_file, embeds = root / "prompt_embeds.safetensors", None
        if embeds_file.is_file():
            embeds = read_tensors(embeds_file).get("prompt_embeds")
            if embeds is None:
                raise ValueError(f"{embeds_file}: holds no tensor called prompt_embeds")
        generator = cls(
            unet,
            codec,
            schedule,
            parametrization="residual" if works_on_pixels(unet) else "epsilon",
            t_noise=saved.get("t_noise") if t_noise is None else t_noise,
            t_diffusion=saved.get("t_diffusion") if t_diffusion is None else t_diffusion,
            prompt=saved.get("prompt", POSITIVE_PROMPT),
            prompt_embeds=embeds,
            prompt_encoder=None if works_on_pixels(unet) else PromptEncoder(root),
        )
        beside = (root / lora_files.DIFFUSERS_WEIGHTS).is_file()  # where diffusers' training scripts write it
        for module, name in ((unet, "unet_lora"), (generator.vae, "vae_lora")):
            if module is not None and (root / name).is_dir():
                lora.load(module, root / name)
            elif module is unet and beside and not works_on_pixels(unet):
                lora.load(module, root)
        return generator.requires_grad_(False).eval()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a complete folder, whole or not at all: base weights, live LoRA apart, timesteps, prompt embedding.

        An existing folder is replaced only when the new one is complete. The text encoder is copied when it was loaded
        from a folder that has one. What diffusers can run loads as its StableDiffusionPipeline, with custom_pipeline
        the folder as one that enlarges pictures, and the UNet's LoRA by `pipeline.load_lora_weights(folder)`.
        """
        from safetensors.torch import save_file

        from engine.io.folders import staged_folder

        with disk_errors(Path(folder)), staged_folder(Path(folder)) as root:
            folders.save_unet(self.unet, root / "unet")
            folders.without_lora(self.codec).save(root / "vae")
            for module, part in ((self.unet, "unet"), (self.vae, "vae")):
                if module is not None and lora.adapters(module):
                    lora.save(module, root / f"{part}_lora", part=part if self.uses_text else None)
            for part in ("unet", "vae"):
                folders.without_origin(root / part / "config.json")
            (root / "scheduler").mkdir()
            folders.write_json(root / "scheduler" / "scheduler_config.json", self.schedule)
            remembered = {
                "t_noise": self.t_noise,
                "t_diffusion": self.t_diffusion,
                "parametrization": self.parametrization,
                "prompt": self.prompt,
            }
            folders.write_json(root / "generator.json", remembered)
            if self.uses_text:
                embeds = self.text_embeds(1).float().cpu().contiguous()
                save_file({"prompt_embeds": embeds}, root / "prompt_embeds.safetensors")
                self._copy_text_models(root)
                self._make_pipeline(root)

    def push_to_hub(self, repo_id: str, *, card: str | None = None, private: bool = False) -> str:
        """Push what `save_pretrained` writes to the Hugging Face Hub, and return the repository's address.

        Args:
            repo_id: "ORG/NAME"; it is made if it is not there.
            card: text of README.md; see gdpo.model.hub.model_card.
            private: whether a new repository is private.

        Raises:
            ValueError: a bad name, or no right to it. ConnectionError: the Hub cannot be reached.
        """
        import tempfile

        with tempfile.TemporaryDirectory() as work:
            folder = Path(work) / Path(repo_id).name
            self.save_pretrained(folder)
            if card is not None:
                (folder / "README.md").write_text(card, "utf-8")
            return hub.upload(folder, repo_id, private=private)

    def saved_bytes(self) -> int:
        """About how many bytes `save_pretrained` writes in fp32: all weights (spare adapters too) and text models."""
        weights = 4 * sum(p.numel() for p in self.parameters())
        files = (file for part in self._text_models() for file in part.rglob("*") if file.is_file())
        return weights + sum(file.stat().st_size for file in files)

    def _text_models(self) -> list[Path]:
        """The folders of the text encoder and its tokenizer, if it was loaded from a folder that has them."""
        source = self.prompt_encoder.folder if self.prompt_encoder else None
        return [source / part for part in ("text_encoder", "tokenizer") if source and (source / part).is_dir()]

    def _copy_text_models(self, root: Path) -> None:
        import shutil

        for part in self._text_models():
            shutil.copytree(part, root / part.name)

    def _make_pipeline(self, root: Path) -> None:
        """What diffusers looks for in the folder itself: the list of parts, the method, and the UNet's LoRA."""
        import shutil

        text = (root / "text_encoder").is_dir() and (root / "tokenizer").is_dir()
        kind = type(self.vae).__name__ if self.vae is not None else None
        write_index(root, kind, self.schedule.get("_class_name", DEFAULT_SCHEDULE["_class_name"]), text)
        vae_lora = self.vae is not None and bool(lora.adapters(self.vae))
        write_pipeline(root, self.t_noise, self.t_diffusion, vae_lora, self.prompt)
        if (made := root / "unet_lora" / lora_files.DIFFUSERS_WEIGHTS).is_file():
            shutil.copyfile(made, root / made.name)

    # ---- the method

    @property
    def uses_text(self) -> bool:
        """Whether the UNet has cross-attention."""
        return self.parametrization == "epsilon"

    @property
    def vae(self) -> Any:
        """The learned autoencoder inside the codec, or None for the VAE-free codec."""
        return getattr(self.codec, "vae", None)

    @property
    def multiple(self) -> int:
        """Image H and W must be multiples of this."""
        if works_on_pixels(self.unet):
            return self.codec.factor * self.unet.multiple
        return self.codec.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    def encode(self, images: torch.Tensor, sample_posterior: bool = False) -> torch.Tensor:
        """images [B,3,H,W] in [-1,1] -> scaled latents [B,C,H/f,W/f]. H and W must be multiples of `multiple`."""
        m = self.multiple
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % m or images.shape[3] % m:
            raise ValueError(f"images must be [B,3,H,W] with H and W multiples of {m}; got {tuple(images.shape)}")
        with lora_layers.cast_together(self.vae):
            return self.codec.encode(images, sample_posterior)

    def predict(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        prompt_embeds: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
    ) -> Prediction:
        """One diffusion step: z~ = sqrt(a_n) z + sqrt(b_n) eps, then the UNet at t_diffusion (paper, NAOSD).

        Args:
            latents, noise: [B,C,h,w].
            prompt_embeds: [B,L,D] or [1,L,D]; None takes the fixed prompt.
            condition: clean latents [B,C,h,w] that the residual parametrisation sees beside z~; None means `latents`
                (restoring). The GDPO loss noises a SAMPLE and conditions on the LR. Not used by "epsilon".

        Returns:
            (noise_pred, x0), both like latents, tied by x0 = (z~ - sqrt(b_d) noise_pred) / sqrt(a_d).
        """
        if latents.shape != noise.shape:
            raise ValueError(f"noise must have the shape of latents {tuple(latents.shape)}; got {tuple(noise.shape)}")
        noisy = math.sqrt(self.a_n) * latents + math.sqrt(self.b_n) * noise
        if self.parametrization == "residual":
            condition = latents if condition is None else condition
            with lora_layers.cast_together(self.unet):
                x0 = condition + self.unet(torch.cat([noisy, condition], dim=1), self.t_diffusion).sample
            return Prediction((noisy - math.sqrt(self.a_d) * x0) / math.sqrt(self.b_d), x0)
        text = self.text_embeds(len(latents)) if prompt_embeds is None else prompt_embeds.expand(len(latents), -1, -1)
        # Diffusers would copy a number to the device, and the host would wait for all that is queued there.
        t = torch.full((1,), self.t_diffusion, device=noisy.device)
        with lora_layers.cast_together(self.unet):
            noise_pred = self.unet(noisy, t, encoder_hidden_states=text.to(noisy.dtype)).sample
        return Prediction(noise_pred, (noisy - math.sqrt(self.b_d) * noise_pred) / math.sqrt(self.a_d))

    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        """x0 [B,C,h,w] -> images [B,3,H,W] clamped to [-1,1]."""
        return self.codec.decode(x0).clamp(-1, 1)

    def text_embeds(self, batch: int) -> torch.Tensor:
        """The fixed prompt's embedding, [batch,L,D], encoded at the first call."""
        if self.prompt_embeds is None:
            if self.prompt_encoder is None:
                raise ValueError("this generator has no prompt embedding; pass prompt_embeds [B,L,D]")
            parameter = next(self.unet.parameters())
            self.prompt_embeds = self.prompt_encoder([self.prompt]).to(parameter.device, parameter.dtype)
        return self.prompt_embeds.expand(batch, -1, -1)

    # ---- LoRA

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the generator is its own frozen reference: the UNet's LoRA is switched off. Not a second copy."""
        with lora.using([self.unet], None):
            yield

    def merge_lora(self, strength: float = 1.0) -> OneStepGenerator:
        """Fold live LoRA weights into the base, and return self.

        Args:
            strength: 0 drops them, 1 is the trained model; above 1 goes on in the direction of training.
        """
        lora.check_strength(strength)
        for module in (self.unet, self.vae):
            if module is not None:
                lora.merge(module, strength)
        return self
