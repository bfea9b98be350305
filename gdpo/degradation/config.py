"""What a degradation may do: the passes, the presets, and what a user may change in them.

`realesrgan` holds the values of the paper's configuration (second-order Real-ESRGAN, arXiv 2107.10833), `light` one
mild pass for small models and fairly clean photos, `bicubic` nothing but the classic antialiased resize.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

KERNEL_KINDS = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
RESIZE_MODES = ("area", "bilinear", "bicubic", "bilinear_antialias", "bicubic_antialias")

Range = tuple[float, float]


@dataclass(frozen=True)
class Pass:
    """One blur -> resize -> noise -> JPEG. The defaults are the first pass of the paper.

    Attributes:
        blur_probability: share of samples that are blurred.
        sinc_probability: share of the blurs that are sinc filters; the others are of `kernel_probabilities`.
        kernel_probabilities: one for each of KERNEL_KINDS.
        kernel_size: smallest and largest side, both odd; every odd side between is equally likely.
        sigma: standard deviation along each axis, in pixels.
        generalized_beta, plateau_beta: shape exponents; half of the draws come from below 1, half from above.
        resize_probabilities: of growing, shrinking and keeping the size.
        resize_range: smallest and largest scale; in the first pass of the input's size, in the second of the output's.
        resize_modes: equally likely filters, of RESIZE_MODES.
        gaussian_probability: share of samples with Gaussian noise; the others get Poisson noise.
        gaussian_sigma: standard deviation, in units of 1/255.
        poisson_scale: factor on the Poisson noise.
        gray_probability: share of the noises that are equal in the three channels.
        jpeg_quality: smallest and largest quality (whole numbers).
    """

    blur_probability: float = 1.0
    sinc_probability: float = 0.1
    kernel_probabilities: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    kernel_size: tuple[int, int] = (7, 21)
    sigma: Range = (0.2, 3.0)
    generalized_beta: Range = (0.5, 4.0)
    plateau_beta: Range = (1.0, 2.0)
    resize_probabilities: tuple[float, ...] = (0.2, 0.7, 0.1)
    resize_range: Range = (0.3, 1.5)
    resize_modes: tuple[str, ...] = ("area", "bilinear", "bicubic")
    gaussian_probability: float = 0.5
    gaussian_sigma: Range = (1.0, 15.0)
    poisson_scale: Range = (0.05, 2.0)
    gray_probability: float = 0.4
    jpeg_quality: tuple[int, int] = (60, 95)

    def validate(self, name: str) -> None:
        """Raise ValueError or TypeError that names the field, what was expected and what came."""
        for key in ("blur_probability", "sinc_probability", "gaussian_probability", "gray_probability"):
            check_probability(f"{name}.{key}", getattr(self, key))
        _check_distribution(f"{name}.kernel_probabilities", self.kernel_probabilities, KERNEL_KINDS)
        _check_distribution(f"{name}.resize_probabilities", self.resize_probabilities, ("up", "down", "keep"))
        _check_range(f"{name}.sigma", self.sigma, 0.05, 20)
        _check_range(f"{name}.gaussian_sigma", self.gaussian_sigma, 0, 255)
        _check_range(f"{name}.poisson_scale", self.poisson_scale, 0, 100)
        _check_range(f"{name}.jpeg_quality", self.jpeg_quality, 1, 100, whole=True)
        _check_range(f"{name}.kernel_size", self.kernel_size, 3, 21, whole=True)
        if any(size % 2 == 0 for size in self.kernel_size):
            raise ValueError(f"{name}.kernel_size must be two odd numbers, got {list(self.kernel_size)}")
        for key, least, most in (("generalized_beta", 0.1, 20), ("plateau_beta", 0.1, 20), ("resize_range", 0.1, 4)):
            _check_range(f"{name}.{key}", getattr(self, key), least, most)
            low, high = getattr(self, key)
            if not low <= 1 <= high:
                raise ValueError(f"{name}.{key} must lie around 1 (low <= 1 <= high), got {[low, high]}")
        check_modes(f"{name}.resize_modes", self.resize_modes)


@dataclass(frozen=True)
class Recipe:
    """A preset with the user's changes: at most two passes, the last of which ends at the output's size."""

    passes: tuple[Pass, ...]
    final_sinc_probability: float
    upsample_modes: tuple[str, ...]


_SECOND = Pass(
    blur_probability=0.5,
    sigma=(0.2, 1.5),
    resize_probabilities=(0.3, 0.4, 0.3),
    resize_range=(0.6, 1.2),
    gaussian_sigma=(1.0, 12.0),
    poisson_scale=(0.05, 1.0),
    jpeg_quality=(60, 100),
)
_LIGHT = Pass(
    blur_probability=0.7,
    sinc_probability=0.0,
    kernel_probabilities=(0.6, 0.4, 0.0, 0.0, 0.0, 0.0),
    sigma=(0.2, 2.0),
    resize_probabilities=(0.2, 0.3, 0.5),
    resize_range=(0.8, 1.2),
    resize_modes=("area", "bilinear_antialias", "bicubic_antialias"),
    gaussian_sigma=(0.0, 4.0),
    poisson_scale=(0.0, 0.3),
    jpeg_quality=(70, 95),
)
PRESETS = {
    "realesrgan": Recipe((Pass(), _SECOND), 0.8, ("area", "bilinear", "bicubic")),
    "light": Recipe((_LIGHT,), 0.0, ("bilinear", "bicubic", "bicubic_antialias")),
    "bicubic": Recipe((), 0.0, ("bicubic_antialias",)),
}


@dataclass
class DegradationConfig:
    """A preset, and what to change in it.

    Attributes:
        preset: "realesrgan" (the paper), "light" (one mild pass) or "bicubic".
        mix: further presets with their shares, such as {"light": 1, "bicubic": 2}: each sample draws one of them, or
            `preset`, whose share is 1. The other options change `preset` only.
        scale: how many times smaller the output is; the input's sides must be multiples of it.
        first: changes to the first of two passes, by the names of `Pass`, such as {"jpeg_quality": [40, 95]}. Only
            "realesrgan" has a first pass.
        second: changes to the last pass ("realesrgan" and "light").
        final_sinc_probability: share of samples with a last sinc filter, before or after the last JPEG.
        upsample_modes: equally likely filters that bring the LR image back to the HR size.
        jpeg: "pillow" (libjpeg, on the CPU), "torch" (on the images' device), or "auto": pillow for images on the CPU.

    Raises:
        ValueError, TypeError: a value is unknown, of the wrong type, or out of range; the message names it.
    """

    preset: Literal["realesrgan", "light", "bicubic"] = "realesrgan"
    scale: int = 4
    first: dict[str, Any] = field(default_factory=dict)
    second: dict[str, Any] = field(default_factory=dict)
    final_sinc_probability: float | None = None
    upsample_modes: tuple[str, ...] | None = None
    jpeg: Literal["auto", "pillow", "torch"] = "auto"
    mix: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {self.preset!r}")
        if self.jpeg not in ("auto", "pillow", "torch"):
            raise ValueError(f"jpeg must be auto, pillow or torch; got {self.jpeg!r}")
        if not isinstance(self.scale, int) or isinstance(self.scale, bool) or not 1 <= self.scale <= 16:
            raise ValueError(f"scale must be a whole number from 1 to 16, got {self.scale!r}")
        for name, share in self.mix.items():
            if name not in PRESETS or name == self.preset:
                others = ", ".join(n for n in PRESETS if n != self.preset)
                raise ValueError(f"mix names presets beside {self.preset!r}: {others}; got {name!r}")
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < math.inf:
                raise ValueError(f"mix must map presets to shares above 0; got {name}: {share!r}")
        self.recipe()

    def recipe(self) -> Recipe:
        """The preset with this configuration's changes, checked."""
        preset = PRESETS[self.preset]
        names = ("first", "second")[2 - len(preset.passes) :]
        for name in {"first", "second"} - set(names):
            if getattr(self, name):
                raise ValueError(f"preset {self.preset!r} has no {name} pass, so nothing in it can be changed")
        passes = tuple(_change(old, getattr(self, name), name) for old, name in zip(preset.passes, names))
        sinc, modes = self.final_sinc_probability, self.upsample_modes
        recipe = Recipe(
            passes,
            preset.final_sinc_probability if sinc is None else sinc,
            preset.upsample_modes if modes is None else tuple(modes),
        )
        check_probability("final_sinc_probability", recipe.final_sinc_probability)
        check_modes("upsample_modes", recipe.upsample_modes)
        if self.preset == "bicubic" and (sinc or modes):
            raise ValueError(
                "preset 'bicubic' is one fixed resize; final_sinc_probability and upsample_modes must be unset"
            )
        return recipe


def _change(old: Pass, changes: Mapping[str, Any], name: str) -> Pass:
    """A pass with some values replaced; lists (YAML knows no tuples) become tuples."""
    if not isinstance(changes, Mapping):
        raise TypeError(f"{name} must map names of values to values, got {changes!r}")
    known = [f.name for f in fields(Pass)]
    if unknown := [str(key) for key in changes if key not in known]:
        raise ValueError(f"{name} has no value named {', '.join(unknown)}; it has {', '.join(known)}")
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in changes.items()}
    new = replace(old, **values)
    new.validate(name)
    return new


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_probability(name: str, value: Any) -> None:
    """Raise ValueError unless value is a number in [0, 1]."""
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a probability from 0 to 1, got {value!r}")


