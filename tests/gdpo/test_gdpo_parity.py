"""One GDPO step against an independent float64 computation of the paper's formulas with plain modules.

The step under test is gdpo.train.methods.gdpo.GDPO.step on three pictures with three prompts; the other side shares
only its inputs: the crops, the degraded pictures, the noise of each (stream, sample, group index), the weights on the
disk.
"""

import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from skimage import data as photos

from gdpo.degradation import Degradation
from gdpo.photos.dataset import Batch
from gdpo.randomness import normal
from gdpo.train.config import GDPOConfig
from gdpo.train.options import DataConfig, ModelConfig

B, G, BETA, RANK, ALPHA, SEED = 3, 4, 5000.0, 3, 5, 11
CAPTIONS = ["sharp texture", "blurry painting", "clean photo"]
SAMPLES = [5, 17, 4]
SCALING = 0.18215


def edges(samples, target):
    """A no-reference score of the user's own: mean absolute horizontal difference of the red channel."""
    return samples[:, 0].diff(dim=-1).abs().mean(dim=(1, 2))


@pytest.fixture(scope="module")
def batch():
    astronaut, coffee, cat = photos.astronaut(), photos.coffee(), photos.chelsea()
    crops = [astronaut[100:164, 180:244], coffee[250:314, 60:124], cat[120:184, 160:224]]
    hr = torch.tensor(np.stack(crops), dtype=torch.float32).permute(0, 3, 1, 2) / 255
    return Batch(["a.png", "b.png", "c.png"], CAPTIONS, SAMPLES, hr)


