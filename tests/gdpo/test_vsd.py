"""VSD on a miniature of Stable Diffusion: its gradient and its fake model's loss against an independent computation.

The other side is float64, one latent at a time, with a plain diffusers UNet and CLIP. It shares only inputs: latents,
the noise and timestep draws of each (stream, sample, copy), the weights on the disk and those of the fake's LoRA.
"""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from gdpo import merge
from gdpo.generator import OneStepGenerator
from gdpo.model import lora
from gdpo.randomness import normal, uniform
from gdpo.train.config import NAOSDConfig
from gdpo.train.losses.vsd import VSD
from tests.support.training import train

K, SEED, RANK, CFG = 2, 11, 3, 7.5  # K noises per picture
CAPTIONS = ["sharp texture", "blurry painting", "clean photo"]
NEGATIVE = "low quality painting"
SAMPLES = [5, 17, 4]
SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def made(mini_sd) -> SimpleNamespace:
    """VSD beside a generator's LoRA that must not reach it, both stirred, and what the two losses give."""
    generator = OneStepGenerator.from_pretrained(mini_sd)
    lora.add(generator.unet, 2, lora.UNET_TARGETS, train_whole=("conv_in",), seed=SEED)
    vsd = VSD(generator, NAOSDConfig(seed=SEED, vsd_cfg=CFG, vsd_lora_rank=RANK, negative_prompt=NEGATIVE))
    own = lora.parameters(generator.unet)
    with torch.no_grad():
        for i, p in enumerate([*own.values(), *vsd.parameters.values()]):
            p += 0.05 * normal(p.shape, SEED, "stir", i)
    for p in own.values():
        p.requires_grad_(True)
    text = generator.prompt_encoder(CAPTIONS).repeat_interleave(K, dim=0)

    latents = torch.stack([normal(SHAPE, SEED, "latents", i) for i in range(len(text))]).requires_grad_(True)
    loss = vsd.loss(latents, text, SAMPLES)
    loss.backward()
    assert all(p.grad is None for p in [*own.values(), *vsd.parameters.values()]), "VSD teaches the latents alone"

    fake_loss = vsd.fake_loss(latents.detach(), text, SAMPLES)
    with vsd.training_fake():
        fake_loss.backward()
    assert all(p.grad is None for p in own.values()), "the fake's loss teaches the fake alone"
    return SimpleNamespace(
        latents=latents.detach().double(),
        loss=float(loss.detach()),
        gradient=latents.grad.double(),
        fake_loss=float(fake_loss.detach()),
        fake={name: p.detach().double() for name, p in vsd.parameters.items()},
        fake_gradient={name: p.grad.double() for name, p in vsd.parameters.items()},
    )


# ---- The independent side


class Plain:
    """The folder's UNet and text encoder in float64, and the fake: the same UNet with W + B A and its own conv_in."""

    def __init__(self, folder, fake, *, lora_scale=1.0):
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").double().requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").double().requires_grad_(False)
        self.own = {name: w.clone().requires_grad_(True) for name, w in fake.items()}
        base = dict(self.unet.named_parameters())
        self.changed = {}
        for name, a in self.own.items():
            if ".modules_to_save.fake" in name:
                self.changed[name.replace(".modules_to_save.fake", "")] = a
            elif ".lora_A.fake" in name:
                target, b = name.replace(".lora_A.fake", ""), self.own[name.replace("lora_A", "lora_B")]
                delta = torch.einsum("or,ri->oi", b.reshape(-1, RANK), a.reshape(RANK, -1))
                self.changed[target] = base[target] + lora_scale * delta.reshape(base[target].shape)

    def text(self, prompt):
        words = self.tokenizer(prompt, padding="max_length", max_length=77, truncation=True)
        return self.text_encoder(torch.tensor([words.input_ids])).last_hidden_state

    def real(self, noisy, t, text):
        return self.unet(noisy, torch.tensor(t), text).sample

    def fake(self, noisy, t, text):
        return torch.func.functional_call(self.unet, self.changed, (noisy, torch.tensor(t), text)).sample


