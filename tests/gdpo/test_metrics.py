"""Metrics against independent computations: scikit-image, scipy, a plain loop, and published values."""

import csv
import math
import os
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import scipy.special
import torch
import torch.nn.functional as F
from PIL import Image

from gdpo.scores.metrics import (
    flat_hatch,
    grid_artefact,
    lattice_artefact,
    load_niqe,
    niqe,
    oversharpening,
    piqe,
    psnr_y,
    ssim_y,
)
from gdpo.scores.metrics.fit import blur, low_octaves, pattern
from gdpo.scores.metrics.niqe_model import niqe_features

skimage_data = pytest.importorskip("skimage.data")
skimage_metrics = pytest.importorskip("skimage.metrics")


def tensor(*pictures):
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def photos():
    """[4,3,256,256] in [0,1]."""
    names = (("astronaut", 0, 128), ("coffee", 100, 150), ("chelsea", 20, 100), ("rocket", 100, 200))
    return tensor(*(getattr(skimage_data, n)()[y : y + 256, x : x + 256] for n, y, x in names))


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


def luma(x):
    """[3,H,W] in [0,1] -> float64 Y of the 8-bit picture, by the BT.601 matrix of scikit-image's definition."""
    r, g, b = (x.double() * 255).round().numpy() / 255
    return 65.481 * r + 128.553 * g + 24.966 * b + 16


def test_psnr_is_that_of_scikit_image(photos, g):
    other = (photos + 0.05 * torch.randn(photos.shape, generator=g)).clamp(0, 1)
    got = psnr_y(other, photos)
    want = [
        skimage_metrics.peak_signal_noise_ratio(luma(y) / 255, luma(x) / 255, data_range=1)
        for x, y in zip(other, photos)
    ]
    assert got.tolist() == pytest.approx(want, abs=1e-4)
    assert psnr_y(photos, photos).tolist() == pytest.approx([80.0] * 4)


def test_ssim_is_that_of_scikit_image(photos, g):
    other = (photos + 0.05 * torch.randn(photos.shape, generator=g)).clamp(0, 1)
    got = ssim_y(other, photos)
    for k in range(4):
        a, b = luma(other[k]).round(), luma(photos[k]).round()
        _, full = skimage_metrics.structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, full=True
        )
        assert got[k].item() == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-6)


@pytest.mark.skipif(not os.environ.get("GDPO_REALSR"), reason="GDPO_REALSR names no folder with the RealSR pictures")
def test_published_values_to_four_decimals():
    """PSNR and SSIM that the authors of OSEDiff published for ten of their outputs."""
    root = Path(os.environ["GDPO_REALSR"])

    def read(path):
        return tensor(np.asarray(Image.open(path).convert("RGB")))

    with open(root / "OSEDiff" / "official_metrics.csv") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 10
    for row in rows:
        x, y = (read(root / folder / row["image"]) for folder in ("OSEDiff", "HR"))
        assert psnr_y(x, y).item() == pytest.approx(float(row["PSNR"]), abs=5e-5)
        assert ssim_y(x, y).item() == pytest.approx(float(row["SSIM"]), abs=5e-5)


def niqe_by_hand(picture):
    """The 18 features of the first scale of the first 96x96 block, with scipy and no batching."""
    y = luma(picture).round()[:192, :192]
    t = np.arange(-3, 4)
    window = np.exp(-(t[:, None] ** 2 + t[None] ** 2) / 2 / (7 / 6) ** 2)
    window /= window.sum()
    mean = scipy.ndimage.correlate(y, window, mode="nearest")
    deviation = np.sqrt(np.abs(scipy.ndimage.correlate(y * y, window, mode="nearest") - mean**2))
    block = ((y - mean) / (deviation + 1))[:96, :96]
    gamma = scipy.special.gamma
    shapes = np.arange(0.2, 10.001, 0.001)
    table = gamma(2 / shapes) ** 2 / (gamma(1 / shapes) * gamma(3 / shapes))

    def fit(v):
        left, right = np.sqrt((v[v < 0] ** 2).mean()), np.sqrt((v[v > 0] ** 2).mean())
        q = left / right
        r = np.abs(v).mean() ** 2 / (v**2).mean() * (q**3 + 1) * (q + 1) / (q**2 + 1) ** 2
        a = shapes[np.argmin((table - r) ** 2)]
        scale = np.sqrt(gamma(1 / a) / gamma(3 / a))
        return a, left * scale, right * scale

    a, bl, br = fit(block)
    out = [a, (bl + br) / 2]
    for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
        a, bl, br = fit(block * np.roll(block, shift, (0, 1)))
        out += [a, (br - bl) * gamma(2 / a) / gamma(1 / a), bl, br]
    return np.array(out)


