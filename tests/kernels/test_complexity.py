"""complexity_map and attribute_ratios: against OpenCV on real photos, and all implementations against fp64."""

import numpy as np
import pytest
import torch

from gdpo.kernels import attribute_ratios, complexity, complexity_map
from tests.support.fused import DEVICE, mutant, poisoned, relative_error, strided

RANGE = 8 * 100  # 256 equally likely bins, 10x10 pixels


def photo(name: str) -> torch.Tensor:
    """[1,H,W] fp32 gray of a photo, quantised to 8 bit as a decoder would."""
    color, data = pytest.importorskip("skimage.color"), pytest.importorskip("skimage.data")
    gray = color.rgb2gray(getattr(data, name)())
    return torch.from_numpy(np.round(gray * 255).astype(np.float32) / 255)[None].to(DEVICE)


def by_opencv(gray: torch.Tensor):
    """(map, smooth, texture, mask) of [1,H,W]."""
    pytest.importorskip("cv2")
    from tests.support import opencv_complexity

    picture = gray[0].cpu().numpy()
    return opencv_complexity.complexity_map(picture), *opencv_complexity.attribute_ratios(picture)


def textures(b, h, w, seed=0):
    """From flat to noise, so that bins of all fillings occur."""
    torch.manual_seed(seed)
    gray = 0.5 + 0.5 * (torch.rand(b, h, w) - 0.5) * torch.linspace(0, 1, w) ** 2
    gray[:, : h // 3] = 0.5
    return gray.to(DEVICE)


def check(gray, patch_size=10, function=complexity_map):
    """Bins are counted: a rounding moves a pixel to the next bin, so a part in ten thousand is what fp32 can keep."""
    exact = complexity_map(gray.double(), patch_size, backend="torch")
    with poisoned():
        fused = function(gray, patch_size, backend="triton")
    assert fused.dtype == torch.float32 and relative_error(fused, exact) < 1e-4


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_is_what_opencv_computes(name, backend):
    gray = photo(name)[:, :300, :317]
    expected, their_smooth, _, their_mask = by_opencv(gray)
    got = complexity_map(gray, backend=backend)[0].cpu().numpy()
    assert np.abs(got - expected).mean() < 1e-3 * RANGE
    assert ((got > 50) == (expected > 50)).mean() >= 0.999
    smooth, texture, mask = attribute_ratios(gray, backend=backend)
    assert float(smooth) == pytest.approx(their_smooth, abs=0.0101) and float(texture) == pytest.approx(
        1 - float(smooth)
    )
    assert (mask[0].cpu().numpy() == their_mask).mean() >= 0.999


def test_fused_is_what_opencv_computes():
    gray = photo("astronaut")[:, 40:65, 180:213]
    expected, _, _, their_mask = by_opencv(gray)
    got = complexity_map(gray, backend="triton")[0].cpu().numpy()
    assert np.abs(got - expected).mean() < 1e-3 * RANGE
    _, _, mask = attribute_ratios(gray, backend="triton")
    assert (mask[0].cpu().numpy() == their_mask).mean() >= 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape, patch", [((2, 23, 37), 10), ((1, 10, 10), 10), ((1, 9, 2), 10), ((1, 70, 65), 33)])
def test_fused_is_as_good_as_fp64(shape, patch, dtype):
    check(textures(*shape).to(dtype), patch)


@pytest.fixture(params=["native", "matrices"])
def on_the_cpu(request, monkeypatch):
    """Both fast implementations of the CPU."""
    if request.param == "matrices":
        monkeypatch.setattr(complexity, "_complexity_cpu", None)
    elif complexity._complexity_cpu is None:
        pytest.skip("kernels/complexity_cpu.cpp is not built here (pip install -e . builds it)")


@pytest.mark.parametrize("shape, patch", [((2, 53, 87), 10), ((1, 9, 2), 10), ((3, 70, 65), 33), ((1, 150, 90), 70)])
def test_the_cpus_fast_paths_are_as_good_as_fp64(shape, patch, on_the_cpu):
    gray = textures(*shape).cpu()
    exact = complexity_map(gray.double(), patch, backend="torch")
    assert relative_error(complexity_map(gray, patch), exact) < 1e-4
    assert relative_error(complexity_map(strided(gray), patch), exact) < 1e-4
    assert relative_error(complexity_map(gray.requires_grad_(), patch), exact) < 1e-4
    assert relative_error(complexity_map(gray.double(), patch), exact) < 1e-9
    gray = gray.detach()
    for got, expected in zip(attribute_ratios(gray, patch), attribute_ratios(gray, patch, backend="torch")):
        torch.testing.assert_close(got, expected)


def test_native_takes_what_it_is_given():
    native = pytest.importorskip("gdpo.kernels._complexity_cpu")
    gray = torch.full((2, 12, 31), 1e30)
    gray[0, 0, 0] = float("nan")
    gray[1, ::2] = 0
    assert native.complexity_map(gray.numpy(), 10, 5).shape == gray.shape  # no bin beyond the last
    with pytest.raises(ValueError):
        native.complexity_map(gray[0].numpy(), 10, 1)
    with pytest.raises(TypeError):
        native.complexity_map(gray.double().numpy(), 10, 1)


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_ratios_are_shares_of_the_mask(backend):
    gray = textures(2, 13, 23)
    gray[1] = 0.25
    with poisoned():
        smooth, texture, mask = attribute_ratios(gray, threshold=200.0, backend=backend)
    assert mask.dtype == torch.bool and torch.equal(mask, complexity_map(gray.double(), backend="torch") > 200)
    share = mask.flatten(1).double().mean(1)
    assert 0 < share[0] < 1 and share[1] == 0
    torch.testing.assert_close(texture.double(), (share * 100).round() / 100, atol=1e-7, rtol=0)
    torch.testing.assert_close(smooth + texture, torch.ones_like(smooth))


@pytest.mark.parametrize("textured", [0, 1, 3, 7, 97, 199, 200])
def test_half_a_hundredth_goes_to_the_even_one(textured):
    """Of 200 pixels every odd number is a tie."""
    expected = [round(textured / 2) / 100, (100 - round(textured / 2)) / 100]  # Python rounds ties to even
    values = torch.zeros(1, 10, 20, dtype=torch.float64)
    values.view(-1)[:textured] = 1
    smooth, texture, _ = complexity._ratios(values, 0.5)
    assert [float(texture), float(smooth)] == pytest.approx(expected, abs=1e-12)
    areas = torch.tensor([[textured // 2, textured - textured // 2]], dtype=torch.int32, device=DEVICE)
    smooth, texture = torch.full((2, 1), float("nan"), device=DEVICE).unbind()
    complexity._ratios_fwd_kernel[(1,)](areas, smooth, texture, 2, 200, BLOCK=16)
    assert [float(texture), float(smooth)] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_same_bits_twice_and_any_order_in_memory(backend):
    gray = textures(1, 11, 13)
    first = complexity_map(gray, backend=backend)
    assert torch.equal(first, complexity_map(gray, backend=backend))
    assert torch.equal(first, complexity_map(strided(gray), backend=backend))
    assert torch.equal(first, complexity_map(gray.mT.contiguous().mT, backend=backend))


@pytest.mark.parametrize(
    "patch, old, new",
    [
        (10, "(position + 0.5) * size * 0.015625 - 0.5", "position * size * 0.015625"),
        (10, "return before + 2 * here + after, after - before", "return before + 1.9 * here + after, after - before"),
        (10, "BINS_PER_UNIT = 512 / 11", "BINS_PER_UNIT = 500 / 11"),
        (10, "area = ph * pw", "area = ph * PATCH"),
        (10, "dy = tl.dot(derive_y, ", "dy = tl.dot(smooth_y, "),
        (10, "inside = (column[:, None] < ph) &", "inside = (column[:, None] < ph - 1) &"),
        (33, "dy += derive_y[:, None]", "dy += smooth_y[:, None]"),
        (33, "tl.where(ph > k, pw, 0)", "tl.where(ph > k + 1, pw, 0)"),
    ],
)
def test_a_planted_fault_is_seen(patch, old, new, tmp_path):
    with pytest.raises(AssertionError):
        check(textures(1, 9, 13), patch, function=mutant(complexity, old, new, tmp_path).complexity_map)