def alpha_bar(t: int) -> float:
    return math.prod(1 - (0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2 for i in range(t + 1))


def draws(stream, span):
    """Timestep and noise of each latent."""
    for sample in SAMPLES:
        for copy in range(K):
            share = span[0] + (span[1] - span[0]) * uniform(SEED, stream, "t", sample, copy)
            yield math.floor(share * 1000), normal(SHAPE, SEED, stream, sample, copy).double()[None]


@torch.no_grad()
def vsd_gradient(
    folder, made, *, captions=CAPTIONS, negative=NEGATIVE, cfg=CFG, sign=1, span=(0.02, 0.5), together=False, **plain
):
    """-> (loss, its gradient for the latents). The keywords after `made` plant faults.

    x0_fake - x0_real = sqrt((1-a)/a) (eps_real - eps_fake), for both start from the same noisy latent; the loss is
    the mean square of that over mean|z - x0_real|, and its gradient 2/n times the same.
    """
    model, directions, scales = Plain(folder, made.fake, **plain), [], []
    for i, (t, eps) in enumerate(draws("vsd", span)):
        z, a, prompt = made.latents[i : i + 1], alpha_bar(t), model.text(captions[i // K])
        noisy = a**0.5 * z + (1 - a) ** 0.5 * eps
        real = cfg * model.real(noisy, t, prompt) - (cfg - 1) * model.real(noisy, t, model.text(negative))
        directions.append(((1 - a) / a) ** 0.5 * (real - model.fake(noisy, t, prompt)))
        scales.append((z - (noisy - (1 - a) ** 0.5 * real) / a**0.5).abs().mean())
    scales = [sum(scales) / len(scales)] * len(scales) if together else scales
    direction = sign * torch.cat([d / s for d, s in zip(directions, scales)])
    return float(direction.square().mean()), 2 * direction / direction.numel()


def fake_gradient(folder, made, *, captions=CAPTIONS, sign=1, span=(0.0, 1.0), **plain):
    """-> (mean |eps_fake - eps|^2, its gradient for the fake's weights)."""
    model, errors = Plain(folder, made.fake, **plain), []
    for i, (t, eps) in enumerate(draws("vsd-fake", span)):
        a = alpha_bar(t)
        noisy = a**0.5 * made.latents[i : i + 1] + (1 - a) ** 0.5 * eps
        errors.append((model.fake(noisy, t, model.text(captions[i // K])) - sign * eps).square().mean())
    loss = sum(errors) / len(errors)
    return float(loss.detach()), dict(zip(model.own, torch.autograd.grad(loss, list(model.own.values()))))


def relative(got: dict, expected: dict) -> float:
    """Relative L2 error over all tensors together."""
    error = sum(float((got[k] - v).square().sum()) for k, v in expected.items())
    return math.sqrt(error / sum(float(v.square().sum()) for v in expected.values()))


TOLERANCE = 1e-3


def test_vsd_gradient_and_guidance(made, mini_sd):
    loss, gradient = vsd_gradient(mini_sd, made)
    assert made.loss == pytest.approx(loss, rel=TOLERANCE)
    assert relative({"z": made.gradient}, {"z": gradient}) < TOLERANCE


@pytest.mark.parametrize(
    "fault",
    [
        {"sign": -1},
        {"cfg": CFG + 1},  # guided + cfg (guided - unguided): another common form
        {"cfg": 1},  # no guidance
        {"negative": ""},
        {"captions": [*CAPTIONS[1:], CAPTIONS[0]]},
        {"span": (0.02, 0.98)},
        {"together": True},  # one scale for the batch
        {"lora_scale": 2},
        {"lora_scale": 0},
    ],
    ids=str,
)
def test_planted_faults_of_the_gradient_are_seen(fault, made, mini_sd):
    _, gradient = vsd_gradient(mini_sd, made, **fault)
    assert relative({"z": made.gradient}, {"z": gradient}) > 10 * TOLERANCE


def test_fake_loss_and_its_gradient(made, mini_sd):
    loss, gradient = fake_gradient(mini_sd, made)
    assert made.fake_loss == pytest.approx(loss, rel=TOLERANCE)
    assert set(made.fake_gradient) == set(gradient) and {w.dim() for w in gradient.values()} == {1, 2, 4}
    assert relative(made.fake_gradient, gradient) < TOLERANCE


@pytest.mark.parametrize(
    "fault",
    [{"sign": -1}, {"span": (0.02, 0.5)}, {"captions": CAPTIONS[::-1]}, {"lora_scale": 2}, {"lora_scale": 0}],
    ids=str,
)
def test_planted_faults_of_the_fake_are_seen(fault, made, mini_sd):
    _, gradient = fake_gradient(mini_sd, made, **fault)
    assert relative(made.fake_gradient, gradient) > 10 * TOLERANCE


# ---- The way of a pretrained model through the command line


@pytest.mark.slow
def test_naosd_resumed_then_gdpo_then_merged(mini_sd, crops, tmp_path, monkeypatch):
    data = (f"--data.folder={crops}", "--data.crop_size=64", "--validation_images=0", "--model.lora_rank=2")
    naosd, gdpo, merged = (tmp_path / name for name in ("naosd", "gdpo", "merged"))
    first = ("naosd", *data, f"--model.pretrained={mini_sd}", f"--output_dir={naosd}", "--perceptual_weight=0")
    train(*first, "--max_train_steps=2")
    train(*first, "--max_train_steps=3", "--resume_from_checkpoint=latest")
    rows = [json.loads(line) for line in (naosd / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert all(r["vsd"] > 0 and r["vsd_fake"] > 0 and r["grad_norm"] > 0 and r["grad_norm/fake"] > 0 for r in rows)

    second = ("gdpo", *data, f"--model.pretrained={naosd / 'model'}", f"--output_dir={gdpo}", "--num_generations=2")
    train(*second, "--max_train_steps=2", "--learning_rate=1e-3", "--reward_funcs=[psnr_y,region_detail]")
    monkeypatch.setattr(sys, "argv", ["merge", str(gdpo / "model"), "--out", str(merged)])
    merge.main()

    plain, tuned, start = (OneStepGenerator.from_pretrained(f) for f in (merged, gdpo / "model", naosd / "model"))
    assert not lora.adapters(plain.unet) and lora.adapters(tuned.unet) and lora.adapters(start.vae)
    assert lora.adapters(start.unet) == ("default",), "the fake is no part of the model"
    z, eps = (normal((1, *SHAPE), 0, name) for name in ("z", "eps"))
    a, b, c = (g.predict(z, eps).x0 for g in (plain, tuned, start))
    assert float((a - b).norm() / b.norm()) < 1e-4 < 1e-3 < float((a - c).norm() / c.norm())