def check_modes(name: str, modes: Sequence[str]) -> None:
    """Raise ValueError unless modes is a non-empty choice of RESIZE_MODES."""
    if isinstance(modes, str) or not modes or any(mode not in RESIZE_MODES for mode in modes):
        raise ValueError(f"{name} must be a list of {', '.join(RESIZE_MODES)}; got {modes!r}")


def _check_distribution(name: str, values: Any, of: Sequence[str]) -> None:
    if not isinstance(values, tuple) or len(values) != len(of):
        raise ValueError(f"{name} must be {len(of)} probabilities ({', '.join(of)}), got {values!r}")
    for value in values:
        check_probability(name, value)
    if abs(sum(values) - 1) > 1e-6:
        raise ValueError(f"{name} must sum to 1, got {list(values)}, which sum to {sum(values):g}")


def _check_range(name: str, values: Any, low: float, high: float, whole: bool = False) -> None:
    kind = "whole numbers" if whole else "numbers"
    if (
        not isinstance(values, tuple)
        or len(values) != 2
        or not all(_is_number(v) and (not whole or isinstance(v, int)) for v in values)
        or not low <= values[0] <= values[1] <= high
    ):
        shown = list(values) if isinstance(values, tuple) else values
        raise ValueError(f"{name} must be two {kind}, the smaller first, from {low:g} to {high:g}; got {shown!r}")
