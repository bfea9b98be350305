"""attribute_statistics: against scikit-image and numpy, and the fused kernel against fp64."""

import pytest
import torch

from gdpo.kernels import attribute_statistics, statistics
from tests.support.fused import DEVICE, HALVES, assert_as_good, channels_last, mutant, poisoned, strided


def problem(b, g, h, w, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    target = torch.rand(b, 3, h, w) * 2 - 1
    samples = (target[:, None] + 0.1 * torch.randn(b, g, 3, h, w)).clamp(-1, 1)
    return samples.to(DEVICE, dtype), target.to(DEVICE, dtype), (torch.rand(b, h, w) > 0.3).to(DEVICE)


def check(args, function=attribute_statistics):
    samples, target, mask = args
    exact = attribute_statistics(samples.double(), target.double(), mask, backend="torch")
    plain = attribute_statistics(samples, target, mask, backend="torch")
    with poisoned():
        fused = function(samples, target, mask, backend="triton")
    for f, p, e in zip(fused, plain, exact):
        assert f.dtype == torch.float32 and f.shape == samples.shape[:2]
        if e.any():  # a picture of one pixel has no detail
            assert_as_good(f, p, e)
        else:
            assert not f.any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_psnr_and_detail_against_other_programs(backend):
    np = pytest.importorskip("numpy")
    color, data, metrics = (pytest.importorskip(f"skimage.{name}") for name in ("color", "data", "metrics"))
    photo = data.astronaut()[100:140, 80:210]
    rng = np.random.default_rng(0)
    noisy = np.clip(photo + rng.normal(0, 12, (2, *photo.shape)), 0, 255).astype(np.uint8)
    mask = np.zeros(photo.shape[:2], bool)
    mask[10:30, 20:101] = True
    to_tensor = lambda a: torch.from_numpy(a).movedim(-1, -3).float().to(DEVICE) / 127.5 - 1  # noqa: E731
    got = attribute_statistics(
        to_tensor(noisy)[None], to_tensor(photo)[None], torch.from_numpy(mask)[None].to(DEVICE), backend=backend
    )
    luma = color.rgb2ycbcr(photo)[..., 0] / 255
    for g in range(2):
        other = color.rgb2ycbcr(noisy[g])[..., 0] / 255
        assert float(got.psnr_y[0, g]) == pytest.approx(
            metrics.peak_signal_noise_ratio(luma, other, data_range=1), abs=1e-3
        )
        assert float(got.mse_texture[0, g]) == pytest.approx(((luma - other) ** 2)[mask].mean(), rel=1e-4)
        assert float(got.mse_smooth[0, g]) == pytest.approx(((luma - other) ** 2)[~mask].mean(), rel=1e-4)
        for field, y in (("target_detail", luma), ("detail", other)):
            dx = np.diff(y, axis=1, append=y[:, -1:])
            dy = np.diff(y, axis=0, append=y[-1:])
            size = np.hypot(dx, dy)
            assert float(getattr(got, f"{field}_texture")[0, g]) == pytest.approx(size[mask].mean(), rel=1e-4)
            assert float(getattr(got, f"{field}_smooth")[0, g]) == pytest.approx(size[~mask].mean(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", [(2, 3, 21, 150), (1, 6, 16, 128), (3, 2, 5, 3), (1, 1, 1, 1), (1, 2, 9, 257)])
def test_fused_is_as_good_as_torch(shape, dtype):
    check(problem(*shape, dtype))


def test_large_tiles(monkeypatch):
    monkeypatch.setattr(statistics, "_tile", lambda *_: (8, 4))
    check(problem(2, 2, 13, 131))


@pytest.mark.parametrize("order", [channels_last, strided])
def test_any_order_in_memory(order):
    samples, target, mask = problem(2, 2, 6, 10)
    plain = attribute_statistics(samples, target, mask, backend="triton")
    for args in ((order(samples), target, mask), (samples, order(target), strided(mask.float()) > 0.5)):
        check(args)
        for a, b in zip(attribute_statistics(*args, backend="triton"), plain):
            assert torch.equal(a, b)
    check((samples, target, torch.stack((mask[0], mask[0])).transpose(0, 1).contiguous().transpose(0, 1)))


def test_types_may_differ():
    samples, target, mask = problem(1, 2, 10, 12)
    check((samples.half(), target, mask))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_kind_without_pixels_takes_the_whole_picture(backend):
    samples, target, _ = problem(2, 3, 20, 24)
    mask = torch.zeros(2, 20, 24, dtype=torch.bool, device=DEVICE)
    mask[1] = True
    got = attribute_statistics(samples, target, mask, backend=backend)
    torch.testing.assert_close(got.mse, got.mse_texture)
    torch.testing.assert_close(got.mse, got.mse_smooth)
    torch.testing.assert_close(got.detail_smooth, got.detail_texture)
    torch.testing.assert_close(got.target_detail_smooth, got.target_detail_texture)
    torch.testing.assert_close(got.fidelity, got.psnr_y)
    assert got.detail.isfinite().all() and (got.detail < 0).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_scores_prefer_what_they_should(backend):
    _, target, mask = problem(1, 1, 40, 40)
    target = torch.nn.functional.avg_pool2d(target, 3, 1, 1)
    blurred = torch.nn.functional.avg_pool2d(target, 3, 1, 1)
    sharpened = (2 * target - blurred).clamp(-1, 1)
    got = attribute_statistics(torch.stack((target, blurred, sharpened), 1), target, mask, backend=backend)
    perfect = [float(score[0, 0]) for score in (got.psnr_y, got.fidelity, got.detail)]
    assert perfect == pytest.approx([100, 100, 0], abs=1e-4)  # finite
    assert (got.detail[0, 1:] < -0.1).all()  # too little and too much are both worse
    assert got.detail_texture[0, 1] < got.detail_texture[0, 0] < got.detail_texture[0, 2]


def test_no_gradient_and_the_same_bits_twice():
    samples, target, mask = problem(1, 2, 9, 140)
    first = attribute_statistics(samples.requires_grad_(), target, mask, backend="triton")
    for a, b in zip(first, attribute_statistics(samples, target, mask, backend="triton")):
        assert not a.requires_grad and torch.equal(a, b)
    assert not attribute_statistics(samples, target, mask, backend="torch").mse.requires_grad


def test_without_a_fault_the_copy_passes(tmp_path):
    copy = mutant(statistics, "COLUMNS = 128", "COLUMNS = 128", tmp_path)
    check(problem(1, 2, 6, 130), copy.attribute_statistics)


@pytest.mark.parametrize(
    "old, new",
    [
        ("return R * r + G * g + B * b", "return R * r + G * b + B * g"),
        ("tl.join(second, following)", "tl.join(second, third)"),
        ("+ 4 * tl.arange(0, COLUMNS // 4)[None, :] + 4", "+ 4 * tl.arange(0, COLUMNS // 4)[None, :] + 5"),
        ("tl.where(x + 1 < width, dx, 0.0)", "dx"),
        ("has_below = (y + 1 < height) & (x < width)", "has_below = (y + 2 < height) & (x < width)"),
        ("smooth = inside.to(tl.float32) - textured", "smooth = 1 - textured"),
        ("source += sample_g", "source += 0"),
        ("-(-h // rows) * tiles_x", "(h // rows) * tiles_x"),
    ],
)
def test_a_planted_fault_is_seen(old, new, tmp_path):
    with pytest.raises(AssertionError):
        check(problem(1, 2, 6, 130), mutant(statistics, old, new, tmp_path).attribute_statistics)


def test_rows_may_lie_far_apart():
    """Beyond 2^31 elements: a view of something larger."""
    samples, target, mask = problem(1, 2, 3, 4, torch.float16)
    far, height = torch.empty(2 * 2**30 + 4096, dtype=torch.float16, device=DEVICE), 3
    try:
        spread = far.as_strided((1, 2, 3, height, 4), (64, 16, 4, 2**30 + 32, 1))
    except RuntimeError as error:
        pytest.skip(f"no room for its addresses: {error}")
    spread.copy_(samples)
    expected = attribute_statistics(samples, target, mask, backend="triton")
    for a, b in zip(attribute_statistics(spread, target, mask, backend="triton"), expected):
        assert torch.equal(a, b)
