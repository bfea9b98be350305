"""A generator as one file for spandrel: as the network that it was made of, or by the descriptor for spandrel."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from engine.runtime.noise import noise_field
from gdpo.convert import convert, to_network
from gdpo.generator import OneStepGenerator
from gdpo.model import lora
from gdpo.model.compact import CompactUNetConfig
from gdpo.model.spandrel_networks import import_spandrel
from gdpo.model.tiny import TinyUNetConfig

try:
    spandrel = import_spandrel()
except RuntimeError as reason:
    pytest.skip(str(reason), allow_module_level=True)

SOURCE = Path(__file__).resolve().parents[2] / "integrations" / "spandrel" / "GDPOSR"
CONFIGS = {
    "tiny": TinyUNetConfig(block_out_channels=(8, 16, 24), layers_per_block=2, head_channels=(8, 6)),
    "compact": CompactUNetConfig(width=8, layers=3),
}


@pytest.fixture(scope="module")
def registry():
    """spandrel's with our architecture, which a program adds as it is."""
    spec = importlib.util.spec_from_file_location(
        "GDPOSR", SOURCE / "__init__.py", submodule_search_locations=[str(SOURCE)]
    )
    package = sys.modules["GDPOSR"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    registry = spandrel.ArchRegistry()
    registry.add(*spandrel.MAIN_REGISTRY)
    registry.add(spandrel.ArchSupport.from_architecture(package.GDPOSRArch()))
    return registry


@torch.no_grad()
def ours(generator: OneStepGenerator, lr: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    up = F.interpolate(lr, scale_factor=4, mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1
    return generator.decode(generator.predict(generator.encode(up), noise).x0) / 2 + 0.5


def picture(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_generator_is_a_network_of_its_own_architecture(kind, registry, tmp_path):
    generator = OneStepGenerator.tiny(CONFIGS[kind])
    draws = torch.Generator().manual_seed(1)
    for p in generator.unet.parameters():
        p.data += 0.03 * torch.randn(p.shape, generator=draws)
    generator.save_pretrained(tmp_path / "model")
    to_network(tmp_path / "model", tmp_path / "net.safetensors", seed=5)
    found = spandrel.ModelLoader("cpu", registry).load_from_file(tmp_path / "net.safetensors")
    assert (found.architecture.id, found.scale, found.tags, found.purpose) == ("GDPO-SR", 4, [kind], "SR")
    noise = torch.from_numpy(noise_field(5, 48, (0, 64), (0, 64))[None].copy())
    lr = picture(64, 80)
    expected = ours(generator, lr, torch.cat([noise, noise[..., :16]], 3))
    assert (found(lr) - expected).abs().max() < 1e-5
    assert (ours(generator, lr, torch.zeros(1, 48, 64, 80)) - expected).abs().max() > 1e-4  # teeth
    assert found(picture(13, 7)).shape == (1, 3, 52, 28)  # spandrel pads
    part = lr[..., :16, :16]
    expected = found(part)
    halves = found.bfloat16()(part.bfloat16())
    assert (halves.float() - expected).abs().mean() < 0.02


def test_a_network_is_itself_again_with_its_lora_merged(tmp_path):
    from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact

    torch.manual_seed(0)
    net = SRVGGNetCompact(num_feat=8, num_conv=2, upscale=4).eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    convert(tmp_path / "net.pth", tmp_path / "model")
    generator = OneStepGenerator.from_pretrained(tmp_path / "model")
    lora.add(generator.unet, 2, generator.unet.lora_targets)
    draws = torch.Generator().manual_seed(1)
    for p in lora.parameters(generator.unet).values():
        p.data += 0.05 * torch.randn(p.shape, generator=draws)
    generator.save_pretrained(tmp_path / "tuned")
    assert to_network(tmp_path / "tuned", tmp_path / "tuned.safetensors") == "Compact"
    found = spandrel.ModelLoader("cpu").load_from_file(tmp_path / "tuned.safetensors")
    lr = (picture(16, 24) * 255).round() / 255
    expected = ours(generator, lr, torch.zeros(1, 48, 16, 24))
    assert (found(lr) - expected).abs().max() < 1e-5
    assert (net(lr).clamp(0, 1) - expected).abs().max() > 1e-3  # it is tuned


def test_what_does_not_fit_a_file_is_said(mini_sd, tmp_path):
    with pytest.raises(ValueError, match="does not fit one file of a network"):
        to_network(mini_sd, tmp_path / "net.safetensors")
    (tmp_path / "there.safetensors").write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite replaces it"):
        to_network(mini_sd, tmp_path / "there.safetensors")
    OneStepGenerator.tiny(CONFIGS["tiny"]).save_pretrained(tmp_path / "tiny")
    with pytest.raises(ValueError, match="seed must be in"):
        to_network(tmp_path / "tiny", tmp_path / "net.safetensors", seed=-1)
    assert not (tmp_path / "net.safetensors").exists() and (tmp_path / "there.safetensors").read_text() == "mine"
