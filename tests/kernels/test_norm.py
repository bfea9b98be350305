"""group_norm: the definition against torch's modules, the fused kernels against fp64 in every layout and size."""

import pytest
import torch

from gdpo.kernels import group_norm, norm, norm_split
from tests.support.fused import DEVICE, HALVES, assert_as_good, channels_last, mutant, poisoned, relative_error, strided


def problem(n, c, h, w, groups, dtype=torch.float32, mean=0.3):
    torch.manual_seed(n * c + h)
    x = channels_last(torch.randn(n, c, h, w) * (1 + torch.arange(c)[:, None, None] / c) + mean)
    weight, bias = torch.rand(c) + 0.5, torch.randn(c)
    return [x.to(DEVICE, dtype), groups, weight.to(DEVICE, dtype), bias.to(DEVICE, dtype)]


def double(args):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in args]


def check(args, silu=True, function=group_norm, plain=None):
    exact = group_norm(*double(args), silu=silu, backend="torch")
    plain = group_norm(*args, silu=silu, backend="torch") if plain is None else plain
    with poisoned():
        fused = function(*args, silu=silu, backend="triton")
    assert fused.dtype == args[0].dtype and fused.shape == args[0].shape
    assert fused.movedim(1, -1).is_contiguous()
    assert_as_good(fused, plain, exact)
    return fused


@pytest.fixture
def split(monkeypatch):
    """Small planes go the way of large ones, in several chunks of two steps."""
    monkeypatch.setattr(norm, "SMALL", 0)
    monkeypatch.setattr(norm, "_tiling", lambda *_: (16, 32, 2))


