"""Bad input is a TypeError, ValueError or RuntimeError that names the argument, what was expected and the remedy."""

import pytest
import torch
from gdpo.kernels.dispatch import _find_obstacle

from gdpo.kernels import attribute_ratios, attribute_reward, attribute_statistics, complexity_map, gdpo_loss
from tests.support.fused import DEVICE

B, G = 2, 3
LOSS = {name: torch.randn(B, G, 4, 6, 5) for name in ("pred", "noise", "ref_pred")} | {"advantage": torch.randn(B, G)}
REWARD = {"fidelity": torch.randn(B, G, 1), "perceptual": torch.randn(B, G, 2)} | {
    name: torch.full((B,), 0.5) for name in ("smooth", "texture")
}
STATISTICS = {
    "samples": torch.zeros(B, G, 3, 6, 5), "target": torch.zeros(B, 3, 6, 5), "mask": torch.ones(B, 6, 5).bool()
}  # fmt: skip
GRAY = {"gray": torch.rand(B, 12, 15)}
CALLS = {
    "loss": (gdpo_loss, LOSS),
    "reward": (attribute_reward, REWARD),
    "statistics": (attribute_statistics, STATISTICS),
}
CALLS |= {"ratios": (attribute_ratios, GRAY), "map": (complexity_map, GRAY)}


def call(name, change, backend):
    function, args = CALLS[name]
    args = {k: v.to(DEVICE) for k, v in args.items()}
    args |= {k: v(args.get(k)) for k, v in change.items()}
    return function(**args, backend=backend)


def nan(x):
    y = x.clone()
    y.view(-1)[7 % y.numel()] = float("nan")
    return y


