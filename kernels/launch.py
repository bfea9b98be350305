"""What the launches of Triton kernels share: widths of blocks, the order of memory, options."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def power_of_two(n: int) -> int:
    """The least power of two that is n or more; 1 for 0. Triton's blocks have such widths."""
    return 1 << max(n - 1, 0).bit_length()


def is_channels_last(x: Tensor, axis: int) -> bool:
    """Whether the channels, at `axis`, are innermost in memory, and nothing else is out of order."""
    return x.movedim(axis, -1).is_contiguous()


def in_order(x: Tensor, axis: int, channels_last: bool) -> Tensor:
    """x itself, or a copy where its elements are in another order than asked for."""
    return x.movedim(axis, -1).contiguous().movedim(-1, axis) if channels_last else x.contiguous()


def channels_innermost(x: Tensor) -> Tensor:
    """x [N,C,...] itself where its channels are innermost in memory, else such a copy."""
    if x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return in_order(x, 1, channels_last=True)


def options(warps: int, registers: int | None = None) -> dict[str, Any]:
    """Launch options. Multiply-add fusion is asked for by name: its default changes with Triton 3.10."""
    limit = {} if registers is None else {"maxnreg": registers}
    return {"num_warps": warps, "enable_fp_fusion": True} | limit
