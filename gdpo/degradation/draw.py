"""What happens to one sample: every parameter, drawn on the CPU from (seed, global sample index) alone."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from gdpo.degradation.config import KERNEL_KINDS, Pass, Recipe
from gdpo.randomness import seed_of


@dataclass(frozen=True)
class KernelDraw:
    """A blur kernel: kind (of KERNEL_KINDS or "sinc"), side, and the parameters that its kind uses.

    sigma_x, sigma_y in pixels, angle in radians (0 for isotropic kinds), beta the exponent of generalised and plateau
    kinds (1 for Gaussians), cutoff in radians per pixel (sinc only).
    """

    kind: str
    size: int
    sigma_x: float = 1.0
    sigma_y: float = 1.0
    angle: float = 0.0
    beta: float = 1.0
    cutoff: float = math.pi


@dataclass(frozen=True)
class NoiseDraw:
    """Noise: kind "gaussian" (strength: sigma in units of 1/255) or "poisson" (strength: a factor)."""

    kind: str
    strength: float
    gray: bool


@dataclass(frozen=True)
class PassDraw:
    """One pass; no kernel means no blur."""

    kernel: KernelDraw | None
    scale: float
    resize_mode: str
    noise: NoiseDraw
    quality: int


@dataclass(frozen=True)
class SampleDraw:
    """All that happens to a sample; `jpeg_last` says whether the last JPEG follows the last resize and sinc filter."""

    passes: tuple[PassDraw, ...]
    final_sinc: KernelDraw | None
    final_mode: str
    jpeg_last: bool
    upsample_mode: str


def draw_sample(recipe: Recipe, seed: int, sample: int) -> SampleDraw:
    """The parameters of one sample: a pure function of (recipe, seed, sample)."""
    # Of the standard generator only random() is promised to stay the same over Python versions; uniform() and
    # choices() are built on it alone.
    rng = random.Random(seed_of(seed, "degradation", sample))
    passes = tuple(_draw_pass(rng, settings) for settings in recipe.passes)
    final_sinc = None
    if rng.random() < recipe.final_sinc_probability:
        size = _odd(rng, recipe.passes[-1].kernel_size)
        final_sinc = KernelDraw("sinc", size, cutoff=rng.uniform(math.pi / 3, math.pi))
    final_modes = recipe.passes[-1].resize_modes if passes else ("bicubic_antialias",)
    return SampleDraw(
        passes=passes,
        final_sinc=final_sinc,
        final_mode=rng.choices(final_modes)[0],
        jpeg_last=rng.random() < 0.5,
        upsample_mode=rng.choices(recipe.upsample_modes)[0],
    )


def _draw_pass(rng: random.Random, settings: Pass) -> PassDraw:
    kernel = _draw_kernel(rng, settings) if rng.random() < settings.blur_probability else None
    low, high = settings.resize_range
    bounds = {"up": (1.0, high), "down": (low, 1.0), "keep": (1.0, 1.0)}
    direction = rng.choices(tuple(bounds), settings.resize_probabilities)[0]
    scale = rng.uniform(*bounds[direction])
    mode = rng.choices(settings.resize_modes)[0]
    gray = rng.random() < settings.gray_probability
    if rng.random() < settings.gaussian_probability:
        noise = NoiseDraw("gaussian", rng.uniform(*settings.gaussian_sigma), gray)
    else:
        noise = NoiseDraw("poisson", rng.uniform(*settings.poisson_scale), gray)
    worst, best = settings.jpeg_quality
    return PassDraw(kernel, scale, mode, noise, rng.choices(range(worst, best + 1))[0])


def _draw_kernel(rng: random.Random, settings: Pass) -> KernelDraw:
    size = _odd(rng, settings.kernel_size)
    if rng.random() < settings.sinc_probability:
        lowest = math.pi / 3 if size < 13 else math.pi / 5  # a small kernel cannot hold a low cut-off
        return KernelDraw("sinc", size, cutoff=rng.uniform(lowest, math.pi))
    kind = rng.choices(KERNEL_KINDS, settings.kernel_probabilities)[0]
    sigma_x = sigma_y = rng.uniform(*settings.sigma)
    angle = 0.0
    if kind.endswith("aniso"):
        sigma_y = rng.uniform(*settings.sigma)
        angle = rng.uniform(-math.pi, math.pi)
    beta = 1.0
    if not kind.startswith(("iso", "aniso")):
        low, high = settings.plateau_beta if kind.startswith("plateau") else settings.generalized_beta
        beta = rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high)
    return KernelDraw(kind, size, sigma_x, sigma_y, angle, beta)


def _odd(rng: random.Random, bounds: tuple[int, int]) -> int:
    return rng.choices(range(bounds[0], bounds[1] + 1, 2))[0]
