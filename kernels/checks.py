"""Checks of what users hand to the public functions: one line that names the argument, what was expected, what came.

Values (NaN, ranges) are looked at on the CPU only: on a GPU that would make the host wait. There a NaN stays inside the
picture that it came with, and GDPO_CHECK_VALUES=1 turns the checks on for a search.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor


def tensor(name: str, value: object, axes: str, sizes: dict[str, int] | None = None) -> dict[str, int]:
    """Check a floating point tensor's rank and sizes; return `sizes` with the axes that it names.

    Args:
        name: the argument, for the message.
        value: what came.
        axes: e.g. "B,G,3,H,W"; a number is a size that must be met, a letter is bound on first sight.
        sizes: letters that earlier arguments have bound.

    Raises:
        TypeError: not a tensor, or not floating point.
        ValueError: another rank or size, or empty.
    """
    value = _shape(name, value, axes, sizes := dict(sizes or {}))
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point; got {value.dtype}: convert it and scale its range first")
    return sizes


def mask(name: str, value: object, axes: str, sizes: dict[str, int]) -> None:
    """Check a bool tensor. Raises TypeError or ValueError as `tensor` does."""
    value = _shape(name, value, axes, dict(sizes))
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must be bool (attribute_ratios returns one); got {value.dtype}: compare it, e.g. > 0")


def _shape(name: str, value: object, axes: str, sizes: dict[str, int]) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor [{axes}]; got {type(value).__name__}")
    letters = axes.split(",")
    shape = tuple(value.shape)
    if len(shape) != len(letters):
        raise ValueError(f"{name} must be [{axes}]; got {shape}")
    for letter, size in zip(letters, shape):
        expected = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
        if size != expected:
            known = "" if letter.isdigit() else f" with {letter}={expected} as in the arguments before"
            raise ValueError(f"{name} must be [{axes}]{known}; got {shape}")
        if size == 0 and letter not in "FP":  # no fidelity or no perceptual metric is a choice, no picture is not
            raise ValueError(f"{name} must be [{axes}] and not empty; got {shape}")
    return value


def group(name: str, sizes: dict[str, int]) -> None:
    """A comparison needs two: G >= 2."""
    if sizes["G"] < 2:
        raise ValueError(f"{name} must hold a group of at least 2 samples (G >= 2): nothing to compare with G=1")


def same_device(**tensors: Tensor | None) -> None:
    """Check that all tensors are on the first one's device."""
    present = {name: value for name, value in tensors.items() if value is not None}
    if len({value.device for value in present.values()}) == 1:
        return
    first, reference = next(iter(present.items()))
    for name, value in present.items():
        if value.device != reference.device:
            raise ValueError(
                f"{name} must be on the device of {first} ({reference.device}); got {value.device}: move it with .to()"
            )


def no_grad(**tensors: Tensor | None) -> None:
    """Check that no gradient is asked for where none is computed."""
    for name, value in tensors.items():
        if value is not None and value.requires_grad:
            raise ValueError(f"{name} must not require grad (only pred gets one): pass {name}.detach()")


def _look(value: Tensor) -> bool:
    if torch.compiler.is_compiling() or value.numel() == 0 or value.is_meta:
        return False
    return value.device.type == "cpu" or os.environ.get("GDPO_CHECK_VALUES", "") not in ("", "0")


def finite(**tensors: Tensor | None) -> None:
    """Name a tensor that holds NaN or infinity, and where. On the CPU (or with GDPO_CHECK_VALUES=1)."""
    for name, value in tensors.items():
        # A sum is finite only where all is: one cheap pass in the good case. An overflow is told apart below.
        if value is None or not _look(value) or bool(value.detach().sum().isfinite()):
            continue
        bad = ~value.detach().isfinite()
        if bool(bad.any()):
            index = tuple(int(i) for i in bad.nonzero()[0])
            number = float(value.detach()[index])
            raise ValueError(f"{name} must be finite; got {number} at {list(index)} ({int(bad.sum())} such values)")


def between(name: str, value: Tensor, low: float, high: float, remedy: str) -> None:
    """Check a range, with a hundredth of room where it ends on both sides. On the CPU (or with GDPO_CHECK_VALUES=1)."""
    if not _look(value):
        return
    least, most = (float(v) for v in value.detach().aminmax())
    room = 0.0 if math.isinf(high) else (high - low) / 100
    if low - room <= least and most <= high + room and not math.isinf(most):
        return
    finite(**{name: value})
    raise ValueError(f"{name} must be in [{low:g}, {high:g}]; got [{least:g}, {most:g}]: {remedy}")
