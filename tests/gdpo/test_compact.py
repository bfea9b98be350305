"""The compact network: it starts as the published one; saved, exported, brought back it stays the same."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import onnx
import pytest
import torch
import torch.nn.functional as F

from engine import Upscaler
from engine.export import graphs
from engine.export.generator import export_generator
from engine.io.files import sha256
from engine.runtime import manifest
from engine.runtime.upscaler import SHIPPED
from gdpo.degradation.resize import resize
from gdpo.generator import OneStepGenerator
from gdpo.model import lora
from gdpo.model.compact import (
    GRAIN,
    CompactUNet,
    CompactUNetConfig,
    EvenConv2d,
    mirrored,
    rebase,
    recovery,
    start_from,
)
from gdpo.model.compact_step import CompactStep, unet_weights
from gdpo.model.exported import from_export
from gdpo.model.ncnn import CompactNet
from gdpo.photos.drawn import small_pictures

SHAPE = CompactUNetConfig(width=12, layers=2)


@pytest.fixture
def published() -> CompactNet:
    """A compact network with the layers of a published one, narrower."""
    rng = torch.Generator().manual_seed(3)

    def normal(*shape, scale):
        return torch.randn(*shape, generator=rng) * scale

    layers = []
    for out, channels in ((12, 3), (12, 12), (12, 12), (48, 12)):
        layers += [(normal(out, channels, 3, 3, scale=0.4 / math.sqrt(channels)), normal(out, scale=0.1))]
        layers += [(normal(out, scale=0.2),)] if out == 12 else []
    return CompactNet(layers)


def layers_of(network: CompactNet) -> list[tuple[torch.Tensor, ...]]:
    return [tuple(layer) for layer in network.layers]


@pytest.fixture
def generator(published) -> OneStepGenerator:
    made = OneStepGenerator.tiny(SHAPE, seed=1)
    start_from(made.unet, layers_of(published), a_noise=made.a_n)
    return made.requires_grad_(False).eval()


def smooth(*shape: int) -> torch.Tensor:
    """Pictures in [0.2,0.8], so that bicubic's overshoot is not clipped."""
    x = torch.rand(*shape, generator=torch.Generator().manual_seed(0))
    return 0.2 + 0.6 * x


def upsampled(lr: torch.Tensor) -> torch.Tensor:
    return resize(lr, (4 * lr.shape[2], 4 * lr.shape[3]), "bicubic_antialias").clamp(0, 1) * 2 - 1


def test_the_lr_is_recovered_from_its_bicubic_picture():
    lr = smooth(1, 3, 24, 24)
    back = F.conv2d(F.pixel_unshuffle(upsampled(lr), 4), recovery(), padding=1) / 2 + 0.5
    assert (back - lr)[..., 2:-2, 2:-2].abs().max() < 0.01
    wrong = F.conv2d(F.pixel_unshuffle(upsampled(lr).flip(1), 4), recovery(), padding=1) / 2 + 0.5
    assert (wrong - lr).abs().mean() > 0.05  # teeth: the channels' order


def test_without_noise_it_starts_as_the_published_network(generator, published):
    lr = smooth(1, 3, 24, 24)
    latents = generator.encode(upsampled(lr))
    x0 = generator.predict(latents, torch.zeros_like(latents)).x0
    drawn, theirs = generator.codec.decode(x0) / 2 + 0.5, published(lr)
    assert (drawn - theirs)[..., 20:-20, 20:-20].abs().max() < 0.02
    assert (theirs - F.interpolate(lr, scale_factor=4)).abs().mean() > 0.05  # teeth: the network does something


def test_rebased_it_draws_the_same_on_bicubic():
    """Of a network whose last features hold the LR, as a trained one's do."""
    made = OneStepGenerator.tiny(CompactUNetConfig(width=24, layers=1), seed=1).requires_grad_(False)
    torch.manual_seed(0)
    layers = [(torch.randn(24, 3, 3, 3) * 0.2, torch.randn(24)), (torch.ones(24),)]
    layers += [(torch.randn(24, 24, 3, 3) * 0.1, torch.randn(24)), (torch.ones(24),)]
    layers += [(torch.randn(48, 24, 3, 3) * 0.01, torch.zeros(48))]
    start_from(made.unet, layers, a_noise=made.a_n)
    latents = made.encode(upsampled(small_pictures(2, side=32, seed=7)))
    zero = torch.zeros_like(latents)
    before, base = made.predict(latents, zero).x0, made.unet.base.weight.clone()
    rebase(made.unet, small_pictures(16))
    after = made.predict(latents, zero).x0
    assert not torch.equal(made.unet.base.weight, base)
    assert (after - before)[..., 4:-4, 4:-4].square().mean().sqrt() < 0.01
    assert (before - latents).square().mean().sqrt() > 0.05  # teeth: the network does something