@pytest.fixture
def taken(batch, mini_sd, monkeypatch):
    """What one step of the code under test did: its advantage, metrics, gradients, and its LoRA weights before."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from gdpo.train.methods import gdpo as module

    monkeypatch.setitem(sys.modules, "parity_reward", ModuleType("parity_reward"))
    sys.modules["parity_reward"].edges = edges
    sys.modules["parity_reward"].constant = lambda samples, target: torch.ones(len(samples))
    AcceleratorState._reset_state(reset_partial_state=True)

    def take(weights_scale=0.001, **options) -> SimpleNamespace:
        config = GDPOConfig(
            seed=SEED,
            model=ModelConfig(pretrained=str(mini_sd), lora_rank=RANK, lora_alpha=ALPHA),
            data=DataConfig(captions=True, crop_size=64),
            num_generations=G,
            beta=BETA,
            mixed_precision="no",
            backend="torch",
            **({"reward_funcs": ["psnr_y", "parity_reward:edges"]} | options),
        )
        method = module.GDPO(config, Accelerator(cpu=True, mixed_precision="no"))
        draws = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in method.trained.values():
                p.add_(weights_scale * torch.randn(p.shape, generator=draws))
        seen = {}

        def spy(*arguments, **named):
            seen["advantage"] = arguments[3]
            return loss_function(*arguments, **named)

        loss_function = module.gdpo_loss
        monkeypatch.setattr(module, "gdpo_loss", spy)
        metrics = method.step(batch, 0, lambda loss: loss.backward())
        gradients = {name: p.grad.double() for name, p in method.trained.items()}
        weights = {name: p.detach().double() for name, p in method.trained.items()}
        _, lr_up = Degradation(config.degradation)(batch.hr, seed=SEED, step=0, samples=SAMPLES)
        return SimpleNamespace(
            metrics=metrics,
            gradients=gradients,
            weights=weights,
            advantage=seen.get("advantage", torch.zeros(0)).double(),  # only gdpo has this loss
            lr_up=lr_up.double(),
            prompt=method.generator.prompt,
        )

    yield take
    AcceleratorState._reset_state(reset_partial_state=True)


# ---- The independent side


def alpha_bar(t: int) -> float:
    return math.prod(1 - (0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2 for i in range(t + 1))


def texture_mask(gray: np.ndarray) -> np.ndarray:
    """Complexity > 50, from the definition in the design: patch, resize to 64, Sobel, histogram, entropy, area."""
    mask = np.zeros(gray.shape, bool)
    for top in range(0, gray.shape[0], 10):
        for left in range(0, gray.shape[1], 10):
            patch = gray[top : top + 10, left : left + 10]
            h, w = patch.shape
            y, x = ((np.arange(64) + 0.5) * n / 64 - 0.5 for n in (h, w))
            y, x = np.clip(y, 0, h - 1), np.clip(x, 0, w - 1)
            rows = np.stack([np.interp(y, np.arange(h), column) for column in patch.T], axis=1)
            large = np.pad(np.stack([np.interp(x, np.arange(w), row) for row in rows]), 1, mode="edge")
            dx, dy = np.zeros((64, 64)), np.zeros((64, 64))
            for i, weight in enumerate((1, 2, 1)):
                dx += weight * (large[i : i + 64, 2:] - large[i : i + 64, :-2])
                dy += weight * (large[2:, i : i + 64] - large[:-2, i : i + 64])
            counts, _ = np.histogram(np.hypot(dx, dy), bins=512, range=(-5.5, 5.5))
            p = counts / (counts.sum() + 1e-5)
            mask[top : top + 10, left : left + 10] = -(p * np.log2(p + 1e-10)).sum() * h * w > 50
    return mask


def advantages(samples: np.ndarray, hr: np.ndarray, *, swapped=False) -> np.ndarray:
    """samples [B,G,3,H,W], hr [B,3,H,W] in [0,1] -> [B,G]: attribute-aware reward, normalised in its group."""

    def unit(scores):
        return (scores - scores.min()) / (scores.max() - scores.min())

    luma = np.array([65.481, 128.553, 24.966]) / 255
    result = []
    for group, truth in zip(samples, hr):
        texture = round(texture_mask(np.tensordot([0.299, 0.587, 0.114], truth, 1)).mean(), 2)
        texture = 1 - texture if swapped else texture
        errors = np.tensordot(luma, group - truth, (0, 1))  # [G,H,W]
        psnr = np.array([-10 * np.log10((e**2).mean()) for e in errors])
        edge = np.array([np.abs(np.diff(2 * s[0], axis=-1)).mean() for s in group])
        reward = (1 - texture) * unit(psnr) + texture * unit(edge)
        result.append((reward - reward.mean()) / (reward.std(ddof=1) + 1e-8))
    return np.stack(result)


class Expected:
    """The step by the paper's formulas: float64, one picture and one sample at a time."""

    def __init__(self, folder, taken, hr, captions=CAPTIONS, normalise=advantages):
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").double().requires_grad_(False)
        vae = AutoencoderKL.from_pretrained(folder / "vae").double().requires_grad_(False)
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").double().requires_grad_(False)

        def encode(image):
            return vae.encode(image).latent_dist.mean * SCALING

        own = {name: w.clone().requires_grad_(True) for name, w in taken.weights.items()}
        policy = self._policy_weights(own)
        self.margins, images, errors = [], [], []
        for b in range(B):
            words = tokenizer(f"{captions[b]}, {taken.prompt}", padding="max_length", max_length=77, truncation=True)
            text = text_encoder(torch.tensor([words.input_ids])).last_hidden_state
            condition = encode(taken.lr_up[b : b + 1] * 2 - 1)
            for g in range(G):
                eps = normal((4, 8, 8), SEED, "sample", SAMPLES[b], g).double()[None]
                noisy = self._noised(condition, eps)
                x0 = (noisy - (1 - alpha_bar(100)) ** 0.5 * self._unet(None, noisy, text)) / alpha_bar(100) ** 0.5
                image = vae.decode(x0 / SCALING).sample.clamp(-1, 1)
                images.append(image)
                fresh = normal((4, 8, 8), SEED, "loss", SAMPLES[b], g).double()[None]
                noisy = self._noised(encode(image), fresh)
                errors.append([(self._unet(w, noisy, text) - fresh).square().mean() for w in (policy, None)])
        stacked = torch.cat(images).unflatten(0, (B, G)) / 2 + 0.5
        self.advantage = torch.tensor(normalise(stacked.numpy(), hr.double().numpy()))
        m, r = (torch.stack([e[i] for e in errors]).view(B, G) for i in (0, 1))
        margin = -BETA / 2 * ((self.advantage * m).sum(1) - (self.advantage * r).sum(1))
        loss = torch.log(1 + torch.exp(-margin)).mean()
        self.margin, self.loss = margin.detach(), float(loss.detach())
        self.gradients = dict(zip(own, torch.autograd.grad(loss, list(own.values()))))

    def _noised(self, latents, eps):
        return alpha_bar(250) ** 0.5 * latents + (1 - alpha_bar(250)) ** 0.5 * eps

    def _unet(self, weights, noisy, text):
        t = torch.tensor(100)
        if weights is None:
            return self.unet(noisy, t, text).sample
        return torch.func.functional_call(self.unet, weights, (noisy, t, text)).sample

    def _policy_weights(self, own):
        """W + alpha/rank * B A for linear and convolution layers."""
        weights = dict(self.unet.named_parameters())
        changed = {}
        for name, a in own.items():
            if ".lora_A." in name:
                target, b = name.replace(".lora_A.default", ""), own[name.replace("lora_A", "lora_B")]
                delta = torch.einsum("or,ri->oi", b.reshape(-1, RANK), a.reshape(RANK, -1))
                changed[target] = weights[target] + ALPHA / RANK * delta.reshape(weights[target].shape)
        return changed


def relative(got: dict, expected: dict) -> float:
    """Relative L2 error over all tensors together."""
    error = sum(float((got[k] - v).square().sum()) for k, v in expected.items())
    return math.sqrt(error / sum(float(v.square().sum()) for v in expected.values()))


