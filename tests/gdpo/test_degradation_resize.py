"""Resizes against OpenCV, Pillow and the definition of the area filter."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from gdpo.degradation.resize import resize

SIZES = [((40, 56), (23, 70)), ((33, 47), (33, 20)), ((24, 24), (96, 96)), ((64, 48), (16, 12))]


def image(size):
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(size[0]))


@pytest.mark.parametrize(("old", "new"), SIZES)
@pytest.mark.parametrize(("mode", "flag"), [("bilinear", cv2.INTER_LINEAR), ("bicubic", cv2.INTER_CUBIC)])
def test_plain_filters_equal_opencv(old, new, mode, flag):
    x = image(old)
    expected = cv2.resize(np.ascontiguousarray(x[0].permute(1, 2, 0).numpy()), new[::-1], interpolation=flag)
    np.testing.assert_allclose(resize(x, new, mode)[0].permute(1, 2, 0).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_area_is_the_mean_of_the_touched_pixels(old, new):
    x = image(old)
    got = resize(x, new, "area")
    bounds = [[(k * o // n, -(-(k + 1) * o // n)) for k in range(n)] for o, n in zip(old, new)]
    for i in range(0, new[0], 5):
        for j in range(0, new[1], 5):
            (top, bottom), (left, right) = bounds[0][i], bounds[1][j]
            assert torch.allclose(got[0, :, i, j], x[0, :, top:bottom, left:right].mean((1, 2)), atol=1e-6)


@pytest.mark.parametrize(("old", "new"), SIZES)
@pytest.mark.parametrize(
    ("mode", "filter"), [("bilinear_antialias", Image.BILINEAR), ("bicubic_antialias", Image.BICUBIC)]
)
def test_antialiased_filters_equal_pillow(old, new, mode, filter):
    x = image(old)
    got = resize(x, new, mode)[0]
    for plane, result in zip(x[0], got):
        expected = np.asarray(Image.fromarray(plane.numpy()).resize(new[::-1], filter))
        np.testing.assert_allclose(result.numpy(), expected, atol=5e-6)


def test_keeping_the_size_keeps_the_pixels():
    x = image((16, 20))
    assert resize(x, (16, 20), "bicubic") is x
