"""Textures and panoramas: opposite edges still meet after upscaling."""

import numpy as np
import pytest

from engine.io.images import Picture, read_image
from engine.runtime.resample import resize
from engine.wrap import resize_wrapped, upscale_wrapped
from tests.support.pictures import save


@pytest.fixture
def texture() -> np.ndarray:
    """[64,96,3] uint8, periodic: a sum of whole waves."""
    random = np.random.default_rng(3)
    y, x = np.mgrid[:64, :96]
    waves = [(random.integers(1, 12), random.integers(1, 12), random.uniform(0, 6.3, 3)) for _ in range(24)]
    total = sum(np.cos(2 * np.pi * (a * y / 64 + b * x / 96)[..., None] + phase) for a, b, phase in waves)
    return np.rint(127.5 + 127.5 * total / np.abs(total).max()).astype(np.uint8)


def jumps(pixels: np.ndarray) -> tuple[float, float]:
    """The step over the upper/lower and the left/right seam, over the mean step inside."""
    a = pixels.astype(float)

    def over(axis: int) -> float:
        seam = np.abs(a.take(0, axis) - a.take(-1, axis)).mean()
        return seam / np.abs(np.diff(a, axis=axis)).mean()

    return over(0), over(1)


@pytest.mark.parametrize("scale", ["4", "2.5"])
def test_edges_meet(run, texture, tmp_path, scale):
    source, out = save(tmp_path / "t.png", texture), tmp_path / "o.png"
    sides = (round(64 * float(scale)), round(96 * float(scale)))

    def result(*options) -> np.ndarray:
        code, _, err = run(source, out, "-s", scale, "--overwrite", *options)
        assert code == 0, err
        pixels = read_image(out).pixels
        assert pixels.shape[:2] == sides
        return pixels

    plain, wrapped, panorama = result(), result("--wrap"), result("--wrap-x")
    assert max(jumps(wrapped)) < 1.5 < min(jumps(plain))
    assert jumps(panorama)[1] < 1.5 < jumps(panorama)[0]
    inner = np.s_[sides[0] // 4 : -sides[0] // 4, sides[1] // 4 : -sides[1] // 4]
    difference = np.abs(wrapped[inner].astype(int) - plain[inner]).mean()
    assert difference < 12  # the same picture, from other noise


def test_what_was_computed_on_the_other_side_of_a_seam_is_faded_in(texture):
    """A model that draws other values at each place: without the fade the seam is a step of noise."""

    def model(picture: Picture) -> Picture:
        large = picture.pixels.repeat(4, 0).repeat(4, 1).astype(int)
        ramp = np.linspace(0, 60, large.shape[1]).astype(int)[None, :, None]
        return Picture(np.clip(large // 2 + ramp, 0, 255).astype(np.uint8))

    flat = Picture(np.full((64, 96, 3), 100, np.uint8), alpha=np.full((64, 96), 200, np.uint8))
    flat = Picture(flat.pixels)
    result = upscale_wrapped(flat, model, 4, (256, 384), vertical=False).pixels.astype(int)
    assert result.shape == (256, 384, 3)
    assert np.abs(np.diff(np.concatenate([result, result[:, :1]], axis=1), axis=1)).max() <= 3
    plain = model(flat).pixels.astype(int)
    assert np.abs(plain[:, 0] - plain[:, -1]).max() > 50


def test_small_pictures_wrap_as_often_as_it_takes(texture):
    def model(picture: Picture) -> Picture:
        alpha = None if picture.alpha is None else picture.alpha.repeat(4, 0).repeat(4, 1)
        return Picture(picture.pixels.repeat(4, 0).repeat(4, 1), alpha=alpha)

    for height, width in ((1, 1), (3, 70)):
        small = Picture(texture[:height, :width].copy(), alpha=texture[:height, :width, 0].copy())
        result = upscale_wrapped(small, model, 4, (4 * height, 4 * width), vertical=True)
        np.testing.assert_array_equal(result.pixels, model(small).pixels)
        np.testing.assert_array_equal(result.alpha, model(small).alpha)


@pytest.mark.parametrize("size", [(48, 72), (100, 96), (64, 150), (7, 5)])
def test_resizing_around_the_edges_is_that_of_the_middle_of_nine_copies(texture, size):
    nine = np.tile(texture, (3, 3, 1))
    expected = resize(nine, (3 * size[0], 3 * size[1]))[size[0] : 2 * size[0], size[1] : 2 * size[1]]
    result = resize_wrapped(texture, size, (0, 1))
    assert np.abs(result.astype(int) - expected).max() <= 1  # each axis is rounded
    np.testing.assert_array_equal(resize_wrapped(texture[..., 0], size, (0, 1)), result[..., 0])
    lines = resize_wrapped(texture, (64, size[1]), (1,))
    expected = resize(np.tile(texture, (1, 3, 1)), (64, 3 * size[1]))[:, size[1] : 2 * size[1]]
    assert np.abs(lines.astype(int) - expected).max() <= 1