CASES = [
    ("loss", {"pred": lambda x: x[0]}, ValueError, r"pred must be \[B,G,C,H,W\]; got \(3, 4, 6, 5\)"),
    ("loss", {"pred": lambda x: x.tolist()}, TypeError, r"pred must be a torch.Tensor .*; got list"),
    ("loss", {"pred": lambda x: x.int()}, TypeError, "pred must be floating point; got torch.int32"),
    ("loss", {"noise": lambda x: x[:1]}, ValueError, r"noise must be .* with B=2 .*; got \(1, 3, 4, 6, 5\)"),
    ("loss", {"ref_pred": lambda x: x[:, :2]}, ValueError, r"ref_pred must be .* with G=3 .*; got \(2, 2"),
    ("loss", {"advantage": lambda x: x.mT}, ValueError, r"advantage must be \[B,G\] .*; got \(3, 2\)"),
    (
        "loss",
        {"noise": lambda x: x.clone().requires_grad_()},
        ValueError,
        r"noise must not .* noise.detach\(\)",
    ),
    ("loss", {"ref_pred": lambda x: x.clone().requires_grad_()}, ValueError, "ref_pred must not require grad"),
    ("loss", {k: (lambda x: x[:, :1]) for k in LOSS}, ValueError, "at least 2 samples"),
    ("loss", {"beta": lambda _: 0.0}, ValueError, "beta must be a number > 0; got 0.0"),
    ("loss", {"beta": lambda _: "5"}, ValueError, "beta must be a number > 0; got '5'"),
    ("loss", {"weight": lambda _: torch.ones(B, 5, 6)}, ValueError, r"weight must be \[B,H,W\] with H=6"),
    ("loss", {"noise": lambda x: x.to("meta")}, ValueError, "noise must be on the device of pred .* got meta: move"),
    ("loss", {k: (lambda x: x[:0]) for k in LOSS}, ValueError, "not empty"),
    ("reward", {"fidelity": lambda x: x[..., 0]}, ValueError, r"fidelity must be \[B,G,F\]; got \(2, 3\)"),
    ("reward", {k: (lambda x: x[:, :1]) for k in ("fidelity", "perceptual")}, ValueError, "at least 2 samples"),
    ("reward", {k: (lambda x: x[..., :0]) for k in ("fidelity", "perceptual")}, ValueError, "at least one metric"),
    ("reward", {"smooth": lambda x: x[:1]}, ValueError, r"smooth must be \[B\] with B=2"),
    ("statistics", {"samples": lambda x: x[:, :, :1]}, ValueError, r"samples must be \[B,G,3,H,W\]; got \(2, 3, 1, 6"),
    ("statistics", {"samples": lambda x: x.byte()}, TypeError, "samples must be floating point; got torch.uint8"),
    ("statistics", {"target": lambda x: x[..., :4]}, ValueError, "target must be .* with W=5"),
    ("statistics", {"mask": lambda x: x.float()}, TypeError, "mask must be bool .* got torch.float32: compare"),
    ("ratios", {"gray": lambda x: x[0]}, ValueError, r"gray must be \[B,H,W\]; got \(12, 15\)"),
    ("ratios", {"gray": lambda x: (x * 255).byte()}, TypeError, "gray must be floating point; got torch.uint8"),
    ("map", {"patch_size": lambda _: 0}, ValueError, "patch_size must be an int >= 1; got 0"),
    ("map", {"patch_size": lambda _: 9.5}, ValueError, "patch_size must be an int >= 1; got 9.5"),
]
VALUES = [
    ("loss", {"pred": nan}, r"pred must be finite; got nan at \[0, 0, 0, 1, 2\] \(1 such values\)"),
    ("loss", {"advantage": nan}, r"advantage must be finite; got nan at \[0, 1\]"),
    ("loss", {"weight": lambda _: -torch.ones(B, 6, 5).to(DEVICE)}, r"weight must be in \[0, inf\]"),
    ("reward", {"perceptual": nan}, r"perceptual must be finite; got nan at \[1, 0, 1\]"),
    ("statistics", {"target": nan}, "target must be finite"),
    ("statistics", {"samples": lambda x: x + 100}, r"samples must be in \[-1, 1\]; got \[100, 100\]: clamp"),
    ("ratios", {"gray": lambda x: 255 * x}, r"gray must be in \[0, 1\]; .*: divide 8-bit values by 255"),
    ("map", {"gray": nan}, "gray must be finite"),
]


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("name, change, error, message", CASES)
def test_shapes_and_types(name, change, error, message, backend):
    with pytest.raises(error, match=message):
        call(name, change, backend)


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("name, change, message", VALUES)
def test_values_are_named_before_they_spread(name, change, message, backend, monkeypatch):
    monkeypatch.setenv("GDPO_CHECK_VALUES", "1")
    with pytest.raises(ValueError, match=message):
        call(name, change, backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_unchecked_nan_stays_in_its_picture(backend, monkeypatch):
    """On a GPU nobody looks at values unless asked to: they must not touch other pictures, nor be hidden."""
    monkeypatch.setattr("gdpo.kernels.checks._look", lambda _: False)
    _, margin = call("loss", {"pred": nan}, backend)
    assert margin.isnan().tolist() == [True, False]
    advantage = call("reward", {"fidelity": nan}, backend)
    assert advantage.isnan().all(1).tolist() == advantage.isnan().any(1).tolist() == [True, False]
    mse = call("statistics", {"samples": nan}, backend).mse
    assert mse.isnan().sum() == 1 and mse[0, 0].isnan()
    smooth, texture, _ = call("ratios", {"gray": nan}, backend)
    assert smooth.isnan().tolist() == texture.isnan().tolist() == [True, False]
    assert call("map", {"gray": nan}, backend).isnan().flatten(1).any(1).tolist() == [True, False]


@pytest.mark.parametrize("name", CALLS)
def test_unknown_backend(name):
    with pytest.raises(ValueError, match="backend must be one of auto, torch, triton; got 'cuda'"):
        call(name, {}, "cuda")


@pytest.mark.parametrize("name", CALLS)
def test_triton_without_a_gpu_says_so(name, monkeypatch):
    monkeypatch.setattr("gdpo.kernels.dispatch.interpreted", lambda: False)
    function, args = CALLS[name]
    with pytest.raises(RuntimeError, match=r"needs an NVIDIA GPU and the tensors are on cpu .* pass backend='torch'"):
        function(**args, backend="triton")
    function(**args, backend="auto")


@pytest.mark.parametrize("name", CALLS)
def test_triton_does_not_take_double(name):
    function, args = CALLS[name]
    double = {k: v.to(DEVICE, torch.float64 if v.is_floating_point() else v.dtype) for k, v in args.items()}
    with pytest.raises(RuntimeError, match=r"float32, float16 and bfloat16, not torch\.float64"):
        function(**double, backend="triton")


def test_triton_does_not_take_huge_patches():
    with pytest.raises(ValueError, match="patch_size must be at most 64 with backend='triton'; got 65"):
        call("map", {"patch_size": lambda _: 65}, "triton")


def test_old_gpus_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "compute capability 8.0" in _find_obstacle(torch.device("cuda:0"), (torch.float32,))


def test_an_interpreter_that_numpy_broke_is_named(monkeypatch):
    monkeypatch.setattr("gdpo.kernels.dispatch.interpreted", lambda: True)
    monkeypatch.setattr("triton.__version__", "3.6.0")
    for numpy, broken in (("2.3.5", False), ("2.4.6", True), ("3.0.0rc1", True)):
        monkeypatch.setattr("numpy.__version__", numpy)
        reason = _find_obstacle(torch.device("cpu"), (torch.float32,)) or ""
        assert ("pip install 'numpy<2.4' or 'triton>=3.7'" in reason) == broken
