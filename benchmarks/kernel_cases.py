"""What kernel_bench times: each operation, its sizes, its inputs, and the bytes that it cannot avoid to move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gdpo.kernels import (
    attribute_ratios,
    attribute_reward,
    attribute_statistics,
    complexity,
    gdpo_loss,
    geglu,
    group_norm,
    residual_sum,
)

# [B,G,C,H,W] of latents; [B,G,side] and [B,side] of pictures; [B,G,F,P] of scores; [B,C,side] of features; [B,L,C] of
# tokens
FULL: dict[str, list[tuple[int, ...]]] = {
    "gdpo_loss": [(1, 6, 4, 64, 64), (4, 6, 4, 64, 64), (16, 16, 4, 128, 128)],
    "attribute_statistics": [(1, 6, 512), (4, 6, 512), (16, 16, 1024)],
    "attribute_ratios": [(1, 512), (16, 512), (1, 1024), (16, 1024)],
    "attribute_reward": [(1, 6, 1, 2), (16, 16, 1, 2)],
    "group_norm": [(1, 320, 64), (1, 128, 512), (8, 128, 512)],  # of the UNet, of the decoder
    "geglu": [(1, 4096, 1280), (6, 4096, 1280)],
    "residual_sum": [(1, 128, 512), (8, 128, 512)],
}
MINIATURE: dict[str, list[tuple[int, ...]]] = {
    "gdpo_loss": [(1, 2, 4, 8, 8)],
    "attribute_statistics": [(1, 2, 16)],
    "attribute_ratios": [(1, 24)],
    "attribute_reward": [(2, 3, 1, 2)],
    "group_norm": [(1, 32, 8)],
    "geglu": [(1, 4, 8)],
    "residual_sum": [(1, 32, 8)],
}
TESTS = {"gdpo_loss": "loss", "attribute_statistics": "statistics", "attribute_ratios": "complexity",
         "attribute_reward": "reward", "group_norm": "norm", "geglu": "gate", "residual_sum": "residual"}  # fmt: skip


@dataclass
class Case:
    """One operation at one size: inputs, what is called, and the bytes that it cannot avoid to move."""

    op: str
    size: tuple[int, ...]
    dtype: torch.dtype
    call: Callable[..., Any]  # call(backend=...)
    traffic: dict[str, int]  # mode -> bytes
    pred: Tensor | None = None
    extra: dict[str, Callable[[], Any]] = field(default_factory=dict)  # implementations that torch has not


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def loss_case(size: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    noise = torch.randn(size, device=device)
    ref = noise + 0.3 * torch.randn_like(noise)
    pred = (ref + 0.02 * torch.randn_like(noise)).to(dtype).requires_grad_()
    noise, ref = noise.to(dtype), ref.to(dtype)
    advantage = torch.randn(size[:2], device=device)

    def call(backend: str) -> tuple[Tensor, Tensor]:
        return gdpo_loss(pred, noise, ref, advantage, backend=backend)

    one = nbytes(noise)
    return Case("gdpo_loss", size, dtype, call, {"forward": 3 * one, "backward": 3 * one, "both": 6 * one}, pred)


def statistics_case(size: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    b, g, side = size
    samples = torch.rand(b, g, 3, side, side, device=device, dtype=dtype) * 2 - 1
    target = torch.rand(b, 3, side, side, device=device, dtype=dtype) * 2 - 1
    mask = torch.rand(b, side, side, device=device) > 0.4

    def call(backend: str) -> Any:
        return attribute_statistics(samples, target, mask, backend=backend)

    return Case("attribute_statistics", size, dtype, call, {"forward": nbytes(samples, target, mask)})


def ratios_case(size: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    """A real photo's gray, enlarged where it must be: the cost of a histogram depends on the picture."""
    from skimage import color, data

    b, side = size
    gray = torch.from_numpy(color.rgb2gray(data.astronaut())).float()[None, None]
    gray = torch.nn.functional.interpolate(gray, (side, side), mode="bilinear", antialias=True)[:, 0]
    gray = gray.clamp(0, 1).expand(b, side, side).contiguous().to(device)

    def call(backend: str) -> Any:
        return attribute_ratios(gray, backend=backend)

    case = Case("attribute_ratios", size, torch.float32, call, {"forward": nbytes(gray) + gray.numel()})
    if device == "cpu":
        fast = "matrices" if complexity._complexity_cpu is None else "native"
        case.extra = {fast: lambda: call("auto"), "opencv": lambda: _by_opencv(gray)}
    return case


def _by_opencv(gray: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    import cv2

    from tests.support import opencv_complexity

    cv2.setNumThreads(torch.get_num_threads())
    smooth, texture, masks = zip(*(opencv_complexity.attribute_ratios(picture.numpy()) for picture in gray))
    return torch.tensor(smooth), torch.tensor(texture), torch.stack([torch.from_numpy(m) for m in masks])


def reward_case(size: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    b, g, f, p = size
    fidelity, perceptual = torch.randn(b, g, f, device=device), torch.randn(b, g, p, device=device)
    smooth = torch.rand(b, device=device)

    def call(backend: str) -> Tensor:
        return attribute_reward(fidelity, perceptual, smooth, 1 - smooth, backend=backend)

    return Case("attribute_reward", size, torch.float32, call, {"forward": nbytes(fidelity, perceptual)})


def norm_case(size: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    """Channels-last, with SiLU. Eager is what a model does; whatever does it reads twice and writes once."""
    b, c, side = size
    x = torch.randn(b, c, side, side, device=device).to(dtype, memory_format=torch.channels_last)
    weight, bias = (torch.randn(c, device=device).to(dtype) for _ in range(2))

    def call(backend: str) -> Tensor:
        if backend == "torch":
            return F.silu(F.group_norm(x, 32, weight, bias))
        return group_norm(x, 32, weight, bias, silu=True, backend=backend)

    return Case("group_norm", size, dtype, call, {"forward": 3 * nbytes(x)})


def geglu_case(size: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    b, length, c = size
    x = torch.randn(b, length, 2 * c, device=device).to(dtype).requires_grad_()

    def call(backend: str) -> tuple[Tensor]:
        if backend == "torch":  # as diffusers does it
            hidden, gates = x.chunk(2, -1)
            return (hidden * F.gelu(gates),)
        return (geglu(x, backend=backend),)

    half = nbytes(x) // 2
    return Case("geglu", size, dtype, call, {"forward": 3 * half, "backward": 5 * half, "both": 8 * half}, x)


def residual_case(size: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    b, c, side = size
    features = (torch.randn(b, c, side, side, device=device) for _ in range(2))
    x, h = (t.to(dtype, memory_format=torch.channels_last) for t in features)
    bias = torch.randn(c, device=device)

    def call(backend: str) -> Tensor:
        if backend == "torch":
            return x + (h + bias.to(dtype)[:, None, None])
        return residual_sum(x, h, bias, backend=backend)[0]

    return Case("residual_sum", size, dtype, call, {"forward": 3 * nbytes(x)})


CASES: dict[str, Callable[..., Case]] = {
    "gdpo_loss": loss_case,
    "attribute_statistics": statistics_case,
    "attribute_ratios": ratios_case,
    "attribute_reward": reward_case,
    "group_norm": norm_case,
    "geglu": geglu_case,
    "residual_sum": residual_case,
}
