"""The one-step generator against plain diffusers and transformers modules in float64, with the algebra written anew."""

import numpy as np
import pytest
import torch

from gdpo.generator import OneStepGenerator
from gdpo.model import lora, prompts

PROMPTS = ["clean photo", "sharp texture, high resolution", "blurry painting"]
SCALING = 0.18215


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


def alpha_bar(t: int) -> float:
    """Scaled-linear schedule from its definition, in numpy."""
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return float(np.prod(1 - beta[: t + 1]))


class Plain:
    """The parts of a folder as diffusers and transformers load them, in float64, and the method's equations."""

    def __init__(self, folder):
        from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        self.tiny = "AutoencoderTiny" in (folder / "vae" / "config.json").read_text()
        self.vae = (AutoencoderTiny if self.tiny else AutoencoderKL).from_pretrained(folder / "vae").double()
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").double()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").double()

    @torch.no_grad()
    def text(self, prompt: str) -> torch.Tensor:
        ids = self.tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        return self.text_encoder(ids.input_ids).last_hidden_state

    @torch.no_grad()
    def encode(self, images):
        if self.tiny:
            return self.vae.encoder(images)
        moments = self.vae.quant_conv(self.vae.encoder(images))
        return moments[:, :4] * SCALING

    @torch.no_grad()
    def predict(self, latents, noise, text, t_n=250, t_d=100):
        noisy = alpha_bar(t_n) ** 0.5 * latents + (1 - alpha_bar(t_n)) ** 0.5 * noise
        eps = self.unet(noisy, torch.tensor(t_d), encoder_hidden_states=text).sample
        return eps, (noisy - (1 - alpha_bar(t_d)) ** 0.5 * eps) / alpha_bar(t_d) ** 0.5

    @torch.no_grad()
    def decode(self, x0):
        if self.tiny:
            return self.vae.decoder(x0).clamp(-1, 1)
        return self.vae.decoder(self.vae.post_quant_conv(x0 / SCALING)).clamp(-1, 1)


