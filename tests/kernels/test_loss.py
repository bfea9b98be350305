"""gdpo_loss: the definition against the paper's formula, the fused kernels against fp64, faults planted in both."""

import math

import pytest
import torch

from gdpo.kernels import gdpo_loss, loss
from tests.support.fused import DEVICE, HALVES, assert_as_good, channels_last, mutant, poisoned, relative_error, strided


def problem(b, g, c, h, w, dtype=torch.float32, weighted=False, seed=0):
    """A policy near its reference, as in training. Values exact in dtype, so that fp64 sees the same."""
    torch.manual_seed(seed)
    noise = torch.randn(b, g, c, h, w)
    ref = noise + 0.3 * torch.randn_like(noise)
    pred = ref + 0.02 * torch.randn_like(noise)
    pred, noise, ref = (x.to(DEVICE, dtype) for x in (pred, noise, ref))
    weight = torch.rand(b, h, w).to(DEVICE) if weighted else None
    return pred, noise, ref, torch.randn(b, g).to(DEVICE), weight


def run(args, backend, dtype=None, function=gdpo_loss):
    """loss, margin, gradient of pred; upstream gradients other than 1 into both."""
    pred, noise, ref, advantage, weight = (x if x is None else x.to(dtype or x.dtype) for x in args)
    pred = pred.detach().requires_grad_()
    value, margin = function(pred, noise, ref, advantage, weight=weight, backend=backend)
    (3 * value + (margin * torch.linspace(0.1, 0.7, len(margin), device=DEVICE)).sum()).backward()
    return value.detach(), margin.detach(), pred.grad


def check(args, function=gdpo_loss):
    exact = run(args, "torch", torch.float64)
    plain = run(args, "torch")
    with poisoned():
        fused = run(args, "triton", function=function)
    assert fused[2].dtype == args[0].dtype
    for f, p, e in zip(fused, plain, exact):
        assert_as_good(f, p, e)


def formula(pred, noise, ref, advantage, beta, weight=None):
    """The paper's words in Python numbers: two means, then their difference."""
    margins = []
    for b in range(len(pred)):
        total = 0.0
        for g in range(pred.shape[1]):
            w = torch.ones_like(pred[b, g]) if weight is None else weight[b].expand_as(pred[b, g])
            m = float(((pred[b, g] - noise[b, g]) ** 2 * w).sum() / w.sum())
            r = float(((ref[b, g] - noise[b, g]) ** 2 * w).sum() / w.sum())
            total += float(advantage[b, g]) * (m - r)
        margins.append(-beta / 2 * total)
    return sum(math.log1p(math.exp(-m)) for m in margins) / len(margins), margins


@pytest.mark.parametrize("weighted", [False, True])
def test_the_definition_is_the_papers_formula(weighted):
    args = [None if x is None else x.double().cpu() for x in problem(3, 4, 2, 5, 6, weighted=weighted)]
    value, margin = gdpo_loss(*args[:4], weight=args[4], beta=300.0, backend="torch")
    expected, margins = formula(*args[:4], 300.0, args[4])
    assert float(value) == pytest.approx(expected, rel=1e-10)
    assert margin.tolist() == pytest.approx(margins, rel=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck(weighted):
    pred, noise, ref, advantage, weight = problem(2, 3, 2, 3, 4, torch.float64, weighted)
    weight = None if weight is None else weight.double()
    call = lambda p: gdpo_loss(p, noise, ref, advantage.double(), beta=20.0, weight=weight, backend="torch")  # noqa: E731
    assert torch.autograd.gradcheck(call, pred.requires_grad_())


def test_two_samples_are_diffusion_dpo_up_to_scale():
    pred, noise, ref, _, _ = (x if x is None else x.double() for x in problem(2, 2, 3, 4, 4))
    advantage = torch.tensor([[1.0, -1.0]] * 2, dtype=torch.float64, device=DEVICE)
    _, margin = gdpo_loss(pred, noise, ref, advantage, beta=100.0, backend="torch")
    m, r = (pred - noise).square().mean((2, 3, 4)), (ref - noise).square().mean((2, 3, 4))
    torch.testing.assert_close(margin, -50.0 * ((m[:, 0] - r[:, 0]) - (m[:, 1] - r[:, 1])))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(1, 6, 4, 64, 64), (3, 2, 4, 7, 5), (2, 5, 1, 1, 1), (9, 3, 3, 16, 17)])