def test_a_fresh_one_draws_bicubic():
    fresh = OneStepGenerator.tiny(SHAPE)
    image = upsampled(smooth(1, 3, 24, 24))
    latents = fresh.encode(image)
    drawn = fresh.decode(fresh.predict(latents, torch.zeros_like(latents)).x0)
    assert (drawn - image)[..., 12:-12, 12:-12].abs().mean() < 0.15  # of an LR taken for the mean of four pixels
    start_from_recovery = F.conv2d(latents, recovery(), padding=1)
    again = F.pixel_shuffle(fresh.unet.base(start_from_recovery), 4)
    assert (again - image[..., 8:-8, 8:-8])[..., 8:-8, 8:-8].abs().max() < 0.02


def test_the_noise_arrives_as_grain_of_the_lr(generator):
    rng = torch.Generator().manual_seed(5)
    latents = generator.encode(upsampled(smooth(1, 3, 32, 32)))
    noise = torch.randn(latents.shape, generator=rng)
    noisy = math.sqrt(generator.a_n) * latents + math.sqrt(generator.b_n) * noise
    grain = generator.unet.grain(torch.cat([noisy, latents], 1)) / 2
    pooled = noise.unflatten(1, (3, 16)).mean(2) * 4
    assert torch.allclose(grain, GRAIN * pooled, atol=1e-5)


def test_layers_of_another_network_are_refused(published):
    with pytest.raises(ValueError, match="7 layers are not those of a compact network of 9"):
        start_from(CompactUNet(CompactUNetConfig(width=12, layers=3)), layers_of(published), a_noise=0.9)


def test_saved_and_loaded_with_a_lora_it_is_the_same(generator, tmp_path):
    latents, noise = torch.randn(1, 48, 8, 12), torch.randn(1, 48, 8, 12)
    lora.add(generator.unet, 2, generator.unet.lora_targets)
    for p in lora.parameters(generator.unet).values():
        torch.nn.init.normal_(p, std=0.1)
    expected = generator.predict(latents, noise).x0
    with generator.reference():
        assert (generator.predict(latents, noise).x0 - expected).abs().max() > 1e-3  # teeth
    generator.save_pretrained(tmp_path / "model")
    loaded = OneStepGenerator.from_pretrained(tmp_path / "model")
    assert isinstance(loaded.unet, CompactUNet) and loaded.unet.config == SHAPE
    assert torch.equal(loaded.predict(latents, noise).x0, expected)
    lora.scale(loaded.unet, 0.5)
    assert (loaded.predict(latents, noise).x0 - expected).abs().max() > 1e-3
    assert torch.allclose(loaded.merge_lora(2).predict(latents, noise).x0, expected, atol=1e-5)


def test_even_features_draw_no_lattice():
    torch.manual_seed(0)
    even, plain = EvenConv2d(12, 48, 3, bias=False), torch.nn.Conv2d(12, 48, 3, bias=False)
    even.load_state_dict(plain.state_dict())
    features = torch.randn(1, 12, 1, 1).expand(-1, -1, 8, 8)  # a texture's mean
    assert F.pixel_shuffle(even(features), 4).std((2, 3)).max() < 1e-6
    assert F.pixel_shuffle(plain(features), 4).std((2, 3)).min() > 0.1  # teeth
    edge = torch.randn(1, 12, 1, 1) * (torch.arange(8) > 3)
    assert F.pixel_shuffle(even(edge.expand(-1, -1, 8, 8)), 4).std((2, 3)).min() > 0.1  # free at edges


def test_any_timestep_will_do_and_the_noise_counts(generator):
    sample = torch.randn(2, 96, 8, 8)
    first = generator.unet(sample, 50).sample
    assert torch.equal(first, generator.unet(sample, torch.tensor([10, 900])).sample)
    assert (first - generator.unet(sample + 0.5 * torch.randn_like(sample), 50).sample).abs().max() > 1e-3


def test_an_export_is_equal_and_comes_back(generator, tmp_path):
    latents, noise = torch.randn(1, 48, 16, 16), torch.randn(1, 48, 16, 16)
    expected = generator.predict(latents, noise).x0
    export_generator(generator, tmp_path / "engine")  # checks parity with torch
    back = from_export(tmp_path / "engine")
    assert isinstance(back.unet, CompactUNet) and back.unet.config == SHAPE
    assert torch.allclose(back.predict(latents, noise).x0, expected, atol=1e-6)
    picture = Upscaler.load(tmp_path / "engine").upscale((smooth(20, 16, 3) * 255).byte().numpy())
    assert picture.shape == (80, 64, 3)
    file = tmp_path / "engine" / "generator.onnx"
    model = onnx.load(file)
    for names in (model.graph.initializer, model.graph.node):
        for part in names:
            if part.name == "step.recover.weight":
                part.name = "step.unet.recover.weight"
            for i, name in enumerate(getattr(part, "input", ())):
                part.input[i] = name.replace("step.recover", "step.unet.recover")
    onnx.save(model, file)
    about = manifest.load(tmp_path / "engine")
    graph = replace(about.graphs["generator"], sha256=sha256(file))
    replace(about, graphs={"generator": graph}).save(tmp_path / "engine")
    with pytest.raises(ValueError, match="is the export of an earlier version"):
        from_export(tmp_path / "engine")


