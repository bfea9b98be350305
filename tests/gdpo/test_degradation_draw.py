"""Drawn parameters follow the stated probabilities; configurations are checked."""

import math
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
from scipy import stats

from gdpo.degradation import DegradationConfig
from gdpo.degradation.config import KERNEL_KINDS, PRESETS
from gdpo.degradation.draw import draw_sample

COUNT = 4000


@pytest.fixture(scope="module")
def draws():
    recipe = DegradationConfig().recipe()
    return [draw_sample(recipe, 11, sample) for sample in range(COUNT)]


def fits(found, probabilities):
    """The chi-square test of a Counter against probabilities {value: p}."""
    assert set(found) <= set(probabilities)
    total = sum(found.values())
    return stats.chisquare([found[v] for v in probabilities], [total * p for p in probabilities.values()]).pvalue > 1e-3


def uniform(values, low, high):
    return stats.kstest(np.asarray(values), stats.uniform(low, high - low).cdf).pvalue > 1e-3


@pytest.mark.parametrize("number", [0, 1])
def test_blurs(draws, number):
    settings = DegradationConfig().recipe().passes[number]
    kernels = [d.passes[number].kernel for d in draws]
    if number == 0:
        assert all(kernels)
    else:
        assert fits(Counter(k is not None for k in kernels), {True: 0.5, False: 0.5})
    kernels = [k for k in kernels if k]
    kinds = dict(zip(KERNEL_KINDS, 0.9 * np.array([0.45, 0.25, 0.12, 0.03, 0.12, 0.03]))) | {"sinc": 0.1}
    assert fits(Counter(k.kind for k in kernels), kinds)
    assert fits(Counter(k.size for k in kernels), dict.fromkeys(range(7, 22, 2), 1 / 8))
    gaussians = [k for k in kernels if k.kind != "sinc"]
    assert uniform([k.sigma_x for k in gaussians], *settings.sigma)
    assert settings.sigma == [(0.2, 3.0), (0.2, 1.5)][number]
    tilted = [k for k in gaussians if k.kind.endswith("aniso")]
    assert uniform([k.sigma_y for k in tilted], *settings.sigma)
    assert uniform([k.angle for k in tilted], -math.pi, math.pi)
    assert all(k.sigma_y == k.sigma_x and k.angle == 0 for k in gaussians if not k.kind.endswith("aniso"))
    assert all(k.beta == 1 for k in gaussians if k.kind in ("iso", "aniso"))


def test_exponents_come_half_from_below_one(draws):
    kernels = [k for d in draws for p in d.passes if (k := p.kernel)]
    generalised = [k.beta for k in kernels if k.kind.startswith("generalized")]
    plateau = [k.beta for k in kernels if k.kind.startswith("plateau")]
    assert fits(Counter(b < 1 for b in generalised), {True: 0.5, False: 0.5})
    assert uniform([b for b in generalised if b < 1], 0.5, 1) and uniform([b for b in generalised if b >= 1], 1, 4)
    assert fits(Counter(b == 1 for b in plateau), {True: 0.5, False: 0.5})  # from 1 to 1, or from 1 to 2
    assert uniform([b for b in plateau if b > 1], 1, 2)


def test_sinc_cutoffs(draws):
    sincs = [k for d in draws for p in d.passes if (k := p.kernel) and k.kind == "sinc"]
    assert uniform([k.cutoff for k in sincs if k.size < 13], math.pi / 3, math.pi)
    assert uniform([k.cutoff for k in sincs if k.size >= 13], math.pi / 5, math.pi)
    last = [d.final_sinc for d in draws]
    assert fits(Counter(k is not None for k in last), {True: 0.8, False: 0.2})
    assert uniform([k.cutoff for k in last if k], math.pi / 3, math.pi)
    assert fits(Counter(k.size for k in last if k), dict.fromkeys(range(7, 22, 2), 1 / 8))


@pytest.mark.parametrize(
    ("number", "shares", "bounds", "sigma", "poisson", "quality"),
    [
        (0, (0.2, 0.7, 0.1), (0.3, 1.5), (1, 15), (0.05, 2), (60, 95)),
        (1, (0.3, 0.4, 0.3), (0.6, 1.2), (1, 12), (0.05, 1), (60, 100)),
    ],
)
def test_resize_noise_and_jpeg(draws, number, shares, bounds, sigma, poisson, quality):
    passes = [d.passes[number] for d in draws]
    assert fits(Counter((p.scale > 1) - (p.scale < 1) for p in passes), dict(zip((1, -1, 0), shares)))
    assert uniform([p.scale for p in passes if p.scale > 1], 1, bounds[1])
    assert uniform([p.scale for p in passes if p.scale < 1], bounds[0], 1)
    assert fits(Counter(p.resize_mode for p in passes), dict.fromkeys(("area", "bilinear", "bicubic"), 1 / 3))
    assert fits(Counter(p.noise.kind for p in passes), {"gaussian": 0.5, "poisson": 0.5})
    assert fits(Counter(p.noise.gray for p in passes), {True: 0.4, False: 0.6})
    assert uniform([p.noise.strength for p in passes if p.noise.kind == "gaussian"], *sigma)
    assert uniform([p.noise.strength for p in passes if p.noise.kind == "poisson"], *poisson)
    low, high = quality
    assert fits(Counter(p.quality for p in passes), dict.fromkeys(range(low, high + 1), 1 / (high + 1 - low)))


