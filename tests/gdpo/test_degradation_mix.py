"""A mixture of presets: from no degradation to heavy, each sample one of them."""

from __future__ import annotations

import pytest
import torch

from gdpo.degradation import Degradation, DegradationConfig

HR = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))


def test_each_sample_is_degraded_by_one_preset_in_its_share():
    mixed = Degradation(DegradationConfig(preset="light", mix={"bicubic": 2.0, "realesrgan": 1.0}))
    drawn = [mixed.preset_of(0, sample) for sample in range(2000)]
    for name, share in (("light", 0.25), ("bicubic", 0.5), ("realesrgan", 0.25)):
        assert drawn.count(name) / 2000 == pytest.approx(share, abs=0.04)
    alone = {n: Degradation(DegradationConfig(preset=n)) for n in ("light", "bicubic", "realesrgan")}
    samples = [drawn.index(name) for name in alone]
    lr, lr_up = mixed(HR.expand(3, -1, -1, -1), seed=0, samples=samples)
    for i, (sample, degrade) in enumerate(zip(samples, alone.values())):
        expected, expected_up = degrade(HR, seed=0, samples=[sample])
        assert torch.equal(lr[i : i + 1], expected) and torch.equal(lr_up[i : i + 1], expected_up)
    assert not torch.equal(lr[0], lr[1])  # teeth


def test_without_a_mixture_nothing_changes():
    plain = Degradation(DegradationConfig(preset="light"))
    assert {plain.preset_of(0, sample) for sample in range(50)} == {"light"}


@pytest.mark.parametrize(
    ("mix", "message"),
    [({"light": 1.0}, "mix names presets beside 'light'"), ({"bicubic": 0}, "shares above 0"), ({"x": 1}, "got 'x'")],
)
def test_a_wrong_mixture_is_named(mix, message):
    with pytest.raises(ValueError, match=message):
        DegradationConfig(preset="light", mix=mix)