@pytest.fixture(scope="module")
def inputs():
    """(images [3,3,64,128] in [-1,1], noise [3,4,8,16]), float64."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 64, 128, dtype=torch.float64, generator=generator) * 2 - 1
    return images, torch.randn(3, 4, 8, 16, dtype=torch.float64, generator=generator)


@pytest.fixture(params=["kl", "taesd"])
def folder(request, mini_sd, mini_sd_taesd):
    return mini_sd if request.param == "kl" else mini_sd_taesd


@pytest.mark.parametrize("timesteps", [(250, 100), (60, 999), (0, 0)])
def test_encode_predict_decode_match_plain_modules(folder, inputs, timesteps):
    images, noise = inputs
    plain = Plain(folder)
    generator = OneStepGenerator.from_pretrained(folder, *timesteps).double()
    text = torch.cat([plain.text(p) for p in PROMPTS])
    with torch.no_grad():
        latents = generator.encode(images)
        noise_pred, x0 = generator.predict(latents, noise, text)
        sr = generator.decode(x0)
    expected_latents = plain.encode(images)
    expected_noise, expected_x0 = plain.predict(expected_latents, noise, text, *timesteps)
    assert relative(latents, expected_latents) < 1e-12
    assert relative(noise_pred, expected_noise) < 1e-10
    assert relative(x0, expected_x0) < 1e-10
    assert relative(sr, plain.decode(expected_x0)) < 1e-10
    # Teeth: timesteps one off would be seen.
    t_n, t_d = timesteps
    assert relative(x0, plain.predict(expected_latents, noise, text, t_n + 1, t_d)[1]) > 1e-6
    assert relative(x0, plain.predict(expected_latents, noise, text, t_n, abs(t_d - 1))[1]) > 1e-6


def test_the_default_timesteps_are_the_papers_and_the_schedule_is_diffusers(mini_sd, inputs):
    from diffusers import DDPMScheduler

    generator = OneStepGenerator.from_pretrained(mini_sd)
    assert (generator.t_noise, generator.t_diffusion) == (250, 100)
    assert generator.a_n == pytest.approx(alpha_bar(250), rel=1e-12)
    assert generator.a_d == pytest.approx(alpha_bar(100), rel=1e-12)
    # The released code: add_noise at t_noise, then one step of a one-step schedule at t_diffusion (float32 inside).
    _, noise = inputs
    latents = noise.flip(0)
    scheduler = DDPMScheduler.from_pretrained(mini_sd / "scheduler")
    noisy = scheduler.add_noise(latents, noise, torch.tensor([250]))
    text = generator.double().text_embeds(3)
    with torch.no_grad():
        eps, x0 = generator.predict(latents, noise, text)
        expected = generator.unet(noisy, 100, text).sample
    scheduler.set_timesteps(timesteps=[100])
    assert relative(eps, expected) < 1e-5
    assert relative(x0, scheduler.step(eps, 100, noisy).prev_sample) < 1e-5


def test_a_sampled_posterior_is_mean_plus_std_times_noise(mini_sd, inputs):
    images, _ = inputs
    plain, generator = Plain(mini_sd), OneStepGenerator.from_pretrained(mini_sd).double()
    with torch.no_grad():
        mean, log_variance = plain.vae.quant_conv(plain.vae.encoder(images)).chunk(2, dim=1)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            draw = torch.randn(mean.shape, dtype=torch.float64)
            torch.manual_seed(3)
            got = generator.encode(images, sample_posterior=True)
    assert relative(got, (mean + (log_variance.clamp(-30, 20) / 2).exp() * draw) * SCALING) < 1e-12


def test_three_pictures_meet_their_own_prompts(mini_sd, inputs):
    images, noise = inputs
    plain, generator = Plain(mini_sd), OneStepGenerator.from_pretrained(mini_sd)
    text = generator.prompt_encoder([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert torch.equal(text[0], text[2]) and relative(text[1], plain.text(PROMPTS[1])[0]) < 1e-5
    text = generator.prompt_encoder(PROMPTS)
    for row, prompt in zip(text, PROMPTS):
        assert relative(row, plain.text(prompt)[0]) < 1e-5
    generator.double()
    with torch.no_grad():
        together = generator.predict(generator.encode(images), noise, text.double()).x0
    for i, prompt in enumerate(PROMPTS):
        one = slice(i, i + 1)
        alone = plain.predict(plain.encode(images[one]), noise[one], plain.text(prompt))[1]
        assert relative(together[one], alone) < 1e-6
        other = plain.predict(plain.encode(images[one]), noise[one], plain.text(PROMPTS[i - 1]))[1]
        assert relative(together[one], other) > 1e-4  # teeth: a neighbour's prompt would be seen


def test_the_fixed_prompt_is_the_folders_own_embedding(mini_sd):
    generator = OneStepGenerator.from_pretrained(mini_sd)
    expected = Plain(mini_sd).text("clean, high-resolution, 8k")
    assert relative(generator.text_embeds(2), expected.expand(2, -1, -1)) < 1e-5


@pytest.fixture
def adapted(mini_sd):
    """(generator in float64 with a UNet LoRA of rank 3 and alpha 5 and a trained conv_in, all weights non-zero)."""
    generator = OneStepGenerator.from_pretrained(mini_sd)
    lora.add(generator.unet, 3, lora.UNET_TARGETS, alpha=5, train_whole=("conv_in",))
    draws = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in lora.parameters(generator.unet).values():
            p.add_(0.05 * torch.randn(p.shape, generator=draws))
    return generator.double()


def with_lora(plain: Plain, adapted: OneStepGenerator, strength: float) -> Plain:
    """Fold the adapter's numbers into a plain UNet: W + strength * alpha/rank * B A, entry by entry of the rank."""
    own = {name: p.detach() for name, p in lora.parameters(adapted.unet).items()}
    weights = dict(plain.unet.named_parameters())
    with torch.no_grad():
        for name, a in own.items():
            if ".lora_A." in name:
                b = own[name.replace("lora_A", "lora_B")]
                w = weights[name.replace(".lora_A.default", "")]
                delta = sum(torch.outer(b.reshape(-1, 3)[:, r], a[r].flatten()) for r in range(3))
                w += strength * 5 / 3 * delta.reshape(w.shape)
            elif "modules_to_save" in name:
                w = weights[name.replace(".modules_to_save.default", "")]
                w += strength * (a - w)
    return plain


def test_lora_on_and_off_and_merged(adapted, mini_sd, inputs):
    images, noise = inputs
    text = torch.cat([Plain(mini_sd).text(p) for p in PROMPTS])
    base, policy = Plain(mini_sd), with_lora(Plain(mini_sd), adapted, 1.0)
    latents = base.encode(images)
    expected_on, expected_off = (plain.predict(latents, noise, text)[0] for plain in (policy, base))
    with torch.no_grad():
        on = adapted.predict(latents, noise, text).noise_pred
        with adapted.reference():
            off = adapted.predict(latents, noise, text).noise_pred
        with pytest.raises(KeyError), adapted.reference():
            raise KeyError
        again = adapted.predict(latents, noise, text).noise_pred
    assert relative(expected_on, expected_off) > 1e-2  # teeth: the adapter does something
    assert relative(on, expected_on) < 1e-10
    assert relative(off, expected_off) < 1e-12
    assert torch.equal(on, again), "after the reference, also after an error, the LoRA is on again"

    half = with_lora(Plain(mini_sd), adapted, 0.5).predict(latents, noise, text)[0]
    with pytest.raises(ValueError, match="only a plain LoRA can be scaled"):  # conv_in is trained whole
        lora.scale(adapted.unet, 0.5)
    with torch.no_grad():
        merged = adapted.merge_lora(0.5).predict(latents, noise, text).noise_pred
    assert relative(merged, half) < 1e-10 and not lora.adapters(adapted.unet)


