"""GEGLU, the gate of a transformer's feed-forward block: one pass forward, one back, nothing kept but the input.

Paper: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202), equation 6, behind its products; the GELU is the
exact one, x Phi(x) (Hendrycks and Gimpel, arXiv 1606.08415).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .dispatch import jit, tl, use_triton
from .launch import options


def geglu_reference(x: Tensor) -> Tensor:
    """The definition, in fp64 for fp64 and in fp32 otherwise. Arguments as in `geglu`."""
    hidden, gate = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return (hidden * F.gelu(gate)).to(x.dtype)


@jit
def _phi(x):
    """The normal distribution function."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@jit
def _tile(rows, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first row, and of the tile that begins there: rows, columns, what is inside."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    r = tl.arange(0, ROWS)[:, None]
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return first, r, c, (r < rows - first) & (c < channels)


@jit
def _geglu_fwd_kernel(x_ptr, out_ptr, rows, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """hidden * gate * Phi(gate)."""
    first, r, c, inside = _tile(rows, channels, ROWS, COLUMNS)
    source = x_ptr + first * 2 * channels + r * 2 * channels + c
    hidden = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(source + channels, mask=inside, other=0.0).to(tl.float32)
    out = hidden * (gate * _phi(gate))
    tl.store(out_ptr + first * channels + r * channels + c, out.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _geglu_bwd_kernel(grad_ptr, x_ptr, out_ptr, rows, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """grad * gate * Phi(gate), and grad * hidden * (Phi(gate) + gate * phi(gate)), phi = Phi'."""
    first, r, c, inside = _tile(rows, channels, ROWS, COLUMNS)
    offset = first * 2 * channels + r * 2 * channels + c
    grad = tl.load(grad_ptr + first * channels + r * channels + c, mask=inside, other=0.0).to(tl.float32)
    hidden = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + offset + channels, mask=inside, other=0.0).to(tl.float32)
    share = _phi(gate)
    slope = share + gate * (0.3989422804014327 * tl.exp(-0.5 * gate * gate))
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr + offset, (grad * (gate * share)).to(kind), mask=inside)
    tl.store(out_ptr + offset + channels, (grad * hidden * slope).to(kind), mask=inside)


TILE = 2048  # results of a program, with 4 warps


def _launch(x: Tensor, grad: Tensor | None = None) -> Tensor:
    """x [...,2C] -> [...,C]; with grad [...,C] the gradient of x."""
    x, channels = x.contiguous(), x.shape[-1] // 2
    columns = min(max(channels & -channels, 32), 256)
    rows, size = x.numel() // x.shape[-1], TILE // columns
    grid, sizes = (-(-rows // size), -(-channels // columns)), {"ROWS": size, "COLUMNS": columns}
    with torch.cuda.device_of(x):
        if grad is None:
            out = x.new_empty(*x.shape[:-1], channels)
            _geglu_fwd_kernel[grid](x, out, rows, channels, **sizes, **options(4))
        else:
            out = torch.empty_like(x)
            _geglu_bwd_kernel[grid](grad.contiguous(), x, out, rows, channels, **sizes, **options(4))
    return out


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _launch(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return _launch(x, grad)


def geglu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """hidden * GELU(gate), of the halves hidden and gate of the last dimension.

    Args:
        x: [B,L,2C].
        backend: "auto" (the definition inside torch.compile, which fuses it by itself), "torch" (the definition) or
            "triton".

    Returns:
        [B,L,C], like x; computed in fp32 and rounded once.

    Raises:
        TypeError, ValueError: a wrong type or rank, a last dimension that is not even.
        RuntimeError: backend="triton" where it cannot run.
    """
    sizes = checks.tensor("x", x, "B,L,D")
    if sizes["D"] % 2:
        raise ValueError(f"x must be [B,L,2C], its last dimension even; got {tuple(x.shape)}")
    if backend == "auto" and torch.compiler.is_compiling():
        backend = "torch"
    return _Geglu.apply(x) if use_triton(backend, x) else geglu_reference(x)
