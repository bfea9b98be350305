"""The pipeline.py of a saved folder, in diffusers as it is: the same pictures as ours."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image

from gdpo.generator import OneStepGenerator
from gdpo.model import lora


@pytest.fixture(scope="module", params=["kl", "taesd"])
def saved(request, tmp_path_factory):
    """(folder, ours): a saved model with a live LoRA of the UNet, other timesteps and another prompt."""
    base = request.getfixturevalue("mini_sd" if request.param == "kl" else "mini_sd_taesd")
    generator = OneStepGenerator.from_pretrained(base, t_noise=200, t_diffusion=90)
    generator.prompt, generator.prompt_embeds = 'sharp "photo"\\', None
    lora.add(generator.unet, 4, lora.UNET_TARGETS, alpha=8)
    draws = torch.Generator().manual_seed(0)
    for p in lora.parameters(generator.unet).values():
        p.data += 0.05 * torch.randn(p.shape, generator=draws)
    folder = tmp_path_factory.mktemp("pipeline") / "model"
    generator.save_pretrained(folder)
    return folder, OneStepGenerator.from_pretrained(folder)


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """diffusers copies the file into a cache of modules."""
    import diffusers.utils.dynamic_modules_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def load(folder) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, 32, 3)).astype(np.uint8)


@torch.no_grad()
def ours(generator: OneStepGenerator, rgb: np.ndarray, noise: torch.Tensor) -> torch.Tensor:
    lr = torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 255
    up = F.interpolate(lr, scale_factor=4, mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1
    return generator.decode(generator.predict(generator.encode(up), noise).x0) / 2 + 0.5


def test_it_gives_our_picture_with_the_lora_and_without(saved):
    folder, generator = saved
    pipeline, rgb = load(folder), picture()
    assert type(pipeline).__name__ == "OneStepUpscalePipeline"
    noise = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(1))
    with generator.reference():
        base = ours(generator, rgb, noise)
    options = {"noise": noise, "color": "none", "output_type": "pt"}
    assert (pipeline(rgb, **options).images - base).abs().max() < 1e-4
    pipeline.load_lora_weights(str(folder))
    tuned = ours(generator, rgb, noise)
    assert (pipeline(rgb, **options).images - tuned).abs().max() < 1e-4 < (tuned - base).abs().max()


def test_pictures_of_any_size_and_kind_and_the_generators_seed(saved):
    folder, _ = saved
    pipeline = load(folder)
    rgb = picture()[:7, :13]
    images = [pipeline(kind, torch.Generator().manual_seed(3)).images[0] for kind in (rgb, Image.fromarray(rgb))]
    assert images[0].size == (52, 28)
    assert np.array_equal(*map(np.asarray, images))
    other = pipeline(rgb, torch.Generator().manual_seed(4)).images[0]
    assert not np.array_equal(np.asarray(other), np.asarray(images[0]))
    many = pipeline([Image.fromarray(rgb)] * 2, output_type="np", return_dict=False)[0]
    assert many.shape == (2, 28, 52, 3)


def test_the_colours_are_those_of_the_engine(saved):
    from engine.runtime import color

    folder, _ = saved
    pipeline, rgb = load(folder), picture()
    noise = torch.zeros(1, 4, 8, 16)
    plain, aligned = (
        pipeline(rgb, noise=noise, color=c, output_type="np").images[0] for c in ("none", "wavelet")
    )  # fmt: skip
    lr = torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 255
    up = F.interpolate(lr, scale_factor=4, mode="bicubic", antialias=True).clamp(0, 1)[0].numpy()
    levels = [np.floor(x * color.FULL + 0.5).astype(np.uint16) for x in (plain, up)]
    expected = color.wavelet_band(*levels, (0, 64)).astype(float) / color.FULL
    assert np.abs(aligned - expected).max() < 1e-4 < np.abs(plain - expected).max()


def test_the_index_still_is_of_stable_diffusion(saved):
    folder, _ = saved
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["unet"][1] == "UNet2DConditionModel"
    assert type(DiffusionPipeline.from_pretrained(folder)) is StableDiffusionPipeline


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": np.zeros((4, 4), np.uint8)}, "three colours"),
        ({"image": picture(), "color": "adain"}, "color must be wavelet or none; got 'adain'"),
        ({"image": picture(), "output_type": "latent"}, "output_type must be"),
    ],
)
def test_bad_input(saved, options, message):
    with pytest.raises(ValueError, match=message):
        load(saved[0])(**options)


def test_a_live_lora_of_the_vae_is_said(mini_sd, tmp_path):
    generator = OneStepGenerator.from_pretrained(mini_sd)
    lora.add(generator.vae, 4, lora.VAE_ENCODER_TARGETS)
    generator.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"python -m gdpo\.merge it first"):
        load(tmp_path / "model")(picture())
    generator.merge_lora().save_pretrained(tmp_path / "merged")
    assert load(tmp_path / "merged")(picture()).images[0].size == (128, 64)