def test_fused_is_as_good_as_torch(shape, weighted, dtype):
    check(problem(*shape, dtype, weighted))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("order", [channels_last, strided])
def test_any_order_in_memory(order, weighted):
    pred, noise, ref, advantage, weight = problem(2, 3, 4, 8, 6, weighted=weighted)
    plain = run((pred, noise, ref, advantage, weight), "triton")
    check((order(pred), noise, ref, advantage, weight))
    check((pred, order(noise), order(ref), strided(advantage), None if weight is None else strided(weight)))
    ordered = run((order(pred), order(noise), ref, advantage, weight), "triton")
    assert relative_error(ordered[2], plain[2]) < 1e-5


def test_many_chunks_and_long_chunks(monkeypatch):
    monkeypatch.setattr(loss, "BLOCK", 64)
    monkeypatch.setattr(loss, "BUSY", 32)
    args = problem(2, 2, 4, 39, 43)
    assert loss._chunking(4, 4 * 39 * 43) == (27, 4)
    check(args)


FAULTS = [
    ("pred + ref - 2 * noise", "pred + ref - 2.001 * noise"),
    ("grad = factor * (pred - noise)", "grad = factor * (pred - 0.999 * noise)"),
    ("tl.load(grad_loss_ptr).to(tl.float32) * sigmoid", "sigmoid"),
    ("margin = -0.5 * beta", "margin = -0.5001 * beta"),
    ("upstream += tl.load(grad_margin_ptr + b).to(tl.float32)", "upstream += 0"),
    ("base = sample.to(tl.int64) * n\n    for", "base = (sample // group).to(tl.int64) * group * n\n    for"),
    ("-(-n // (BLOCK * steps)), steps", "n // (BLOCK * steps), steps"),
]


def test_without_a_fault_the_copy_passes(tmp_path):
    check(problem(2, 3, 4, 24, 25), mutant(loss, "BLOCK = 2048", "BLOCK = 2048", tmp_path).gdpo_loss)


@pytest.mark.parametrize("old, new", FAULTS)
def test_a_planted_fault_is_seen(old, new, tmp_path):
    args = problem(2, 3, 4, 24, 25)
    with pytest.raises(AssertionError):
        check(args, mutant(loss, old, new, tmp_path).gdpo_loss)


@pytest.mark.parametrize(
    "old, new",
    [("i // channels if CHANNELS_LAST else", "i % (n // channels) if CHANNELS_LAST else"), ("difference *= w", "pass")],
)
def test_a_planted_fault_in_the_weights_is_seen(old, new, tmp_path):
    pred, noise, ref, advantage, weight = problem(2, 3, 4, 8, 6, weighted=True)
    with pytest.raises(AssertionError):
        check((channels_last(pred), noise, ref, advantage, weight), mutant(loss, old, new, tmp_path).gdpo_loss)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_cancellation_at_the_papers_beta(backend):
    """Subtracting two means in fp32 is off by 1e-4 and more here; the difference of each element is not."""
    args = problem(4, 6, 4, 64, 64)
    args = (args[2] + 0.002 * (args[0] - args[2]), *args[1:])  # early in training
    margin = run(args, backend)[1]
    exact = run(args, "torch", torch.float64)[1]
    pred, noise, ref, advantage, _ = args
    m, r = (pred - noise).square().mean((2, 3, 4)), (ref - noise).square().mean((2, 3, 4))
    naive = -2500 * ((advantage * m).sum(1) - (advantage * r).sum(1))
    assert relative_error(margin, exact) < 1e-5 < relative_error(naive, exact)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_same_bits_twice(backend):
    args = problem(2, 4, 4, 32, 32, weighted=True)
    for first, second in zip(run(args, backend), run(args, backend)):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_picture_without_weight_has_no_say(backend):
    pred, noise, ref, advantage, weight = problem(2, 3, 4, 8, 8, weighted=True)
    weight[0] = 0
    _, margin, grad = run((pred, noise, ref, advantage, weight), backend)
    assert margin[0] == 0 and margin[1] != 0
    assert not grad[0].any() and grad[1].all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("size", [1e4, 1e8])