def test_niqe_features_are_the_definition(photos):
    got = niqe_features(photos[:2], 96)
    assert got.shape == (2, 4, 36)
    for k in range(2):
        assert got[k, 0, :18].numpy() == pytest.approx(niqe_by_hand(photos[k]), abs=1.1e-3)  # the table's step


def test_niqe_halves_as_bicubic_with_antialias():
    from gdpo.scores.metrics.niqe_model import half

    y = torch.rand(1, 48, 64, dtype=torch.float64)
    want = F.interpolate(y[:, None], scale_factor=0.5, mode="bicubic", antialias=True)[:, 0]
    got = half(y)
    torch.testing.assert_close(got[:, 2:-2, 2:-2], want[:, 2:-2, 2:-2], rtol=0, atol=1e-6)
    assert got.shape == (1, 24, 32)


@pytest.mark.parametrize("model", ["photos", "photos-32"])
def test_niqe_rises_with_blur_and_noise(photos, g, model):
    clean = niqe(photos, model).mean()
    assert niqe(low_octaves(photos), model).mean() > 1.2 * clean
    assert niqe((photos + 0.1 * torch.randn(photos.shape, generator=g)).clamp(0, 1), model).mean() > 1.2 * clean


def test_niqe_reads_other_projects_files(photos, tmp_path):
    shipped = load_niqe("photos")
    np.savez(tmp_path / "niqe_pris_params.npz", mu_pris_param=shipped.mean, cov_pris_param=shipped.covariance)
    scipy.io.savemat(
        tmp_path / "modelparameters.mat",
        {"mu_prisparam": shipped.mean.numpy()[None], "cov_prisparam": shipped.covariance.numpy()},
    )
    for name in ("niqe_pris_params.npz", "modelparameters.mat"):
        model = load_niqe(str(tmp_path / name))
        assert model.name == name.split(".")[0] and model.block == 96
        torch.testing.assert_close(niqe(photos[:1], model), niqe(photos[:1]))


def test_niqe_bad_files_are_named(tmp_path, photos):
    np.savez(tmp_path / "x.npz", mu=np.zeros(36))
    with pytest.raises(ValueError, match=r"x\.npz is no NIQE model: it must hold mu_pris_param and cov_pris_param"):
        load_niqe(str(tmp_path / "x.npz"))
    with pytest.raises(
        ValueError, match=r"one of photos, photos-32, or a .mat or .npz file that exists; got 'nothing'"
    ):
        load_niqe("nothing")
    with pytest.raises(ValueError, match=r"needs two blocks of 96x96; got \(1, 3, 128, 128\)"):
        niqe(photos[:1, :, :128, :128])
    assert niqe(torch.full((1, 3, 192, 192), 0.5)).isnan().all()


def piqe_by_hand(picture):
    """MATLAB's procedure, block after block."""
    gray = np.round(np.tensordot([0.298936021293775, 0.587043074451121, 0.114020904255103], picture, 1))
    gray = np.pad(gray, [(0, -n % 16) for n in gray.shape], mode="edge")
    t = np.arange(-3, 4)
    window = np.exp(-(t[:, None] ** 2 + t[None] ** 2) / 2 / (7 / 6) ** 2)
    window /= window.sum()
    mean = scipy.ndimage.correlate(gray, window, mode="nearest")
    spread = np.sqrt(np.abs(scipy.ndimage.correlate(gray * gray, window, mode="nearest") - mean**2))
    normal = (gray - mean) / (spread + 1)
    total, active = 0.0, 0
    for i in range(0, normal.shape[0], 16):
        for j in range(0, normal.shape[1], 16):
            block = normal[i : i + 16, j : j + 16]
            variance = block.var(ddof=1)
            if variance <= 0.1:
                continue
            active += 1
            edges = (block[0], block[-1], block[:, 0], block[:, -1])
            if any(edge[k : k + 6].std(ddof=1) < 0.1 for edge in edges for k in range(11)):
                total += 1 - variance
            center = block[:, [7, 8]].std(ddof=1)
            surround = np.delete(np.delete(block, 7, axis=1), 8, axis=1).std(ddof=1)
            sigma, ratio = np.sqrt(variance), center / surround
            if sigma > 2 * abs(sigma - ratio) / max(sigma, ratio):
                total += variance
    return 100 * (total + 1) / (active + 1)


def test_piqe_is_matlabs_procedure(photos, g):
    noisy = (photos + 0.05 * torch.randn(photos.shape, generator=g)).clamp(0, 1)
    x = torch.cat([photos[:2], noisy[2:], blur(photos, 1.5)[1:2]])[:, :, :250, :245]
    want = [piqe_by_hand((p * 255).round().double().numpy()) for p in x]
    assert piqe(x).tolist() == pytest.approx(want, abs=1e-8)
    assert piqe(torch.zeros(1, 3, 32, 32)).tolist() == [100.0]


# ---- artefacts ----


