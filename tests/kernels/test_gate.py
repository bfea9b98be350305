"""geglu: the definition against torch's functions, the fused kernels and their gradient against fp64."""

import pytest
import torch
import torch.nn.functional as F

from gdpo.kernels import gate, geglu
from tests.support.fused import DEVICE, HALVES, assert_as_good, mutant, poisoned, relative_error, strided

SHAPES = [(2, 7, 40), (1, 1, 2), (3, 50, 6), (1, 33, 1536)]


def problem(shape, dtype=torch.float32):
    """Gates on both sides of 0, where GELU bends; values exact in dtype."""
    torch.manual_seed(sum(shape))
    x, grad = 2 * torch.randn(shape), torch.randn(*shape[:2], shape[2] // 2)
    return x.to(DEVICE, dtype), grad.to(DEVICE, dtype)


def run(x, grad, backend, function=geglu):
    x = x.detach().requires_grad_()
    out = function(x, backend=backend)
    out.backward(grad)
    return out.detach(), x.grad


def check(x, grad, function=geglu):
    exact, plain = run(x.double(), grad.double(), "torch"), run(x, grad, "torch")
    with poisoned():
        fused = run(x, grad, "triton", function)
    for f, p, e in zip(fused, plain, exact):
        assert f.dtype == x.dtype
        assert_as_good(f, p, e)
    return fused


def test_the_definition_is_torchs():
    x, _ = problem((2, 5, 12))
    hidden, gates = x.double().chunk(2, -1)
    assert torch.equal(geglu(x.double(), backend="torch"), hidden * F.gelu(gates))
    assert relative_error(geglu(x, backend="torch"), hidden * F.gelu(gates)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_good_as_torch(shape, dtype):
    check(*problem(shape, dtype))


def test_one_rounding_and_not_two():
    """diffusers rounds GELU(gate) to the features' type before the product."""
    x, _ = problem((4, 64, 256), torch.float16)
    hidden, gates = x.chunk(2, -1)
    exact = geglu(x.double(), backend="torch")
    assert relative_error(geglu(x, backend="triton"), exact) < 0.9 * relative_error(hidden * F.gelu(gates), exact)


def test_any_order_in_memory():
    x, grad = problem((2, 6, 24))
    for f, e in zip(check(strided(x), strided(grad)), check(x, grad)):
        assert torch.equal(f, e)


def test_runs_are_equal():
    x, grad = problem((2, 70, 80))
    for first, second in zip(run(x, grad, "triton"), run(x, grad, "triton")):
        assert torch.equal(first, second)


def test_large_gates_stay_finite():
    x, grad = problem((1, 4, 16))
    x[..., 8:] = torch.tensor([-3e4, -100.0, -20.0, -0.0, 0.0, 20.0, 100.0, 3e4])
    check(x, grad)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (torch.zeros(2, 8), ValueError, r"x must be \[B,L,D\]; got \(2, 8\)"),
        (torch.zeros(2, 3, 5), ValueError, r"its last dimension even; got \(2, 3, 5\)"),
        (torch.zeros(2, 3, 4).int(), TypeError, "x must be floating point"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        geglu(change)


def test_compiles_to_one_graph():
    x, _ = problem((2, 3, 8))
    compiled = torch.compile(lambda x: geglu(2 * x) - 1, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), geglu(2 * x, backend="torch") - 1) < 1e-6


def test_without_a_fault_the_copy_passes(tmp_path):
    check(*problem((3, 70, 80)), mutant(gate, "TILE = 2048", "TILE = 2048", tmp_path).geglu)


@pytest.mark.parametrize(
    "old, new",
    [
        ("0.5 + 0.5 * tl.erf", "0.5 + 0.4 * tl.erf"),
        ("hidden * (gate * _phi(gate))", "hidden * (hidden * _phi(gate))"),
        ("share + gate * (0.398", "share - gate * (0.398"),
        ("tl.exp(-0.5 * gate", "tl.exp(-gate"),
        ("(grad * (gate * share))", "(grad * (hidden * share))"),
        ("first = tl.program_id(0).to(tl.int64) * ROWS", "first = tl.program_id(0).to(tl.int64) * 0"),
        ("c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]", "c = tl.arange(0, COLUMNS)[None, :]"),
    ],
)
def test_a_planted_fault_is_seen(old, new, tmp_path):
    with pytest.raises(AssertionError):
        check(*problem((3, 70, 80)), mutant(gate, old, new, tmp_path).geglu)
