"""The VGG16 distance against torch's own layers in float64, its gradient, and the choice against LPIPS."""

import re
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from gdpo.scores import features
from gdpo.scores.features import BLOCKS, PerceptualDistance, VGG16Features, load_perceptual


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A VGG16 file with random weights of the right names and shapes."""
    g = torch.Generator().manual_seed(0)
    stored, n, channels = {}, 0, 3
    for i, (width, count) in enumerate(BLOCKS):
        n += i > 0
        for _ in range(count):
            stored[f"features.{n}.weight"] = torch.randn(width, channels, 3, 3, generator=g) / (3 * channels**0.5) * 1.4
            stored[f"features.{n}.bias"] = torch.randn(width, generator=g) * 0.1
            n, channels = n + 2, width
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file(stored, path)
    return path


@pytest.fixture
def pair():
    g = torch.Generator().manual_seed(1)
    return torch.rand(5, 3, 33, 40, generator=g) * 2 - 1, torch.rand(5, 3, 33, 40, generator=g) * 2 - 1


def by_hand(path, x, y, blocks):
    """The module docstring's formula in float64 with torch's functions, unit vectors formed one by one."""
    from safetensors.torch import load_file

    stored = {k: v.double() for k, v in load_file(path).items()}
    mean = torch.tensor([122.67892, 116.66877, 104.00699], dtype=torch.float64)[:, None, None]
    f, t = ((p.double() + 1) / 2 * 255 - mean for p in (x, y))
    total, n = 0, 0
    for i, (_, count) in enumerate(BLOCKS[:blocks]):
        if i:
            f, t, n = F.max_pool2d(f, 2), F.max_pool2d(t, 2), n + 1
        for _ in range(count):
            w, b = stored[f"features.{n}.weight"], stored[f"features.{n}.bias"]
            f, t, n = F.conv2d(f, w, b, padding=1).relu(), F.conv2d(t, w, b, padding=1).relu(), n + 2
        total = total + (F.normalize(f, dim=1) - F.normalize(t, dim=1)).square().sum(1).mean((1, 2))
    return total


@pytest.mark.parametrize("blocks", [1, 3, 5])
def test_distance_is_the_formula(weights, pair, blocks):
    got = PerceptualDistance(blocks, weights)(*pair)
    assert got.shape == (5,) and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), by_hand(weights, *pair, blocks), rtol=1e-4, atol=1e-6)


def test_gradient_is_the_formulas_in_both_arguments(weights, pair):
    x, y = (p[:2].clone().requires_grad_() for p in pair)
    PerceptualDistance(2, weights)(x, y).sum().backward()
    u, v = (p[:2].double().requires_grad_() for p in pair)
    by_hand(weights, u, v, 2).sum().backward()
    for got, want in ((x.grad, u.grad), (y.grad, v.grad)):
        assert (got - want).norm() < 1e-3 * want.norm()


def test_equal_pictures_are_at_zero_and_the_distance_is_symmetric(weights, pair):
    distance = PerceptualDistance(5, weights)
    assert distance(pair[0], pair[0].clone()).abs().max() < 1e-5
    torch.testing.assert_close(distance(*pair), distance(*pair[::-1]), rtol=1e-4, atol=1e-6)


def test_one_target_for_all(weights, pair):
    distance = PerceptualDistance(2, weights)
    want = distance(pair[0], pair[1][:1].expand_as(pair[0]))
    torch.testing.assert_close(distance(pair[0], pair[1][:1]), want, rtol=1e-5, atol=1e-6)


def test_bf16_autocast_and_channels_last_agree_with_fp32(weights, pair):
    distance = PerceptualDistance(3, weights)
    want = distance(*pair)
    with torch.autocast("cpu", torch.bfloat16):
        got = distance(*(p.to(memory_format=torch.channels_last) for p in pair))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2e-2, atol=0)


def test_black_pictures_give_finite_gradients(weights):
    x = torch.full((1, 3, 16, 16), -1.0, requires_grad=True)
    PerceptualDistance(5, weights)(x, torch.zeros(1, 3, 16, 16)).sum().backward()
    assert x.grad.isfinite().all()


def test_frozen(weights):
    assert not any(p.requires_grad for p in PerceptualDistance(1, weights).parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: PerceptualDistance(6, w), "blocks must be 1..5; got 6"),
        (lambda w: PerceptualDistance(1, w)(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 17)), "one shape"),
        (lambda w: VGG16Features(w)(torch.zeros(3, 16, 16)), r"[B,3,H,W] of at least 16x16; got (3, 16, 16)"),
        (lambda w: VGG16Features(w)(torch.zeros(1, 3, 8, 16)), "at least 16x16; got (1, 3, 8, 16)"),
        (lambda w: load_perceptual("ssim"), "lpips, vgg or auto; got 'ssim'"),
    ],
)
def test_bad_input_is_named(weights, call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(weights)


def test_a_file_that_is_not_vgg16_is_refused(tmp_path):
    save_file({"features.0.weight": torch.zeros(64, 1, 3, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"not a VGG16: features.0.weight must be \(64, 3, 3, 3\)"):
        VGG16Features(tmp_path / "x.safetensors")


def test_auto_takes_lpips_only_where_it_works(weights, monkeypatch):
    monkeypatch.setattr(features, "VGG16Features", lambda path, blocks: VGG16Features(weights, blocks))
    monkeypatch.setitem(sys.modules, "lpips", None)  # import lpips fails
    assert load_perceptual("auto", blocks=1).name == "vgg"
    with pytest.raises(RuntimeError, match=r"lpips cannot be used.*gdpo-sr\[iqa\]"):
        load_perceptual("lpips")

    class Net(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, x, y):
            return (x - y).square().mean((1, 2, 3), keepdim=True)

    fake = ModuleType("lpips")
    fake.LPIPS = Net
    monkeypatch.setitem(sys.modules, "lpips", fake)
    distance = load_perceptual("auto")
    assert distance.name == "lpips"
    assert distance(torch.zeros(2, 3, 16, 16), torch.ones(2, 3, 16, 16)).tolist() == [1.0, 1.0]
