"""Randomness as a pure function of what it is for.

Every random draw of training is named by (seed, stream, step, GLOBAL sample index, group index), never by rank, worker
or the order of calls. So two processes draw what one draws, four accumulated batches of one draw what one batch of four
draws, and a resumed run draws what the straight run would have drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def seed_of(*key: int | str) -> int:
    """A 63-bit seed from a key such as (seed, "degrade", step, sample)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator that this key alone determines (CPU: the same bits on every device)."""
    return torch.Generator().manual_seed(seed_of(*key))


def normal(shape: Sequence[int], *key: int | str) -> torch.Tensor:
    """Standard normal noise, fp32 on the CPU, of the given shape."""
    return torch.randn(tuple(shape), generator=generator_for(*key))


def moved(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x on the device and in the type of `like`. The host does not wait until a GPU has come to this copy."""
    if like.device.type == "cuda":
        x = x.pin_memory()  # torch keeps this memory until it is copied, and for the next time
    return x.to(like.device, non_blocking=True).to(like.dtype)


def uniform(*key: int | str) -> float:
    """One number in [0, 1)."""
    return seed_of(*key) / 2.0**63