def test_slopes_split_into_convolutions_give_the_same_picture_and_come_back(generator, tmp_path):
    slopes = torch.tensor([1.6, 1.0, 0.0, -0.7, 1.01, 0.999, 3.0, -2.0, 0.5, 0.25, 1.2, -0.1])
    for act in generator.unet.acts:
        act.weight.copy_(slopes)
    unet = copy.deepcopy(generator.unet).double()
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    sample = torch.randn(2, 96, 9, 7, dtype=torch.float64)
    expected = unet(sample, 50).sample
    unet.split_slopes()
    assert torch.allclose(unet(sample, 50).sample, expected, rtol=0, atol=1e-12)
    joined = CompactUNet.join_slopes(unet.state_dict())
    assert joined.keys() == before.keys()
    assert all(torch.allclose(joined[name], weight, rtol=0, atol=1e-12) for name, weight in before.items())
    export_generator(generator, tmp_path / "engine")
    graph = onnx.load(tmp_path / "engine" / "generator.onnx").graph
    assert not [node for node in graph.node if node.op_type == "PRelu"]
    back = from_export(tmp_path / "engine").unet
    assert all(torch.allclose(act.weight, slopes, atol=1e-6) for act in back.acts)


def test_beyond_the_border_it_is_what_beyond_says(generator):
    """On an even picture whose features these are, there is no border."""
    unet, even = generator.unet, torch.zeros(1, 48, 9, 7)
    drawn = unet(torch.cat([even, even], 1), 50).sample
    assert (drawn - drawn[..., 4:5, 3:4]).abs().max() < 1e-6  # grey, which a new one starts with
    unet.beyond.zero_()
    framed = unet(torch.cat([even, even], 1), 50).sample
    assert (framed - drawn).abs().amax((0, 1))[0].min() > 1e-3  # teeth: zeros are seen at the border
    shade = torch.full((1, 6, 9, 7), -0.4)
    unet.measure_beyond(shade)
    assert torch.allclose(unet.features(shade), unet.features(shade)[..., 2:3, 2:3].expand(-1, -1, 7, 5), atol=1e-6)


def test_a_mirror_is_at_the_border():
    picture = torch.rand(2, 3, 2, 5, generator=torch.Generator().manual_seed(2))
    found = mirrored(picture, 3)
    assert found.shape == (2, 3, 8, 11)
    assert torch.equal(found[:, :, 3:5, :3], picture[..., :3].flip(3))
    assert torch.equal(found[:, :, :3, 3:8], picture[:, :, [1, 1, 0]])  # of two rows the second is repeated
    large = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(3))
    latents = mirrored(F.pixel_unshuffle(large, 4), 1, unshuffled=True)
    assert torch.equal(F.pixel_shuffle(latents, 4), mirrored(large, 4))


def test_weights_from_before_the_border_are_read(generator, tmp_path):
    old = {name: weight for name, weight in generator.unet.state_dict().items() if name != "beyond"}
    made = CompactUNet(SHAPE)
    made.load_state_dict(old)
    assert torch.allclose(made.beyond, generator.unet.beyond, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"Missing key.*conv_in\.bias"):
        made.load_state_dict({name: weight for name, weight in old.items() if name != "conv_in.bias"})


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (7, 5)])
def test_the_step_of_an_export_is_the_definition_and_comes_back(generator, size):
    rng = torch.Generator().manual_seed(8)
    for parameter in generator.unet.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    latent, noise = torch.randn(2, 2, 48, *size, generator=rng)
    expected = generator.predict(latent, noise).x0
    graphs.fold(generator)
    before = {name: weight.clone() for name, weight in generator.unet.state_dict().items()}
    for split in (False, True):
        if split:
            generator.unet.split_slopes()
        step = graphs.step_of(generator, "fp32")
        assert isinstance(step, CompactStep)
        assert torch.allclose(step(latent, noise), expected, rtol=1e-5, atol=1e-5)
    back = unet_weights(step.state_dict(), math.sqrt(generator.a_n), math.sqrt(generator.b_n))
    assert back.keys() == before.keys()
    assert all(torch.allclose(back[name], weight, rtol=1e-5, atol=1e-5) for name, weight in before.items())


def test_a_config_of_another_network_is_named():
    with pytest.raises(ValueError, match="is not a CompactUNet's"):
        CompactUNet.from_config({"_class_name": "CompactUNet", "heads": 3})


def test_the_bundled_model_can_be_trained_on():
    assert from_export(SHIPPED).unet.config == CompactUNetConfig(inner_width=48)
    assert "BSD 3-Clause License, Copyright (c) 2021, Xintao Wang" in (SHIPPED / "README.md").read_text("utf-8")


def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradients():
    def trained(saving):
        torch.manual_seed(4)
        unet = CompactUNet(CompactUNetConfig(width=12, layers=15))
        torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
        if saving:
            unet.enable_gradient_checkpointing()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            made = unet(torch.randn(2, 96, 16, 16), 0).sample
        made.square().mean().backward()
        return sum(kept), [p.grad for p in unet.parameters()]

    (much, plain), (little, saved) = trained(False), trained(True)
    assert little < 0.6 * much
    assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))
