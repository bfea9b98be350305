"""residual_sum: the sum against fp64, its statistics against those that group_norm takes itself, to the bit."""

import pytest
import torch

from gdpo.kernels import group_norm, norm, norm_split, residual, residual_sum
from tests.support.fused import DEVICE, HALVES, assert_as_good, channels_last, mutant, poisoned, strided

SHAPES = [(2, 8, 5, 7), (1, 20, 9, 9), (3, 1, 4, 4), (1, 96, 13, 11)]


def problem(shape, dtype=torch.float32):
    torch.manual_seed(sum(shape))
    a, b = (channels_last(torch.randn(shape) + 3).to(DEVICE, dtype) for _ in range(2))
    return a, b, torch.linspace(-2, 4, shape[1], device=DEVICE)


@pytest.fixture(autouse=True)
def split(monkeypatch):
    """Small planes go the way of large ones, in several chunks of two steps."""
    monkeypatch.setattr(norm, "SMALL", 0)
    monkeypatch.setattr(norm, "_tiling", lambda *_: (16, 32, 2))


def check(a, b, shift):
    exact = residual_sum(*(t if t is None else t.double() for t in (a, b, shift)), backend="torch")[0]
    plain = a + b if shift is None else a + b + shift[:, None, None].to(a.dtype)
    with poisoned():
        fused, statistics = residual_sum(a, b, shift, backend="triton")
    assert fused.dtype == a.dtype and fused.movedim(1, -1).is_contiguous()
    assert_as_good(fused, plain, exact)
    if shift is None:
        assert torch.equal(fused, plain)
    groups, weight = max(a.shape[1] // 4, 1), shift if shift is not None else torch.ones(a.shape[1], device=DEVICE)
    how = groups, weight, weight
    own = group_norm(fused, *how, backend="triton")
    assert torch.equal(group_norm(fused, *how, statistics=statistics, backend="triton"), own)
    return fused


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", SHAPES)
def test_sum_and_statistics(shape, dtype):
    a, b, shift = problem(shape, dtype)
    check(a, b, shift)
    check(a, b, None)


def test_any_order_in_memory():
    a, b, shift = problem((2, 12, 6, 5))
    assert torch.equal(check(a.contiguous(), strided(b), shift), check(a, b, shift))


def test_runs_are_equal():
    args = problem((2, 40, 7, 10))
    assert all(map(torch.equal, *(residual_sum(*args, backend="triton") for _ in range(2))))


def test_a_small_plane_takes_its_own_statistics(monkeypatch):
    a, b, shift = problem((2, 12, 6, 5))
    fused, statistics = residual_sum(a, b, shift, backend="triton")
    monkeypatch.setattr(norm, "SMALL", 16384)
    own = group_norm(fused, 3, shift, shift, backend="triton")
    assert torch.equal(group_norm(fused, 3, shift, shift, statistics=statistics, backend="triton"), own)


def test_auto_takes_torch_where_a_gradient_is_needed():
    a, b, shift = problem((1, 8, 4, 4))
    out, statistics = residual_sum(a.requires_grad_(), b, shift)
    out.sum().backward()
    assert statistics is None and torch.equal(a.grad, torch.ones_like(a))
    with pytest.raises(ValueError, match="no backward pass"):
        residual_sum(a, b, backend="triton")


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({1: torch.zeros(2, 8, 3, 4)}, ValueError, r"b must be \[N,C,H,W\] with W=3"),
        ({1: torch.zeros(2, 8, 3, 3).double()}, TypeError, "b must be torch.float32 as a is; got torch.float64"),
        ({2: torch.zeros(4)}, ValueError, r"shift must be \[C\] with C=8"),
    ],
)
def test_bad_input(change, error, message):
    args = [torch.zeros(2, 8, 3, 3), torch.zeros(2, 8, 3, 3), torch.zeros(8)]
    for position, value in change.items():
        args[position] = value
    with pytest.raises(error, match=message):
        residual_sum(*args)
    with pytest.raises(ValueError, match=r"statistics must be \[N,2,C,chunks\]"):
        group_norm(args[0], 2, torch.ones(8), torch.ones(8), statistics=torch.zeros(2, 2, 4, 1))


def test_statistics_of_another_picture_are_refused():
    a, b, shift = problem((2, 12, 6, 15))
    statistics = residual_sum(a, b, shift, backend="triton")[1]
    with pytest.raises(ValueError, match=r"statistics must be of x, \[N,2,C,2\]; got \(2, 2, 12, 3\)"):
        group_norm(a[..., :10], 3, shift, shift, statistics=statistics, backend="triton")


@pytest.mark.parametrize(
    "old, new",
    [
        ("x = tl.where(mask, x + shift, 0.0)", "x = tl.where(mask, x + shift + 0.01, 0.0)"),
        ("x = tl.where(mask, x + shift, 0.0)", "x = x + shift"),
        ("tl.store(out_ptr + offset, x, mask=mask)", "tl.store(out_ptr + offset, x, mask=mask & (offset > 40))"),
        ("        x = x.to(tl.float32)\n    return x", "        x = x.to(tl.float32) + 0.01\n    return x"),
        ("shift += tl.load(shift_ptr + c", "shift -= tl.load(shift_ptr + c"),
        ("channels\n        d = tl.where(inside", "0\n        d = tl.where(inside"),
    ],
)
def test_a_planted_fault_is_seen(old, new, tmp_path, monkeypatch):
    copy = mutant(norm, old, new, tmp_path, part=norm_split)
    copy._tiling = norm._tiling
    monkeypatch.setattr(residual, "_statistics", copy._statistics)
    with pytest.raises(AssertionError):
        check(*problem((2, 40, 7, 10)))
