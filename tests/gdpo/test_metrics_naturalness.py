"""Naturalness must rank a photo above its own copies with the faults that preference tuning is known to bring.

Judged on crops of scikit-image's photos, which its parameters were not fitted on.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch

from gdpo.scores.metrics import naturalness
from gdpo.scores.metrics.fit import blur, low_octaves, pattern


@pytest.fixture(scope="module")
def crops():
    """[N,3,128,128] in 0..255 from four photos."""
    skimage = pytest.importorskip("skimage.data")
    out = []
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        photo = getattr(skimage, name)()
        out += [
            photo[y : y + 128, x : x + 128]
            for y in range(0, photo.shape[0] - 127, 128)
            for x in range(0, photo.shape[1] - 127, 128)
        ]
    x = torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).float()
    gradient = (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3))
    return x[gradient > 2]  # the rest is empty background


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


FAULTS = {
    "noise 4/255": lambda x, g: x + 4 * torch.randn(x.shape, generator=g),
    "gray noise 6/255": lambda x, g: x + 6 * torch.randn(x[:, :1].shape, generator=g),
    "blur 1.5": lambda x, g: blur(x, 1.5),
    "bicubic x4": lambda x, g: low_octaves(x),
    "grid 2": lambda x, g: pattern(x, 2, 1.5, g),
    "grid 4": lambda x, g: pattern(x, 4, 1.5, g),
    "grid 8": lambda x, g: pattern(x, 8, 2.0, g),
    "colour grid 4": lambda x, g: pattern(x, 4, 2.0, g, gray=False),
    "sharpened": lambda x, g: x + 1.5 * (x - blur(x, 1)),
    "sharpened, wide": lambda x, g: x + 1.0 * (x - blur(x, 2)),
    "grid 4 on bicubic": lambda x, g: pattern(low_octaves(x), 4, 1.5, g),
    "noise on bicubic": lambda x, g: low_octaves(x) + 5 * torch.randn(x.shape, generator=g),
    "sharpened bicubic": lambda x, g: low_octaves(x) + 2 * (low_octaves(x) - blur(low_octaves(x), 2)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_photo_ranks_above_its_faulty_copy(crops, g, fault):
    faulty = naturalness((FAULTS[fault](crops, g) / 255).clamp(0, 1))
    assert len(crops) > 30
    assert (faulty < naturalness(crops / 255)).float().mean() >= 0.9


@pytest.mark.parametrize("fault", ["grid 4", "noise 4/255", "sharpened"])
def test_more_of_a_fault_is_worse(crops, g, fault):
    crops = crops[:12]
    whole = FAULTS[fault](crops, g)
    means = [naturalness((torch.lerp(crops, whole, u) / 255).clamp(0, 1)).mean() for u in (0, 0.5, 1, 3)]
    assert all(b < a for a, b in pairwise(means)), means


def test_batches_sizes_and_halves_of_the_picture_do_not_matter_to_each_other(crops):
    x = crops[:5] / 255
    alone = torch.cat([naturalness(p[None]) for p in x])
    torch.testing.assert_close(naturalness(x), alone, rtol=1e-4, atol=1e-4)
    assert naturalness(x[:, :, :100, :77]).isfinite().all()


def test_flat_and_extreme_pictures_have_finite_scores():
    for value in (0.0, 0.5, 1.0):
        assert naturalness(torch.full((1, 3, 64, 64), value)).isfinite().all()
    assert naturalness(torch.randint(0, 2, (1, 3, 64, 64)).float()).isfinite().all()


def test_too_small_is_named():
    with pytest.raises(ValueError, match=r"x must be \[N,3,H,W\] with sides of at least 64; got \(1, 3, 63, 64\)"):
        naturalness(torch.zeros(1, 3, 63, 64))
    with pytest.raises(TypeError, match=r"float tensor .* got torch.uint8"):
        naturalness(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