def test_far_margins_stay_finite(backend, size):
    pred, noise, ref, advantage, _ = problem(2, 2, 1, 4, 4)
    value, margin, grad = run((pred, noise, ref, advantage * size, None), backend)
    assert value.isfinite() and margin.isfinite().all() and grad.isfinite().all()
    assert float(value) == pytest.approx(float((-margin).clamp_min(0).mean()), rel=1e-5)


def test_no_gradient_where_none_is_asked_for():
    pred, noise, ref, advantage, _ = problem(2, 2, 1, 4, 4)
    value, margin = gdpo_loss(pred, noise, ref, advantage, backend="triton")
    assert not value.requires_grad and not margin.requires_grad
    value, _ = gdpo_loss(pred.requires_grad_(), noise, ref, advantage, backend="triton")
    (only,) = torch.autograd.grad(value, pred)
    assert only.shape == pred.shape


def test_under_autocast():
    pred, noise, ref, advantage, _ = problem(2, 3, 4, 8, 8)
    layer = torch.nn.Conv2d(4, 4, 1).to(DEVICE)

    def step(backend):
        layer.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            out = layer(pred.flatten(0, 1)).view_as(pred)
            value, _ = gdpo_loss(out, noise, ref, advantage, beta=50.0, backend=backend)
        value.backward()
        return out.dtype, value.dtype, value.detach(), layer.weight.grad.clone()

    fused, plain = step("triton"), step("torch")
    assert fused[:2] == (torch.bfloat16, torch.float32)
    assert relative_error(fused[2], plain[2]) < 1e-5
    assert relative_error(fused[3], plain[3]) < 1e-2  # the gradient is rounded to bf16


@pytest.mark.parametrize("weighted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiles_to_one_graph(weighted):
    args = problem(2, 3, 4, 8, 6, weighted=weighted)

    def step(pred, noise, ref_pred, advantage, *, weight, backend):
        return gdpo_loss(2 * pred - pred, noise, ref_pred, advantage, weight=weight, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for eager, graph in zip(run(args, "triton"), run(args, "triton", function=compiled)):
        assert relative_error(graph, eager) < 1e-6


@pytest.mark.parametrize("order", [torch.clone, channels_last])
def test_the_operators_keep_their_word(order):
    pred, noise, ref, advantage, weight = problem(2, 3, 4, 8, 6, weighted=True)
    pred = order(pred).requires_grad_()
    torch.library.opcheck(loss._forward_op, (pred, noise, ref, advantage, weight, 50.0))
    _, margin, scale = loss._forward(pred.detach(), noise, ref, advantage, weight, 50.0)
    args = (pred.detach(), noise, weight, margin, scale, torch.ones((), device=DEVICE), None)
    torch.library.opcheck(loss._backward_op, args)


@pytest.mark.gpu
def test_cuda_graph_capture():
    pred, noise, ref, advantage, _ = problem(1, 6, 4, 64, 64)
    pred.requires_grad_()

    def captured():
        value, margin = gdpo_loss(pred, noise, ref, advantage, backend="triton")
        return value, margin, *torch.autograd.grad(value, pred)

    captured()  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, margin, grad = captured()
    with torch.no_grad():
        noise.normal_()
    graph.replay()
    exact_value, exact_margin = gdpo_loss(pred.double(), noise.double(), ref.double(), advantage, backend="torch")
    assert relative_error(value, exact_value.detach()) < 1e-5 and relative_error(margin, exact_margin.detach()) < 1e-5
    assert grad.isfinite().all()