def test_order_and_last_filters(draws):
    thirds = dict.fromkeys(("area", "bilinear", "bicubic"), 1 / 3)
    assert fits(Counter(d.jpeg_last for d in draws), {True: 0.5, False: 0.5})
    assert fits(Counter(d.final_mode for d in draws), thirds)
    assert fits(Counter(d.upsample_mode for d in draws), thirds)


def test_a_draw_depends_on_seed_and_sample_alone(draws):
    recipe = DegradationConfig().recipe()
    assert draw_sample(recipe, 11, 123) == draws[123]
    assert draw_sample(recipe, 12, 123) != draws[123]
    assert len({repr(d) for d in draws}) == COUNT


def test_the_statistics_see_a_wrong_probability(draws):
    found = Counter(d.jpeg_last for d in draws)
    assert not fits(found, {True: 0.55, False: 0.45})
    assert not uniform([d.passes[0].noise.strength for d in draws if d.passes[0].noise.kind == "gaussian"], 1, 16)


def test_light_is_milder():
    recipe = DegradationConfig("light").recipe()
    draws = [draw_sample(recipe, 0, sample) for sample in range(300)]
    assert all(len(d.passes) == 1 and d.final_sinc is None for d in draws)
    assert {d.passes[0].quality for d in draws} <= set(range(70, 96))
    assert max(d.passes[0].kernel.sigma_x for d in draws if d.passes[0].kernel) <= 2


def test_changes_replace_the_presets_values_and_the_rest_stays():
    config = DegradationConfig(first={"jpeg_quality": [40, 50]}, second={"sigma": (1, 2)}, upsample_modes=["area"])
    recipe = config.recipe()
    assert recipe.passes[0].jpeg_quality == (40, 50) and recipe.passes[0].sigma == (0.2, 3.0)
    assert recipe.passes[1].sigma == (1, 2) and recipe.passes[1].jpeg_quality == (60, 100)
    assert recipe.upsample_modes == ("area",)
    assert DegradationConfig(**asdict(config)).recipe() == recipe
    assert PRESETS["realesrgan"].passes[0].jpeg_quality == (60, 95)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"preset": "heavy"}, "preset must be one of realesrgan, light, bicubic; got 'heavy'"),
        ({"scale": 0}, "scale must be a whole number from 1 to 16, got 0"),
        ({"scale": 2.0}, "scale must be a whole number"),
        ({"jpeg": "cv2"}, "jpeg must be auto, pillow or torch"),
        ({"final_sinc_probability": 1.2}, "final_sinc_probability must be a probability from 0 to 1, got 1.2"),
        ({"upsample_modes": ["nearest"]}, "upsample_modes must be a list of area"),
        ({"upsample_modes": []}, "upsample_modes must be a list of area"),
        ({"first": {"blur": 1}}, "first has no value named blur; it has blur_probability"),
        ({"first": [1]}, "first must map names of values to values"),
        ({"first": {"sigma": [3, 1]}}, "first.sigma must be two numbers, the smaller first"),
        ({"second": {"sigma": 3}}, "second.sigma must be two numbers"),
        ({"second": {"jpeg_quality": [60, 101]}}, "second.jpeg_quality must be two whole numbers"),
        ({"second": {"jpeg_quality": [60.5, 90]}}, "second.jpeg_quality must be two whole numbers"),
        ({"second": {"kernel_size": [7, 20]}}, "second.kernel_size must be two odd numbers"),
        ({"second": {"resize_probabilities": [0.5, 0.5, 0.5]}}, "second.resize_probabilities must sum to 1"),
        ({"second": {"resize_probabilities": [0.5, 0.5]}}, "must be 3 probabilities"),
        ({"second": {"resize_range": [1.1, 1.5]}}, "second.resize_range must lie around 1"),
        ({"second": {"gray_probability": "much"}}, "second.gray_probability must be a probability"),
        ({"preset": "light", "first": {"sigma": [1, 2]}}, "preset 'light' has no first pass"),
        ({"preset": "bicubic", "second": {"sigma": [1, 2]}}, "preset 'bicubic' has no second pass"),
        ({"preset": "bicubic", "final_sinc_probability": 0.5}, "preset 'bicubic' is one fixed resize"),
    ],
)
def test_bad_configurations_are_refused_in_words(arguments, words):
    with pytest.raises((ValueError, TypeError)) as error:
        DegradationConfig(**arguments)
    assert words in str(error.value)
