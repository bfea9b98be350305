"""The sum at the end of a residual block, its biases and the next normalisation's statistics, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .dispatch import use_triton
from .launch import channels_innermost, is_channels_last
from .norm import _statistics


def residual_sum_reference(a: Tensor, b: Tensor, shift: Tensor | None = None) -> Tensor:
    """The definition, in fp64 for fp64 and in fp32 otherwise. Arguments as in `residual_sum`."""
    wide = torch.promote_types(a.dtype, torch.float32)
    out = a.to(wide) + b.to(wide)
    return (out if shift is None else out + shift.to(wide)[:, None, None]).to(a.dtype)


def residual_sum(
    a: Tensor, b: Tensor, shift: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """a + b + shift, rounded once.

    Args:
        a, b: [N,C,H,W], of one type; channels-last is fastest.
        shift: [C], the biases of the convolutions that made a and b.
        backend: "auto" (Triton for channels-last features on a GPU that need no gradient, outside torch.compile, which
            fuses the sum by itself), "torch" (the definition) or "triton" (without a gradient).

    Returns:
        The sum, like a, and its statistics for `group_norm`; None for these where torch ran.

    Raises:
        TypeError, ValueError: a wrong type, rank, size or device, a gradient asked of backend="triton".
        RuntimeError: backend="triton" where it cannot run.
    """
    sizes = checks.tensor("a", a, "N,C,H,W")
    checks.tensor("b", b, "N,C,H,W", sizes)
    if b.dtype != a.dtype:
        raise TypeError(f"b must be {a.dtype} as a is; got {b.dtype}")
    if shift is not None:
        checks.tensor("shift", shift, "C", {"C": sizes["C"]})
    checks.same_device(a=a, b=b, shift=shift)
    learning = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (a, b, shift))
    if learning and backend == "triton":
        raise ValueError("backend='triton' has no backward pass here: use torch.no_grad(), or pass backend='torch'")
    if backend == "auto" and (learning or torch.compiler.is_compiling() or not is_channels_last(a, 1)):
        backend = "torch"
    if not use_triton(backend, a, b, shift):
        return residual_sum_reference(a, b, shift), None
    with torch.cuda.device_of(a):
        return _statistics(channels_innermost(a), channels_innermost(b), None if shift is None else shift.contiguous())
