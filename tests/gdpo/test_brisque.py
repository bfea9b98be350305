"""BRISQUE against its paper, written out with scipy; its model's files are read without executing anything."""

import math
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage, optimize, signal, special
from skimage import data

from gdpo.scores.metrics.brisque_model import BrisqueModel, brisque, features, load_brisque
from gdpo.scores.registry import SCORES, Unavailable


def ratio(a):
    return special.gamma(2 / a) ** 2 / (special.gamma(1 / a) * special.gamma(3 / a))


def shape(value):
    return optimize.brentq(lambda a: ratio(a) - value, 0.2, 10)


def paper(y):
    """18 features of a luma picture, fp64 in 0..255 (equations 1 to 15)."""
    t = np.arange(-3, 4)
    window = np.exp(-(t[:, None] ** 2 + t**2) / 2 / (7 / 6) ** 2)
    window /= window.sum()
    mean = signal.convolve2d(y, window, "same")
    deviation = np.sqrt(np.abs(signal.convolve2d(y * y, window, "same") - mean**2))
    m = (y - mean) / (deviation + 1)
    out = [shape(np.abs(m).mean() ** 2 / (m * m).mean()), (m * m).mean()]
    for dy, dx in ((0, 1), (1, 0), (1, 1), (-1, 1)):
        p = m * np.roll(m, (dy, dx), (0, 1))
        left, right = math.sqrt((p[p < 0] ** 2).mean()), math.sqrt((p[p > 0] ** 2).mean())
        g = left / right
        r = np.abs(p).mean() ** 2 / (p * p).mean() * (g**3 + 1) * (g + 1) / (g * g + 1) ** 2
        a = shape(r)
        spread = math.sqrt(special.gamma(1 / a) / special.gamma(3 / a))
        eta = (right - left) * spread * special.gamma(2 / a) / special.gamma(1 / a)
        out += [a, eta, left**2, right**2]
    return out


def test_features_are_the_papers():
    photo = data.chelsea()[40:168, 60:200]
    got = features(torch.from_numpy(photo.copy()).permute(2, 0, 1)[None] / 255)[0].numpy()
    gray = photo @ np.array([0.298936021293775, 0.587043074451121, 0.114020904255103])
    half = got[18:]
    np.testing.assert_allclose(got[:18], paper(gray), rtol=5e-3, atol=5e-4)  # shapes lie on a grid of 0.001
    assert half.shape == (18,) and not np.allclose(half, got[:18], rtol=0.05)


def test_the_regression_is_a_sum_over_support_vectors():
    generator = torch.Generator().manual_seed(0)
    low, high = -torch.ones(36, dtype=torch.float64), torch.full((36,), 3.0, dtype=torch.float64)
    vectors, weights = torch.randn(5, 36, generator=generator).double(), torch.randn(5, generator=generator).double()
    model = BrisqueModel(low, high, vectors, weights, 0.05, -2.0)
    x = torch.rand(2, 3, 48, 40, generator=generator)
    for picture, got in zip(x, brisque(x, model)):
        f = [2 * (v + 1) / 4 - 1 for v in features(picture[None])[0].tolist()]
        total = 2.0
        for vector, weight in zip(vectors.tolist(), weights.tolist()):
            total += weight * math.exp(-0.05 * sum((a - b) ** 2 for a, b in zip(f, vector)))
        assert float(got) == pytest.approx(total, rel=1e-9)


def test_more_of_a_fault_scores_worse_and_nothing_is_nan():
    if not _installed():
        pytest.skip("needs the package brisque (pip install --no-deps brisque)")
    photo = data.astronaut()[:256, 60:316].astype(float)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(photo.shape)
    copies = [photo, photo + 10 * noise, photo + 30 * noise, ndimage.gaussian_filter(photo, (2, 2, 0))]
    x = torch.stack([torch.from_numpy(c).permute(2, 0, 1) for c in copies]).float().clamp(0, 255) / 255
    clean, some, more, blurred = brisque(x).tolist()
    assert clean < some < more and clean + 10 < blurred and -40 < clean < 30 and max(more, blurred) < 120
    assert brisque(torch.full((1, 3, 64, 64), 0.5)).isfinite().all()
    torch.testing.assert_close(brisque(x)[1:2], brisque(x[1:2]))


def _installed() -> bool:
    try:
        return bool(load_brisque())
    except FileNotFoundError:
        return False


SVM = "svm_type epsilon_svr\nkernel_type rbf\ngamma 0.05\nnr_class 2\ntotal_sv 1\nrho -1.5\nSV\n-2 1:0.5 36:-1\n"


class Evil:
    def __reduce__(self):
        return sys.exit, (3,)


def test_files_are_read_and_not_executed(tmp_path: Path):
    (tmp_path / "svm.txt").write_text(SVM)
    ranges = {"min_": [0.5 * i for i in range(36)], "max_": [0.5 * i + 1 for i in range(36)]}
    (tmp_path / "normalize.pickle").write_bytes(pickle.dumps(ranges))
    model = load_brisque(tmp_path)
    assert model.low.tolist() == ranges["min_"] and model.high.tolist() == ranges["max_"]
    assert model.vectors[0, [0, 35]].tolist() == [0.5, -1] and model.weights.tolist() == [-2] and model.rho == -1.5
    for wrong, message in ((Evil(), "holds more than numbers"), ({"min_": [0.5]}, "must hold min_ and max_ of 36")):
        load_brisque.cache_clear()
        (tmp_path / "normalize.pickle").write_bytes(pickle.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            load_brisque(tmp_path)
    (tmp_path / "svm.txt").write_text(SVM.replace("total_sv 1", "total_sv 2"))
    with pytest.raises(ValueError, match="not a regression of libsvm"):
        load_brisque(tmp_path)


def test_without_the_package_the_command_is_named(monkeypatch):
    load_brisque.cache_clear()
    monkeypatch.setattr("gdpo.scores.metrics.brisque_model.find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="pip install --no-deps brisque"):
        SCORES["brisque"].build(torch.device("cpu"))
    load_brisque.cache_clear()