def best_against_worst(samples, hr):
    """DPO as a group's special case: +1 for the best, -1 for the worst, nothing for the others."""
    advantage = advantages(samples, hr)
    result = np.zeros_like(advantage)
    np.put_along_axis(result, advantage.argmax(1)[:, None], 1, axis=1)
    np.put_along_axis(result, advantage.argmin(1)[:, None], -1, axis=1)
    return result


@pytest.mark.parametrize(
    ("options", "normalise"),
    [({}, advantages), ({"sample_batch_size": 5}, advantages), ({"algorithm": "diffusion_dpo"}, best_against_worst)],
    ids=["gdpo", "gdpo in chunks", "dpo"],
)
def test_advantage_loss_and_gradient(options, normalise, taken, batch, mini_sd):
    got = taken(**options)
    expected = Expected(mini_sd, got, batch.hr, normalise=normalise)
    assert set(got.gradients) == set(expected.gradients)
    assert {w.dim() for w in got.weights.values()} == {2, 4}, "linear and convolution layers"
    if "algorithm" not in options:
        torch.testing.assert_close(got.advantage, expected.advantage, rtol=0, atol=2e-4)
    assert 0.1 < expected.margin.abs().max() < 10, "margins that a sigmoid tells apart"
    assert float(got.metrics["rewards/margins"]) == pytest.approx(float(expected.margin.mean()), abs=5e-3)
    assert float(got.metrics["rewards/accuracies"]) == pytest.approx(float((expected.margin > 0).double().mean()))
    assert float(got.metrics["loss"]) == pytest.approx(expected.loss, abs=5e-3)
    assert relative(got.gradients, expected.gradients) < 2e-3


def short_of_memory(monkeypatch, at_most):
    """A GPU with room for so many latents, as far as predictions go; the sizes that were tried."""
    from gdpo.generator import OneStepGenerator

    tried, predict = [], OneStepGenerator.predict

    def bounded(self, latents, *inputs):
        if torch.is_grad_enabled():
            return predict(self, latents, *inputs)
        tried.append(len(latents))
        if len(latents) > at_most and len(inputs) == 2:  # sampling, not the reference of the loss
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return predict(self, latents, *inputs)

    monkeypatch.setattr(OneStepGenerator, "predict", bounded)
    return tried


def test_samples_come_in_batches_that_fit(taken, monkeypatch, capsys):
    whole = taken()
    tried = short_of_memory(monkeypatch, at_most=4)
    halved = taken()
    assert tried == [12, 6, 3, 3, 3, 3, 12]  # the reference of the loss goes whole, as the policy
    assert relative(halved.gradients, whole.gradients) < 1e-4
    assert "12 samples at once do not fit the GPU's memory: from now on 6" in capsys.readouterr().err


@pytest.mark.parametrize(("at_most", "options"), [(0, {}), (4, {"sample_batch_size": 5})], ids=["nothing", "fixed"])
def test_samples_that_cannot_fit_are_an_error(at_most, options, taken, monkeypatch):
    short_of_memory(monkeypatch, at_most)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        taken(**options)


def test_a_score_that_is_not_finite_is_named_behind_the_backward_pass(taken, monkeypatch):
    """As on a GPU, where nothing looks at values on the way."""
    monkeypatch.setattr("gdpo.kernels.checks._look", lambda value: False)
    sys.modules["parity_reward"].broken = lambda samples, target: samples.mean((1, 2, 3)) * float("inf")
    with pytest.raises(ValueError, match=r"reward 'parity_reward:broken' is -?inf for image 0, sample 0 of the batch"):
        taken(reward_funcs=["psnr_y", "parity_reward:broken"])


def swapped_prompts(folder, got, hr):
    """The released code's fault for more than one picture: prompts in another order than the pictures."""
    return Expected(folder, got, hr, captions=[*CAPTIONS[1:], CAPTIONS[0]])


def biased_std(folder, got, hr):
    """The standard deviation divided by G in place of G-1."""
    return Expected(folder, got, hr, normalise=lambda s, h: advantages(s, h) * math.sqrt(G / (G - 1)))


def swapped_shares(folder, got, hr):
    """Fidelity weighed by the textured share and perception by the smooth one."""
    return Expected(folder, got, hr, normalise=lambda s, h: advantages(s, h, swapped=True))


@pytest.mark.parametrize("fault", [swapped_prompts, biased_std, swapped_shares])
def test_planted_faults_are_seen(fault, taken, batch, mini_sd):
    got = taken()
    assert relative(got.gradients, fault(mini_sd, got, batch.hr).gradients) > 2e-2  # ten times the tolerance


def test_a_tie_teaches_nothing_and_is_no_nan(taken):
    got = taken(reward_funcs=["parity_reward:constant"])
    assert torch.equal(got.advantage, torch.zeros(B, G, dtype=torch.float64))
    assert float(got.metrics["loss"]) == pytest.approx(math.log(2), rel=1e-6)
    assert float(got.metrics["frac_reward_zero_std"]) == 1
    assert all(not g.any() for g in got.gradients.values())