SHAPES = [(2, 8, 5, 7, 4), (1, 20, 9, 9, 2), (3, 1, 4, 4, 1), (2, 48, 3, 50, 48), (1, 12, 1, 1, 2), (1, 96, 13, 11, 8)]


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_definition_is_torchs_modules(shape, silu):
    x, groups, weight, bias = problem(*shape)
    module = torch.nn.GroupNorm(groups, x.shape[1], eps=1e-3).to(DEVICE)
    module.load_state_dict({"weight": weight, "bias": bias})
    expected = torch.nn.Sequential(module, torch.nn.SiLU() if silu else torch.nn.Identity())(x).detach()
    got = group_norm(x, groups, weight, bias, 1e-3, silu=silu)
    assert relative_error(got, expected.double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_group_in_one_program(shape, dtype):
    check(problem(*shape, dtype))
    check(problem(*shape, dtype), silu=False)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_plane_split_over_programs(split, shape, dtype):
    check(problem(*shape, dtype))
    check(problem(*shape, dtype), silu=False)


@pytest.mark.parametrize("way", ["small", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_shift_is_added_first(way, dtype, request):
    if way == "split":
        request.getfixturevalue("split")
    x, groups, weight, bias = problem(2, 24, 9, 7, 4, dtype)
    shift = 3 * torch.randn(24, device=DEVICE, dtype=dtype)
    shifted = x.double() + shift.double()[:, None, None]
    exact = torch.nn.functional.group_norm(shifted, groups, weight.double(), bias.double())
    plain = group_norm(x, groups, weight, bias, shift=shift, backend="torch")
    assert_as_good(group_norm(x, groups, weight, bias, shift=shift, backend="triton"), plain, exact)
    assert relative_error(group_norm(x, groups, weight, bias, backend="triton"), exact) > 0.1


def test_a_large_plane_with_its_own_tiling():
    check(problem(1, 128, 33, 40, 4))  # 44 tiles of 32 rows, none masked in the channels


def test_which_tiling():
    assert norm._tiling(1, 512 * 512, 128) == (32, 128, 8)
    assert norm._tiling(1, 64 * 64, 320) == (64, 64, 1)  # 320 = 5 * 64: nothing masked
    assert norm._tiling(1, 100, 24) == (128, 32, 1)


@pytest.mark.parametrize("order", [torch.clone, torch.Tensor.contiguous, strided])
def test_any_order_in_memory(order):
    x, *rest = problem(2, 12, 6, 5, 3)
    assert torch.equal(check([order(x), *rest]), check([x, *rest]))


def test_sequences(split):
    x, *rest = problem(2, 24, 1, 70, 4)
    check([x[:, :, 0], *rest])


@pytest.mark.parametrize("way", ["small", "split"])
def test_a_large_mean_does_not_cancel(way, request):
    """Squares would: at a mean of 3000 the variance is 1 in 10^7, the last bit of fp32."""
    if way == "split":
        request.getfixturevalue("split")
    args = problem(2, 16, 12, 15, 4, mean=3000.0)
    exact = group_norm(*double(args), backend="torch")
    error = relative_error(group_norm(*args, backend="triton"), exact)
    half_a_bit_of_the_mean = 3000 * 2**-24
    assert error < 2 * half_a_bit_of_the_mean
    x, groups, weight, bias = args
    wide = x.unflatten(1, (groups, -1))
    mean, square = (t.mean((2, 3, 4), keepdim=True) for t in (wide, wide * wide))
    naive = ((wide - mean) / (square - mean * mean + 1e-5).sqrt()).flatten(1, 2)
    assert not relative_error(naive * weight[:, None, None] + bias[:, None, None], exact) < 20 * error


@pytest.mark.parametrize("way", ["small", "split"])
def test_a_constant_picture_and_a_step(way, request):
    if way == "split":
        request.getfixturevalue("split")
    x, *rest = problem(1, 8, 8, 16, 2)
    check([torch.full_like(x, 2.5), *rest])
    steps = (
        torch.where(torch.arange(16, device=DEVICE) < 1, 0.0, 1000.0) + 0.01 * x
    )  # the first tile is not like the rest
    check([steps, *rest])


@pytest.mark.parametrize("way", ["small", "split"])
def test_pictures_are_apart_and_runs_are_equal(way, request):
    if way == "split":
        request.getfixturevalue("split")
    x, *rest = problem(3, 24, 9, 7, 4)
    x[1] = float("nan")
    first, second = (group_norm(x, *rest, backend="triton") for _ in range(2))
    assert first[1].isnan().all() and first[[0, 2]].isfinite().all()
    assert torch.equal(first[[0, 2]], second[[0, 2]])


def gradient(args, grad, backend, silu=True, shift=None, function=group_norm):
    x, *rest = args
    x = x.detach().requires_grad_()
    function(x, *rest, silu=silu, shift=shift, backend=backend).backward(grad)
    return x.grad


def check_gradient(args, silu=True, shift=None, function=group_norm):
    """Upstream gradients with a mean and a slope along x: both sums over a group matter."""
    x = args[0]
    grad = (torch.randn_like(x) + 0.5 * x + 1).contiguous()  # in the other order: it is turned
    wide = None if shift is None else shift.double()
    exact = gradient(double(args), grad.double(), "torch", silu, wide)
    plain = gradient(args, grad, "torch", silu, shift)
    with poisoned():
        fused = gradient(args, grad, "triton", silu, shift, function)
    assert fused.dtype == x.dtype and fused.movedim(1, -1).is_contiguous()
    assert_as_good(fused, plain, exact)
    return fused


@pytest.mark.parametrize("way", ["small", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[4] < 48])
def test_the_gradient_of_the_features(way, shape, dtype, request):
    if way == "split":
        request.getfixturevalue("split")
    check_gradient(problem(*shape, dtype))
    check_gradient(problem(*shape, dtype), silu=False)
    check_gradient(problem(*shape, dtype), shift=torch.linspace(-2, 2, shape[1], device=DEVICE).to(dtype))


def test_a_group_too_large_for_registers_with_its_gradient_beside(monkeypatch):
    monkeypatch.setattr(norm, "SMALL", 64 * 16)  # exactly the group of this problem
    monkeypatch.setattr(norm, "_tiling", lambda *_: (16, 32, 2))
    check_gradient(problem(2, 40, 7, 9, 4), shift=torch.linspace(-2, 2, 40, device=DEVICE))


@pytest.mark.parametrize("way", ["small", "split"])
def test_the_gradient_is_the_same_at_each_run_and_finite_where_silu_is_flat(way, request):
    if way == "split":
        request.getfixturevalue("split")
    args = problem(2, 24, 9, 7, 4)
    args[3] = torch.linspace(-75, 75, 24, device=DEVICE)
    assert check_gradient(args).isfinite().all()
    grad = torch.randn_like(args[0])
    assert torch.equal(*(gradient(args, grad, "triton") for _ in range(2)))


def test_weight_and_bias_have_a_gradient_in_torch_alone():
    x, groups, weight, bias = problem(1, 8, 4, 4, 2)
    for learned in (x, weight, bias):  # without x's, torch 2.13 crashes on a CPU for channels-last features
        learned.requires_grad_()
    group_norm(x, groups, weight, bias).sum().backward()
    assert weight.grad.isfinite().all() and bias.grad.isfinite().all()
    with pytest.raises(ValueError, match="a gradient of x alone"):
        group_norm(x, groups, weight, bias, backend="triton")
    with torch.no_grad():
        group_norm(x, groups, weight, bias, backend="triton")


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({0: torch.zeros(2, 8)}, ValueError, r"x must be \[N,C,H,W\]; got \(2, 8\)"),
        ({0: torch.zeros(2, 8, 3, 3).int()}, TypeError, "x must be floating point"),
        ({1: 3}, ValueError, "groups must divide the 8 channels of x; got 3"),
        ({2: torch.ones(4)}, ValueError, r"weight must be \[C\] with C=8"),
        ({3: torch.ones(8, device="meta")}, ValueError, "bias must be on the device of x"),
        ({4: 0.0}, ValueError, "eps must be a number > 0; got 0.0"),
    ],
)
def test_bad_input(change, error, message):
    args = [torch.zeros(2, 8, 3, 3), 2, torch.ones(8), torch.ones(8), 1e-5]
    for position, value in change.items():
        args[position] = value
    with pytest.raises(error, match=message):
        group_norm(*args)


def test_compiles_to_one_graph():
    x, groups, weight, bias = problem(2, 16, 6, 6, 4)

    def step(x):
        return group_norm(2 * x, groups, weight, bias, silu=True, backend="triton") - 1

    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    assert relative_error(got, step(x)) < 1e-6


@pytest.mark.parametrize("order", [torch.clone, torch.Tensor.contiguous])
def test_the_operator_keeps_its_word(order):
    x, groups, weight, bias = problem(2, 16, 6, 5, 4)
    torch.library.opcheck(norm._group_norm_op, (order(x), groups, weight, bias, 1e-5, True))
    torch.library.opcheck(norm._group_norm_op, (order(x), groups, weight, bias, 1e-5, True, bias))


@pytest.mark.gpu
def test_cuda_graph_capture():
    for shape in ((1, 320, 8, 8, 32), (2, 128, 128, 96, 32)):
        x, *rest = problem(*shape, torch.bfloat16)
        group_norm(x, *rest, silu=True, backend="triton")  # compiled before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = group_norm(x, *rest, silu=True, backend="triton")
        x.normal_()
        graph.replay()
        exact = group_norm(*double([x, *rest]), silu=True, backend="torch")
        assert_as_good(out, group_norm(x, *rest, silu=True, backend="torch"), exact)


@pytest.mark.parametrize(
    "old, new",
    [
        ("mean += tl.load(shifts + i", "mean -= tl.load(shifts + i"),
        ("d += tl.load(shifts + i", "d -= tl.load(shifts + i"),
        ("mean -= tl.load(shifts + c", "mean += tl.load(shifts + c"),
        ("x += tl.load(shift_ptr", "x -= tl.load(shift_ptr"),
    ],
)
def test_a_fault_of_the_shift_is_seen(old, new, tmp_path):
    args, shift = problem(1, 16, 7, 9, 4), torch.linspace(-3, 3, 16, device=DEVICE)
    function = _fault(old, new, tmp_path, small="shift_ptr" in old)
    exact = group_norm(*double(args), shift=shift.double(), backend="torch")
    assert relative_error(group_norm(*args, shift=shift, backend="triton"), exact) < 1e-6
    assert relative_error(function(*args, shift=shift, backend="triton"), exact) > 1e-2


def test_without_a_fault_the_copy_passes(split, tmp_path):
    check(problem(2, 40, 7, 9, 4), function=_fault("TILE = 4096", "TILE = 4096", tmp_path))


def _fault(old, new, folder, small=False):
    copy = mutant(norm, old, new, folder, part=norm_split)
    if not small:
        copy.SMALL, copy._tiling = 0, lambda *_: (16, 32, 2)
    return copy.group_norm


@pytest.mark.parametrize(
    "old, new",
    [
        ("inside & there, SUM) - centre, 0.0)", "inside & there, SUM) - centre, 1.0)"),
        ("keep_dims=True) - sums * away", "keep_dims=True)"),
        ("c, centre + away", "c, centre"),
        ("own + count * d * d", "own"),
        ("(mean - centre) * count", "(mean - centre)"),
        ("range(1, STEPS):", "range(1, 1):"),
        ("(3 * n + 1) * channels + c, mask", "3 * n * channels + c, mask"),
        ("first = tl.program_id(0) * ROWS * STEPS", "first = tl.program_id(0) * ROWS"),
        ("tl.store(out_ptr + here, (_silu(y)", "tl.store(out_ptr + offset, (_silu(y)"),
    ],
)
def test_a_planted_fault_is_seen(old, new, tmp_path):
    function = _fault(old, new, tmp_path)
    with pytest.raises(AssertionError):
        check(problem(2, 40, 7, 9, 4), function=function)


@pytest.mark.parametrize(
    "old, new",
    [
        ("d = tl.where(inside, x - tl.div_rn(tl.sum(x), size), 0.0)", "d = x - tl.div_rn(tl.sum(x), size)"),
        ("y = d * (rstd * weight) + bias", "y = d * (rstd * weight)"),
        ("base = n * length * CHANNELS + g * PER_GROUP", "base = n * length * CHANNELS + g"),
        ("    return y / (1.0 + tl.exp(-y))", "    return y / (1.0 + tl.exp(y))"),
    ],
)
def test_a_planted_fault_in_the_small_kernel_is_seen(old, new, tmp_path):
    function = _fault(old, new, tmp_path, small=True)
    with pytest.raises(AssertionError):
        check(problem(2, 40, 7, 9, 4), function=function)


def test_without_a_fault_the_copy_has_the_gradient(tmp_path):
    for small in (True, False):
        function = _fault("TILE = 4096", "TILE = 4096", tmp_path, small=small)
        check_gradient(problem(2, 40, 7, 9, 4), function=function)


@pytest.mark.parametrize(
    "old, new",
    [
        ("SILU) * (rstd * weight)", "SILU) * rstd"),
        ("tl.sum(grad * d), size) * rstd * rstd", "tl.sum(grad * d), size) * rstd"),
        ("y = grad - tl.div_rn(tl.sum(grad), size) - d * slope", "y = grad - d * slope"),
    ],
)
def test_a_fault_in_the_gradient_of_the_small_kernel_is_seen(old, new, tmp_path):
    function = _fault(old, new, tmp_path, small=True)
    with pytest.raises(AssertionError):
        check_gradient(problem(2, 40, 7, 9, 4), function=function)


@pytest.mark.parametrize(
    "old, new",
    [
        ("share * (1.0 + y * (1.0 - share))", "share * (1.0 + y)"),
        ("products += grad * d", "products += grad"),
        ("    for step in range(0, STEPS):", "    for step in range(0, 1):"),
        ("second + i, mask", "first + i, mask"),
        ("sums += scale * tl.load", "sums += tl.load"),
        ("tl.sum(products, 0), size) * rstd * rstd", "tl.sum(products, 0), size) * rstd"),
        ("grad * scale - level - d * slope", "grad * scale - d * slope"),
        ("tl.store(out_ptr + here, (grad", "tl.store(out_ptr + offset, (grad"),
    ],
)
def test_a_fault_in_the_gradient_of_a_split_plane_is_seen(old, new, tmp_path):
    function = _fault(old, new, tmp_path)
    with pytest.raises(AssertionError):
        check_gradient(problem(2, 40, 7, 9, 4), function=function)
