"""Which implementation runs: the definition in torch, or the Triton kernel; and Triton as an optional import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the torch backend does without
    triton = tl = None

BACKENDS = ("auto", "torch", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def jit(function: Callable[..., None]) -> Any:
    """`triton.jit`, or the bare function where Triton is not installed (it is never launched then)."""
    return function if triton is None else triton.jit(function)


def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def _older(version: str, than: tuple[int, int]) -> bool:
    return tuple(int(part) for part in version.split(".")[:2]) < than


_able: set[tuple[object, ...]] = set()  # where and on what the kernels can run: to ask a GPU again would cost a launch


def _obstacle(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the Triton kernels cannot run there on these types, with the remedy; None where they can."""
    key = device, dtypes, interpreted()
    reason = None if key in _able else _find_obstacle(device, dtypes)
    if reason is None:
        _able.add(key)
    return reason


def _find_obstacle(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if triton is None:
        return "Triton is not installed: pip install triton (Linux), or pass backend='torch'"
    if device.type != "cuda" and not interpreted():
        there = "move the tensors with .cuda()" if torch.cuda.is_available() else "this machine has none"
        return f"it needs an NVIDIA GPU and the tensors are on {device} ({there}); or pass backend='torch'"
    if device.type != "cuda" and _older(triton.__version__, (3, 7)) and not _older(np.__version__, (2, 4)):
        return (
            f"the interpreter of Triton {triton.__version__} fails with NumPy {np.__version__}: "
            "pip install 'numpy<2.4' or 'triton>=3.7', or pass backend='torch'"
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 (A100) or newer: pass backend='torch'"
    for dtype in dtypes:
        if dtype.is_floating_point and dtype not in DTYPES:
            return f"it takes float32, float16 and bfloat16, not {dtype}: convert, or pass backend='torch'"
    return None


# What torch._dynamo.assume_constant_result does; importing torch._dynamo for it would take every command two seconds.
_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def use_triton(backend: str, *tensors: Tensor | None) -> bool:
    """Choose. "auto" takes Triton on a GPU where it can run; "triton" says why it cannot.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: backend="triton" where the kernels cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    present = [t for t in tensors if t is not None]
    device = present[0].device
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return False  # "auto" leaves the interpreter to the tests
    reason = _obstacle(device, tuple(t.dtype for t in present))
    if reason and backend == "triton":
        raise RuntimeError(f"backend='triton' cannot run: {reason}")
    return reason is None