@pytest.mark.parametrize("period", [2, 4, 8])
def test_a_planted_grid_is_found_at_its_amplitude(photos, g, period):
    clean = grid_artefact(photos)
    assert clean.median() < 0.3
    for amplitude in (1.0, 2.0, 4.0):
        planted = pattern(photos * 255, period, amplitude, g) / 255
        # luma of equal RGB steps is 219/255 of them
        assert grid_artefact(planted, photos).mean().item() == pytest.approx(0.859 * amplitude, rel=0.15)
        assert (grid_artefact(planted) > clean + 0.3).all()


def test_a_grid_on_a_smooth_picture_is_found_where_bicubic_has_none(photos, g):
    smooth = low_octaves(photos)
    assert (grid_artefact(smooth, photos) < 0.3).all()
    assert (grid_artefact(pattern(smooth * 255, 4, 1.0, g) / 255, photos) > 0.6).all()


def test_noise_and_an_odd_period_are_no_grid(photos, g):
    noisy = (photos + 0.02 * torch.randn(photos.shape, generator=g)).clamp(0, 1)
    assert grid_artefact(noisy, photos).median() < 0.3
    assert grid_artefact(pattern(photos * 255, 5, 2.0, g) / 255, photos).median() < 0.3
    assert torch.equal(grid_artefact(photos, photos), torch.zeros(4))


def test_dots_in_texture_are_found_where_the_grid_figure_is_blind(photos, g):
    detail = photos - blur(photos, 1.5)
    dots = pattern(torch.zeros_like(photos), 4, 1.0, g) / 255
    dotted = (photos + 30 * dots * detail.abs().amax(1, keepdim=True)).clamp(0, 1)
    assert (lattice_artefact(dotted, photos) > 1).all()
    assert (grid_artefact(dotted, photos) < 0.5).all()
    assert torch.equal(lattice_artefact(photos, photos), torch.zeros(4))


def test_a_hatch_in_flat_areas_is_found_in_any_direction_and_grain_is_none(photos, g):
    soft = blur(photos, 2.0)
    grain = (soft + 0.01 * torch.randn(photos.shape, generator=g)).clamp(0, 1)
    y, x = torch.meshgrid(torch.arange(photos.shape[2]), torch.arange(photos.shape[3]), indexing="ij")
    for wave in (x + y, x, x - y):
        hatched = grain + 1.5 / 255 * torch.cos(math.pi / 2 * wave)
        assert (flat_hatch(hatched, soft) > flat_hatch(grain, soft) + 5).all()
    assert (flat_hatch(grain, soft) < 5).all()
    assert torch.equal(flat_hatch(soft, soft), torch.zeros(4))


def test_neither_blur_nor_noise_makes_dots(photos, g):
    noisy = (photos + 0.02 * torch.randn(photos.shape, generator=g)).clamp(0, 1)
    assert (lattice_artefact(noisy, photos) < 1).all()
    assert (lattice_artefact(blur(photos, 1.0), photos) < 1).all()
    assert (lattice_artefact(noisy) < 2).all()


@pytest.mark.parametrize("sigma", [1.0, 2.0])
@pytest.mark.parametrize("with_reference", [True, False])
def test_oversharpening_rises_with_the_unsharp_mask(photos, sigma, with_reference):
    edge = photos - blur(photos, sigma)
    steps = [(photos + amount * edge).clamp(0, 1) for amount in (0, 0.25, 0.5, 1.0, 1.5)]
    figures = torch.stack([oversharpening(x, photos if with_reference else None) for x in steps])
    assert all((b > a).all() for a, b in pairwise(figures)), figures
    if with_reference:
        assert figures[0].tolist() == [0.0] * 4


def test_oversharpening_ignores_blur_and_mild_noise(photos, g):
    assert (oversharpening(low_octaves(photos), photos) < 0.2).all()
    noisy = (photos + 0.01 * torch.randn(photos.shape, generator=g)).clamp(0, 1)
    assert (oversharpening(noisy, photos) < 1).all()
    assert oversharpening(torch.zeros(1, 3, 40, 40)).item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: psnr_y(x, x[:, :, 1:]), "x and y must have one shape; y is (4, 3, 255, 256), not (4, 3, 256, 256)"),
        (lambda x: ssim_y(x[:, :, :10], x[:, :, :10]), "sides of at least 11; got (4, 3, 10, 256)"),
        (lambda x: piqe(x[0]), "x must be [N,3,H,W] with sides of at least 16; got (3, 256, 256)"),
        (lambda x: grid_artefact(x[:, :, :33, :63]), "a side of at least 64; got (4, 3, 33, 63)"),
        (
            lambda x: lattice_artefact(x[:, :, :31]),
            "x must be [N,3,H,W] with sides of at least 32; got (4, 3, 31, 256)",
        ),
        (lambda x: oversharpening(x, x[:2]), "reference is (2, 3, 256, 256)"),
    ],
)
def test_bad_input_is_named(photos, call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(photos)
