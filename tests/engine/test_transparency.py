"""Nothing under transparent pixels shows; masks go through the model; gray stays neutral."""

import numpy as np
import pytest
from PIL import Image

from engine import Upscaler
from engine.io.images import ImageError, Picture, read_image, write_image
from engine.pictures import fill_hidden, flatten, parse_background, upscale_picture

COLOUR = (200, 40, 40)


@pytest.fixture(scope="module")
def up():
    return Upscaler.load(threads=1)  # the bundled model


def disc(size=48, radius=15.3, supersample=8):
    """An antialiased disc, [size, size] in [0, 1]."""
    y, x = (np.mgrid[0 : size * supersample, 0 : size * supersample] + 0.5) / supersample - size / 2
    return (np.hypot(y, x) < radius).reshape(size, supersample, size, supersample).mean((1, 3))


def picture_of(mask, hidden, dtype=np.uint8):
    """A disc of one colour; wherever nothing of it is seen, the pixels hold `hidden`."""
    full = np.iinfo(dtype).max
    pixels = np.full((*mask.shape, 3), COLOUR, np.float64)
    pixels[mask == 0] = (
        np.random.default_rng(0).integers(0, 256, (*mask.shape, 3))[mask == 0] if hidden is None else hidden
    )
    return Picture(np.rint(pixels * (full / 255)).astype(dtype), alpha=np.rint(mask * full).astype(dtype))


@pytest.mark.parametrize("color", ["wavelet", "adain", "none"])
@pytest.mark.parametrize("soft", [False, True])
def test_visible_colours_do_not_depend_on_hidden_ones(up, color, soft):
    mask = disc() if soft else np.rint(disc())
    results = [upscale_picture(up, picture_of(mask, hidden), color=color) for hidden in (255, 0, COLOUR, None)]
    for result in results[1:]:
        assert np.array_equal(result.pixels, results[0].pixels) and np.array_equal(result.alpha, results[0].alpha)
    if color == "none":  # the model's own shift
        return
    weight = results[0].alpha[..., None] / 255
    shift = (results[0].pixels.astype(float) - COLOUR) * weight
    assert np.abs(shift).max() <= 8
    assert np.abs(shift.sum((0, 1)) / weight.sum()).max() <= 1


def test_a_result_that_used_hidden_colours_would_be_seen(up):
    """The test above has teeth: without filling, white below a red disc shows at its edge."""
    picture = picture_of(np.rint(disc()), 255)
    plain = up.upscale(picture.pixels, color="wavelet")
    weight = upscale_picture(up, picture).alpha[..., None] / 255
    assert (np.abs(plain.astype(float) - COLOUR) * weight).max() > 40


