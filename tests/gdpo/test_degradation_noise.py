"""Noise: its statistics, and Poisson counts against scipy's distribution."""

import numpy as np
import pytest
import torch
from scipy import stats

from gdpo.degradation import noise as module
from gdpo.degradation.draw import NoiseDraw


def noisy(image, draw, *key):
    field = module.draw_field(draw, *image.shape[2:], *(key or ("test",)))
    return module.add_noise(image, draw, field)


@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("sigma", [1.0, 12.0])
def test_gaussian_noise_has_the_drawn_deviation(sigma, gray):
    image = torch.full((1, 3, 200, 200), 0.5)
    noise = (noisy(image, NoiseDraw("gaussian", sigma, gray)) - image) * 255
    assert noise.mean().abs() < 4 * sigma / 200
    assert noise.std() == pytest.approx(sigma, rel=0.02)
    correlation = np.corrcoef(noise[0].reshape(3, -1).numpy())[0, 1]
    assert correlation == pytest.approx(1.0 if gray else 0.0, abs=0.03)


@pytest.mark.parametrize("exponent", [0, 3, 8])
def test_the_poisson_table_is_the_distribution(exponent):
    table = module._poisson_table(torch.device("cpu")).reshape(9, 256, 512)[exponent].numpy()
    levels, counts = np.array([0, 1, 7, 128, 255]), np.arange(512)
    expected = stats.poisson.cdf(counts, levels[:, None] / 255 * 2.0**exponent)
    np.testing.assert_allclose(table[levels], expected, atol=1e-7)


@pytest.mark.parametrize("level", [0, 3, 60, 255])
def test_poisson_counts_follow_the_distribution(level):
    # All 256 levels are present, so that counts are those of level/255 * 256; the pixels of one level are looked at.
    levels = torch.full((1, 1, 300, 300), float(level))
    levels[0, 0, 0, :256] = torch.arange(256)
    uniforms = torch.rand(levels.shape, generator=torch.Generator().manual_seed(level))
    noise = module._poisson_noise(levels, uniforms)
    counts = ((noise + levels / 255) * 256)[0, 0, 1:].double().flatten().numpy()
    assert np.abs(counts - counts.round()).max() < 1e-3
    mean = level / 255 * 256
    if mean == 0:
        assert not counts.any()
        return
    edges = np.unique(stats.poisson.ppf(np.linspace(0.05, 0.95, 10), mean))
    observed = np.bincount(np.searchsorted(edges, counts.round()), minlength=len(edges) + 1)
    expected = np.diff(np.concatenate([[0], stats.poisson.cdf(edges, mean), [1]])) * counts.size
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_poisson_counts_are_the_quantiles():
    levels = torch.arange(256.0).reshape(1, 1, 16, 16)
    for u in (2**-25, 1e-6, 0.3, 0.5, 0.999, 1 - 2**-24):
        noise = module._poisson_noise(levels, torch.full(levels.shape, u))
        counts = ((noise + levels / 255) * 256).round().flatten().numpy()
        last = u == 1 - 2**-24  # the last number under 1 stands for what lies between it and 1
        expected = stats.poisson.ppf(1 - 2**-25 if last else u, np.arange(256) / 255 * 256)
        assert np.abs(counts - expected).max() <= (1 if last else 0), u


def test_the_uniform_numbers_are_never_zero(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, generator: torch.zeros(shape))
    field = module.draw_field(NoiseDraw("poisson", 1.0, False), 4, 4, "key")
    assert field.shape == (1, 3, 4, 4) and (field > 0).all()


@pytest.mark.parametrize(("distinct", "steps"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (128, 128), (129, 256)])
def test_the_number_of_distinct_values_sets_the_size_of_a_count(distinct, steps):
    levels = (torch.arange(90000) % distinct).float().reshape(1, 1, 300, 300) + 60
    uniforms = torch.rand(levels.shape, generator=torch.Generator().manual_seed(0))
    counts = (module._poisson_noise(levels, uniforms) + levels / 255) * steps
    assert (counts - counts.round()).abs().max() < 1e-3
    mean = levels.mean() / 255 * steps
    assert counts.mean() == pytest.approx(float(mean), abs=5 * float(mean) ** 0.5 / 300)


def test_poisson_noise_of_a_photo_scales_with_strength_and_brightness():
    ramp = torch.linspace(0.1, 0.9, 256).expand(1, 3, 256, 256).contiguous()
    strong = (noisy(ramp, NoiseDraw("poisson", 1.0, False)) - ramp).std(2).mean(1)[0]
    weak = (noisy(ramp, NoiseDraw("poisson", 0.25, False)) - ramp).std(2).mean(1)[0]
    # 205 values, so counts of 256 to full scale: the deviation is sqrt(level / 256).
    expected = (torch.linspace(0.1, 0.9, 256) / 256).sqrt()
    assert (strong / expected).mean() == pytest.approx(1, abs=0.03)
    assert (weak / expected).mean() == pytest.approx(0.25, abs=0.01)
    gray = noisy(ramp, NoiseDraw("poisson", 1.0, True)) - ramp
    assert torch.allclose(gray[:, 0], gray[:, 1], atol=1e-6) and gray.std() > 0.02


def test_noise_is_clipped_and_named_by_its_key():
    image, draw = torch.rand(1, 3, 64, 64).round(), NoiseDraw("gaussian", 50.0, False)
    first, again, other = noisy(image, draw, 1), noisy(image, draw, 1), noisy(image, draw, 2)
    assert first.min() == 0 and first.max() == 1
    assert torch.equal(first, again) and not torch.equal(first, other)