def test_a_fresh_lora_changes_nothing_and_every_gradient_reaches_it(mini_sd, inputs):
    images, noise = inputs
    generator = OneStepGenerator.from_pretrained(mini_sd).double()
    text, latents = generator.text_embeds(3), generator.encode(images)
    with torch.no_grad():
        before = generator.predict(latents, noise, text).noise_pred
    lora.add(generator.unet, 2, lora.UNET_TARGETS)
    generator.double().requires_grad_(False)
    own = lora.parameters(generator.unet)
    for p in own.values():
        p.requires_grad_(True)
    after = generator.predict(latents, noise, text).noise_pred
    assert relative(after, before) < 1e-12
    after.square().sum().backward()
    assert {name for name, p in generator.named_parameters() if p.grad is not None} == {f"unet.{n}" for n in own}
    assert all(p.grad.abs().sum() > 0 for name, p in own.items() if "lora_B" in name)


def test_a_saved_folder_predicts_the_same_and_remembers_its_timesteps(adapted, mini_sd, inputs, tmp_path):
    images, noise = (x.float() for x in inputs)
    adapted.float()
    adapted.t_noise, adapted.t_diffusion = 200, 80
    adapted.save_pretrained(tmp_path / "saved")
    loaded = OneStepGenerator.from_pretrained(tmp_path / "saved")
    assert (loaded.t_noise, loaded.t_diffusion) == (200, 80)
    expected = with_lora(Plain(mini_sd), adapted.double(), 1.0)
    text = expected.text("clean, high-resolution, 8k").expand(3, -1, -1)
    with torch.no_grad():
        got = loaded.predict(loaded.encode(images), noise).x0
    assert relative(got, expected.predict(expected.encode(inputs[0]), inputs[1], text, 200, 80)[1]) < 1e-5


def test_the_tiny_preset_solves_the_same_equation_the_other_way(inputs):
    generator = OneStepGenerator.tiny().double()
    images, _ = inputs
    noise = torch.randn(3, 48, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    condition = noise.flip(0)
    with torch.no_grad():
        latents = generator.encode(images)
        for name, p in generator.unet.named_parameters():  # a fresh tiny UNet returns zero; make it say something
            p.add_(0.02 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(len(name))))
        for given in (None, condition):
            eps, x0 = generator.predict(latents, noise, condition=given)
            c = latents if given is None else given
            a_n, a_d = alpha_bar(generator.t_noise), alpha_bar(generator.t_diffusion)
            noisy = a_n**0.5 * latents + (1 - a_n) ** 0.5 * noise
            residual = generator.unet(torch.cat([noisy, c], dim=1), generator.t_diffusion).sample
            assert residual.abs().max() > 1e-3  # teeth
            assert relative(x0, c + residual) < 1e-12
            assert relative((noisy - (1 - a_d) ** 0.5 * eps) / a_d**0.5, x0) < 1e-10
    # The codec is a permutation of pixels: exact both ways.
    blocks = images.reshape(3, 3, 16, 4, 32, 4).permute(0, 1, 3, 5, 2, 4).reshape(3, 48, 16, 32)
    assert torch.equal(latents, blocks) and torch.equal(generator.decode(latents), images)


def test_many_prompts_do_not_fill_the_memory(mini_sd, monkeypatch):
    """The newest embeddings are kept, those in use among them; a forgotten one is encoded again, to the same bits."""
    monkeypatch.setattr(prompts, "_CACHED", 3)
    encoder = prompts.PromptEncoder(mini_sd)
    first = encoder(["a", "b"])
    encoder(["a"])
    encoder(["c", "d"])
    assert list(encoder._cache) == ["a", "c", "d"]
    assert encoder(["a", "b", "c", "d", "e"]).shape[0] == 5, "a batch larger than the cache"
    assert torch.equal(encoder(["a", "b"]), first)
    assert len(encoder._cache) == 3