class Darkening:
    """Enlarges fourfold; a model that darkens, and brightens the right half, where nothing is seen."""

    def upscale(self, rgb, *, progress=None, sink=None, color):
        large = np.kron(rgb.astype(np.float64) * 0.7, np.ones((4, 4, 1)))
        large[:, large.shape[1] // 2 :] += 0.3 * np.iinfo(rgb.dtype).max
        result = np.rint(large).astype(rgb.dtype)
        return result if sink is None else sink(0, result)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_statistics_of_colours_leave_hidden_pixels_out(dtype):
    full = np.iinfo(dtype).max
    pixels = np.rint(np.random.default_rng(3).uniform(0.2, 0.8, (30, 60, 3)) * full).astype(dtype)
    alpha = np.zeros((30, 60), dtype)
    alpha[:, :30] = full
    result = upscale_picture(Darkening(), Picture(pixels, alpha=alpha), color="adain").pixels
    seen, before = result[:, :120] * (255 / full), pixels[:, :30] * (255 / full)
    assert result.dtype == dtype
    assert np.abs(seen.mean((0, 1)) - before.mean((0, 1))).max() <= 0.5


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_round_mask_stays_round_and_flat_parts_stay_exact(up, dtype):
    full = np.iinfo(dtype).max
    result = upscale_picture(up, picture_of(disc(), 0, dtype))
    ideal = disc(192, 15.3 * 4)
    alpha = result.alpha / full
    assert alpha.dtype == np.float64 and result.alpha.dtype == dtype
    y, x = np.mgrid[0:192, 0:192] + 0.5 - 96
    away = np.abs(np.hypot(y, x) - 15.3 * 4) > 10
    assert np.array_equal(alpha[away], ideal[away])  # 0 and full, to the bit
    angles = np.linspace(0, 2 * np.pi, 360, endpoint=False)
    steps = np.arange(0, 90, 0.25)
    rows = np.clip(np.rint(95.5 + steps[:, None] * np.sin(angles)), 0, 191).astype(int)
    columns = np.clip(np.rint(95.5 + steps[:, None] * np.cos(angles)), 0, 191).astype(int)
    radius = alpha[rows, columns].sum(0) * 0.25
    assert radius.std() <= 0.4 and abs(radius.mean() - 61.2) <= 0.5  # of a nearest enlargement: 1.1


def test_filling_changes_no_visible_pixel_and_reaches_far():
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (37, 53, 3), np.uint8)
    alpha = np.zeros((37, 53), np.uint8)
    alpha[10:14, 20:23] = rng.integers(16, 256, (4, 3))
    filled = fill_hidden(pixels, alpha)
    assert np.array_equal(filled[alpha > 0], pixels[alpha > 0])
    corner = filled[36, 52].astype(float)
    seen = pixels[10:14, 20:23].reshape(-1, 3).astype(float)
    assert (corner >= seen.min(0)).all() and (corner <= seen.max(0)).all()
    assert np.array_equal(fill_hidden(pixels, np.zeros_like(alpha)), np.zeros_like(pixels))  # nothing is seen
    other = pixels.copy()
    other[alpha == 0] = rng.integers(0, 256, other[alpha == 0].shape)
    assert np.array_equal(fill_hidden(other, alpha), filled)


def test_an_alpha_that_is_opaque_everywhere_is_none_and_may_become_a_jpeg(tmp_path):
    for mode in ("RGBA", "LA"):
        Image.new(mode, (8, 8), (90,) * (len(mode) - 1) + (255,)).save(tmp_path / "a.png")
        picture = read_image(tmp_path / "a.png")
        assert picture.alpha is None and picture.gray == (mode == "LA")
        write_image(tmp_path / "a.jpg", picture)
    Image.new("RGBA", (8, 8), (90, 90, 90, 254)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="transparency"):
        write_image(tmp_path / "b.jpg", read_image(tmp_path / "a.png"))


def test_a_background_is_seen_through_transparency(up, tmp_path):
    picture = picture_of(disc(), 0)
    result = upscale_picture(up, picture, background="#0080ff")
    assert result.alpha is None and tuple(result.pixels[0, 0]) == (0, 128, 255)
    assert np.abs(result.pixels[96, 96].astype(int) - COLOUR).max() <= 3
    write_image(tmp_path / "a.jpg", result)
    half = Picture(np.full((2, 2, 3), 65535, np.uint16), gray=True, alpha=np.full((2, 2), 32768, np.uint16))
    assert np.abs(flatten(half, (0, 0, 0)).pixels.astype(int) - 32768).max() <= 1 and flatten(half, (0, 0, 0)).gray
    assert not flatten(half, (255, 0, 0)).gray


@pytest.mark.parametrize(
    "text, colour", [("white", (255, 255, 255)), ("#20a0ff", (32, 160, 255)), ("#fff", (255,) * 3)]
)
def test_backgrounds(text, colour):
    assert parse_background(text) == colour


@pytest.mark.parametrize("text", ["", "whitish", "#12", "12"])
def test_what_is_no_colour_is_said(text):
    with pytest.raises(ValueError, match="background must be a colour such as white"):
        parse_background(text)


@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("color", ["wavelet", "adain", "none"])
def test_a_neutral_picture_stays_neutral(up, gray, color):
    rng = np.random.default_rng(2)
    page = np.kron(rng.integers(0, 2, (12, 12)) * 200 + 20, np.ones((4, 4))).astype(np.uint8)
    result = upscale_picture(up, Picture(np.repeat(page[..., None], 3, axis=2), gray), color=color).pixels
    assert int((result.max(2) - result.min(2)).max()) == 0


def test_progress_counts_both_passes(up):
    seen = []
    upscale_picture(up, picture_of(disc(), 0), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] and seen == sorted(seen) and len({total for _, total in seen}) == 1
