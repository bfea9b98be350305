"""How fused kernels are judged: against fp64, relative to plain torch in the same type, with planted faults beside."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from gdpo.kernels.dispatch import interpreted
from torch import Tensor

DEVICE = "cpu" if interpreted() else "cuda"
HALVES = [torch.float16] if interpreted() else [torch.float16, torch.bfloat16]  # the interpreter truncates to bf16
FLOOR = 1e-6  # relative; eight roundings of fp32, where plain torch happens to be exact


def relative_error(value: Tensor, exact: Tensor) -> float:
    """||value - exact|| / ||exact||, NaN wherever a value is NaN."""
    exact = exact.double()
    return float((value.double() - exact).norm() / exact.norm())


def assert_as_good(fused: Tensor, plain: Tensor, exact: Tensor) -> None:
    """At most twice the error of plain torch in the same type, and the same direction."""
    error, allowed = relative_error(fused, exact), max(2 * relative_error(plain, exact), FLOOR)
    assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.2e}"
    cosine = torch.nn.functional.cosine_similarity(fused.double().flatten(), exact.double().flatten(), dim=0)
    assert cosine > 1 - 1e-5


@contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN (whole numbers: the largest): what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all() and torch.empty(3).new_empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


_numbers = itertools.count()


def mutant(module: ModuleType, old: str, new: str, folder: Path, part: ModuleType | None = None) -> ModuleType:
    """The module with a fault planted: `old` replaced by `new` in its source, or in that of a part that it imports.

    Raises:
        LookupError: there is no such place, or several. Not an AssertionError, which is what a fault is to cause.
    """
    if part is None or old not in Path(part.__file__).read_text():
        return _edited(module, old, new, folder)
    own, copy = _edited(part, old, new, folder), _edited(module, None, "", folder)
    for name, value in vars(own).items():
        if not name.startswith("__") and getattr(copy, name, None) is getattr(part, name, own):
            setattr(copy, name, value)
    return copy


def _edited(module: ModuleType, old: str | None, new: str, folder: Path) -> ModuleType:
    source = Path(module.__file__).read_text()
    if old is not None and source.count(old) != 1:
        raise LookupError(f"{source.count(old)} places to plant the fault at: {old!r}")
    name = f"mutant_{next(_numbers)}"
    path = folder / f"{name}.py"  # a file, because Triton reads its kernels' source
    path.write_text((source if old is None else source.replace(old, new)).replace('"gdpo::', f'"gdpo_{name}::'))
    spec = importlib.util.spec_from_file_location(f"gdpo.kernels.{name}", path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def channels_last(x: Tensor) -> Tensor:
    """[..., C,H,W] with the same values, C innermost in memory."""
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)


def strided(x: Tensor) -> Tensor:
    """The same values, in neither order: every second element of a larger tensor."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., ::2] = x
    return wide[..., ::2]
