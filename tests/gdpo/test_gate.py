"""The gate of a compact network: fitted, it tells clean from degraded; it travels with the model."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from engine.export.generator import export_generator
from gdpo import gate as command
from gdpo.generator import OneStepGenerator
from gdpo.model.compact import CompactUNetConfig
from gdpo.model.exported import from_export
from gdpo.model.gate import Gate, Seen, fit
from gdpo.train.config import NAOSDConfig

SHAPE = CompactUNetConfig(width=12, layers=2)


@pytest.fixture
def generator() -> OneStepGenerator:
    made = OneStepGenerator.tiny(SHAPE, seed=1)
    torch.nn.init.normal_(made.unet.conv_out.weight, std=0.05)
    return made.requires_grad_(False).eval()


def call(monkeypatch, *words) -> int | None:
    monkeypatch.setattr(sys, "argv", ["gdpo.gate", *map(str, words)])
    return command.main()


def test_it_tells_two_kinds_of_features_apart():
    torch.manual_seed(0)
    gate, rng = Gate(4, 8), torch.Generator().manual_seed(0)

    def batches(count):
        for _ in range(count):
            clean = torch.arange(8) < 4
            noise = torch.randn(8, 4, 12, 12, generator=rng)
            yield Seen(torch.where(clean[:, None, None, None], 0.2, 1.0) * noise, clean)

    assert torch.sigmoid(gate.logits(next(batches(1)).features)).min() > 0.97  # at first it is open
    fit(gate, batches(400), 400, clean=0.25)
    [seen] = batches(1)
    shares = gate(seen.features).mean((1, 2, 3))
    assert shares.shape == (8,) and (shares[:4] - 0.25).abs().max() < 0.1 and shares[4:].min() > 0.9


def test_a_constant_neighbourhood_has_one_share_up_to_the_border():
    gate = Gate(4, 8)
    torch.nn.init.normal_(gate.decide.weight)
    torch.nn.init.zeros_(gate.look.weight[:, :, :1])  # what is outside counts as zero in a convolution
    gate.look.weight.data[:, :, 0] = gate.look.weight.data[:, :, 2] = 0
    gate.look.weight.data[:, :, :, 0] = gate.look.weight.data[:, :, :, 2] = 0
    shares = gate(torch.ones(1, 4, 10, 14))
    assert shares.shape == (1, 1, 10, 14) and torch.allclose(shares, shares[..., :1, :1])  # no padding in the average


def test_the_command_scales_fits_and_keeps_the_other_weights(generator, crops, tmp_path, monkeypatch, capsys):
    generator.save_pretrained(tmp_path / "model")
    (tmp_path / "crops").mkdir()
    for split in ("train", "val"):
        (tmp_path / "crops" / split).symlink_to(crops)
    words = ["--data.folder", tmp_path / "crops", "--data.crop_size", 64, "--train_batch_size", 4, "--steps", 3]
    words += ["--model.pretrained", tmp_path / "model", "--degradation.mix", '{"bicubic": 1.0}', "--degraded", 1.25]
    call(monkeypatch, *words, "--out", tmp_path / "gated")
    said = capsys.readouterr().out
    assert "held-out clean crops: " in said and "held-out degraded crops: " in said
    made = OneStepGenerator.from_pretrained(tmp_path / "gated")
    assert made.unet.config == replace(SHAPE, gate=16)
    found, old = made.unet.state_dict(), generator.unet.state_dict()
    for name, weight in old.items():
        assert torch.equal(found[name], weight * 1.25 if name.startswith("conv_out") else weight), name
    call(monkeypatch, *words, "--out", tmp_path / "again")
    again = OneStepGenerator.from_pretrained(tmp_path / "again").unet.state_dict()
    assert all(torch.equal(w, again[name]) for name, w in found.items())

    with pytest.raises(FileExistsError):
        call(monkeypatch, *words, "--out", tmp_path / "gated")
    with pytest.raises(ValueError, match="--clean must be below --degraded 1: "):
        call(monkeypatch, *words, "--clean", 1, "--degraded", 1, "--out", tmp_path / "x")
    with pytest.raises(ValueError, match="only a compact network can have a gate; got TinyUNet"):
        call(monkeypatch, *words, "--model.pretrained", "tiny", "--out", tmp_path / "x")
    with pytest.raises(ValueError, match="must hold bicubic beside another preset"):
        call(monkeypatch, *words, "--degradation.mix", "{}", "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_it_is_exported_and_comes_back(tmp_path):
    gated = OneStepGenerator.tiny(replace(SHAPE, gate=5), seed=1)
    for parameter in (*gated.unet.conv_out.parameters(), gated.unet.gate.decide.weight):
        torch.nn.init.normal_(parameter, std=0.5)
    gated.requires_grad_(False).eval()
    latents, noise = torch.randn(1, 48, 16, 16), torch.randn(1, 48, 16, 16)
    expected = gated.predict(latents, noise).x0
    export_generator(gated, tmp_path / "engine")  # checks parity with torch
    back = from_export(tmp_path / "engine")
    assert back.unet.config == gated.unet.config
    assert torch.allclose(back.predict(latents, noise).x0, expected, atol=1e-6)
    gated.unet.gate.decide.bias.fill_(-50.0)
    bicubic = gated.predict(latents, noise).x0
    for parameter in gated.unet.conv_out.parameters():
        parameter.zero_()
    assert torch.equal(gated.predict(latents, noise).x0, bicubic) and not torch.allclose(bicubic, expected)


def test_half_of_a_batch_is_clean(generator, crops):
    from gdpo.degradation import DegradationConfig
    from gdpo.photos.dataset import CropDataset
    from gdpo.train.config import DataConfig

    made = OneStepGenerator.tiny(replace(SHAPE, gate=5), seed=1).requires_grad_(False)
    config = NAOSDConfig(
        data=DataConfig(folder=str(crops), crop_size=64),
        degradation=DegradationConfig(preset="light", mix={"bicubic": 0.3}),
        train_batch_size=6,
    )
    for seen in command.batches(made, CropDataset(str(crops), "train", 64), config, 3):
        assert seen.clean.tolist() == [True] * 3 + [False] * 3 and seen.features.shape == (6, 12, 16, 16)
