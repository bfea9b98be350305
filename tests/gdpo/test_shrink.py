"""Smaller networks from larger ones: what is redundant goes at no cost, and least squares makes up for the rest."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from engine import Upscaler
from engine.export.generator import export_generator
from gdpo import shrink as program
from gdpo.generator import OneStepGenerator
from gdpo.model.compact import CompactUNet, CompactUNetConfig
from gdpo.model.exported import from_export
from gdpo.model.network_unet import NetworkUNet
from gdpo.model.shrink import System, merge_blocks, narrow
from gdpo.model.spandrel_networks import Network
from gdpo.photos.drawn import small_pictures
from gdpo.shrink import shrink
from tests.gdpo.test_networks import rrdb

SHAPE = CompactUNetConfig(width=12, layers=4)


@torch.no_grad()
def compact(redundant: bool = False) -> CompactUNet:
    """A network that draws something; perhaps the second half of every second activation repeats the first."""
    rng = torch.Generator().manual_seed(7)
    unet = CompactUNet(SHAPE)
    for parameter in unet.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng) / max(1, parameter[0].numel()) ** 0.5)
    for i in range(1, SHAPE.layers + 1, 2) if redundant else ():
        for of_layer in (unet.convs[i - 1].weight, unet.convs[i - 1].bias, unet.acts[i].weight, unet.beyond[i]):
            of_layer[6:] = of_layer[:6]
    return unet.requires_grad_(False)


@pytest.fixture
def samples() -> torch.Tensor:
    return torch.randn(6, 96, 12, 12, generator=torch.Generator().manual_seed(2))


def off(small: torch.nn.Module, large: torch.nn.Module, samples: torch.Tensor) -> float:
    with torch.no_grad():
        drawn, wanted = small(samples, 0).sample, large(samples, 0).sample
    return float((drawn - wanted).square().mean().sqrt())


def test_channels_that_repeat_others_go_at_no_cost(samples):
    whole = compact(redundant=True)
    small = narrow(whole, samples, 6)
    assert small.config == replace(SHAPE, inner_width=6)
    assert [len(act.weight) for act in small.acts] == [12, 6, 12, 6, 12]
    assert off(small, whole, samples) < 1e-4 < 1e-2 < whole(samples, 0).sample.std()


def test_fewer_channels_cost_more_and_the_fit_costs_less_than_none(samples):
    whole = compact()
    errors = [off(narrow(whole, samples, width), whole, samples) for width in (11, 8, 4)]
    assert errors == sorted(errors) and errors[0] > 0
    small = narrow(whole, samples, 8)
    unfitted = CompactUNet(small.config)
    state = whole.state_dict()
    for i in (1, 3):
        kept = [int((state[f"convs.{i - 1}.bias"] == bias).nonzero()) for bias in small.convs[i - 1].bias]
        for name in (f"convs.{i - 1}.weight", f"convs.{i - 1}.bias", f"acts.{i}.weight"):
            state[name] = state[name][kept]
        state[f"convs.{i}.weight"] = state[f"convs.{i}.weight"][:, kept]
        state["beyond"] = state["beyond"].clone()
        state["beyond"][i] = torch.cat([state["beyond"][i, kept], torch.zeros(4)])
    unfitted.load_state_dict(state)
    assert off(small, whole, samples) < 0.7 * off(unfitted, whole, samples)


def test_the_system_gives_a_convolution_its_own_weights():
    rng = torch.Generator().manual_seed(4)
    conv = torch.nn.Conv2d(3, 5, 3).requires_grad_(False)
    system = System(3, 5)
    for _ in range(4):
        x = torch.randn(3, 10, 9, generator=rng)
        system.add(x, conv(x[None])[0])
    weight, bias = system.solve(ridge=0)
    assert torch.allclose(weight, conv.weight, atol=1e-5) and torch.allclose(bias, conv.bias, atol=1e-5)


@pytest.mark.parametrize("width", [0, 12, 13])
def test_a_width_that_is_none_is_refused(width, samples):
    with pytest.raises(ValueError, match=f"width must be above 0 and below the network's 12; got {width}"):
        narrow(compact(), samples, width)


def test_a_narrow_model_is_exported_and_comes_back(samples, tmp_path):
    generator = OneStepGenerator.tiny(SHAPE).requires_grad_(False)
    generator.unet = narrow(compact(), samples, 6)
    generator.save_pretrained(tmp_path / "model")
    again = OneStepGenerator.from_pretrained(tmp_path / "model")
    assert again.unet.config == generator.unet.config
    export_generator(again, tmp_path / "engine")
    back = from_export(tmp_path / "engine")
    assert back.unet.config == generator.unet.config
    assert off(back.unet, generator.unet, samples) < 1e-4
    picture = (small_pictures(1, 24)[0].permute(1, 2, 0) * 255).byte().numpy()
    assert Upscaler.load(tmp_path / "engine").upscale(picture).shape == (96, 96, 3)


def network(blocks: int = 3) -> NetworkUNet:
    torch.manual_seed(5)
    made = rrdb(4, blocks).requires_grad_(False).eval()
    return NetworkUNet(Network(made, "ESRGAN", 4, 1), {"file": "x", "sha256": "0"}, 0.9)


def pictures() -> torch.Tensor:
    return small_pictures(5, 20)


def apart(a: NetworkUNet, b: NetworkUNet, lrs: torch.Tensor) -> float:
    with torch.no_grad():
        return float((a.draw(lrs) - b.draw(lrs)).square().mean().sqrt())


def test_all_blocks_are_the_network_and_fewer_are_fitted():
    whole, lrs = network(), pictures()
    same = merge_blocks(whole, lrs, [1, 2, 3])
    small = merge_blocks(whole, lrs, [1, 3])
    assert sum(p.numel() for p in small.network.parameters()) < sum(p.numel() for p in whole.network.parameters())
    state = whole.network.state_dict()
    unfitted = network(2)
    unfitted.network.load_state_dict({k: state[k.replace("sub.2", "sub.3")] for k in unfitted.network.state_dict()})
    assert apart(same, whole, lrs) < 0.02 * apart(unfitted, whole, lrs)
    assert apart(small, whole, lrs) < 0.5 * apart(unfitted, whole, lrs)
    assert small.signal == whole.signal and small.source == whole.source


@pytest.mark.parametrize("ends", [[], [1, 2], [2, 1, 3], [1, 1, 3], [0, 3], [1, 4]])
def test_ends_that_are_none_are_refused(ends):
    with pytest.raises(ValueError, match="blocks must be numbers that ascend to 3"):
        merge_blocks(network(), pictures(), ends)


def test_a_network_that_unshuffles_its_picture_is_refused():
    made = rrdb(4, 3, in_nc=12, shuffle_factor=2).requires_grad_(False).eval()
    with pytest.raises(ValueError, match=r"x4 RRDBNet .* got ESRGAN that unshuffles by 2"):
        merge_blocks(NetworkUNet(Network(made, "ESRGAN", 2, 2), {"file": "x", "sha256": "0"}, 0.9), pictures(), [1, 3])


def test_the_command_makes_a_shallower_network(crops, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    from gdpo.convert import convert

    torch.manual_seed(5)
    save_file({k: v.clone() for k, v in rrdb(4, 3).state_dict().items()}, tmp_path / "net.safetensors")
    convert(tmp_path / "net.safetensors", tmp_path / "whole", noise=1.0)
    monkeypatch.setattr(program, "_CROP", 64)
    arguments = [str(tmp_path / "whole"), "--out", str(tmp_path / "small"), "--crops", str(crops), "--count=2"]
    monkeypatch.setattr(sys, "argv", ["shrink", *arguments, "--blocks=[2,3]"])
    program.main()
    small, whole = (OneStepGenerator.from_pretrained(tmp_path / name).unet for name in ("small", "whole"))
    assert len(small.network.get_submodule("model.1.sub")) == 3 < len(whole.network.get_submodule("model.1.sub"))
    assert torch.equal(small.noise.weight, whole.noise.weight) and small.noise.weight.abs().sum() > 0


def test_the_command_makes_a_model_folder_and_says_what_does_not_fit(crops, tmp_path, monkeypatch, capsys):
    generator = OneStepGenerator.tiny(SHAPE).requires_grad_(False)
    generator.unet = compact()
    generator.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(program, "_CROP", 64)
    arguments = ["shrink", str(tmp_path / "model"), "--out", str(tmp_path / "small"), "--crops", str(crops)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--width=8", "--count=3"])
    program.main()
    assert "small: a smaller" in capsys.readouterr().out
    assert OneStepGenerator.from_pretrained(tmp_path / "small").unet.config.inner_width == 8
    for options, message in (
        ({}, "one of --width .* and --blocks"),
        ({"width": 8, "blocks": [1]}, "one of --width .* and --blocks"),
        ({"blocks": [1]}, "--blocks is for a published network; got a CompactUNet"),
        ({"width": 12}, "width must be above 0 and below"),
    ):
        with pytest.raises(ValueError, match=message):
            shrink(tmp_path / "model", tmp_path / "other", crops, count=1, **options)
    with pytest.raises(FileExistsError):
        shrink(tmp_path / "model", tmp_path / "small", crops, width=8, count=1)
    assert not (tmp_path / "other").exists()
