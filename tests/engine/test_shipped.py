"""The bundled models: whole, small, documented; on photos that they never saw they do what they are for."""

import json
from pathlib import Path

import numpy as np
import pytest

from engine import Upscaler
from engine.runtime.resample import resize
from engine.runtime.upscaler import BUNDLED

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def up():
    return Upscaler.load(threads=1)


MODELS = pytest.mark.parametrize("model", ["tiny", "quality", "faithful"])


def test_all_together_are_small():
    assert sum(f.stat().st_size for f in BUNDLED.glob("*/*")) < 15e6


@MODELS
def test_a_card_names_every_photo(model):
    card = (BUNDLED / model / "README.md").read_text("utf-8")
    photos = [p for p in json.loads((ROOT / "gdpo/resources/photos.json").read_text("utf-8")) if p["sha256"] in card]
    assert len(photos) >= 30
    assert all(p["author"] in card and p["licence"] in card for p in photos)
    assert card.count("| training |") + card.count("| held out |") == len(photos)


def small_and_noisy(photo: np.ndarray, sigma: float) -> np.ndarray:
    small = photo.reshape(64, 4, 64, 4, 3).mean((1, 3))
    small = small + np.random.default_rng(0).normal(0, sigma, small.shape)
    return small.clip(0, 255).round().astype(np.uint8)


PHOTOS = pytest.mark.parametrize(
    ("name", "y", "x"), [("astronaut", 20, 120), ("chelsea", 20, 100), ("coffee", 120, 200)]
)


@PHOTOS
def test_faithful_is_closer_than_bicubic_to_a_photo_that_was_only_reduced(name, y, x):
    from skimage import data

    photo = np.ascontiguousarray(getattr(data, name)()[y : y + 256, x : x + 256])
    small = resize(photo, (64, 64))
    ours = Upscaler.load("faithful", threads=1).upscale(small, seed=0)
    errors = [np.square(p.astype(float) - photo).mean() for p in (ours, resize(small, (256, 256)))]
    assert errors[0] < 0.97 * errors[1]


@PHOTOS
def test_it_sharpens_clean_photos_and_cleans_noisy_ones(up, name, y, x):
    from skimage import data

    photo = getattr(data, name)()[y : y + 256, x : x + 256].astype(np.float32)
    clean = small_and_noisy(photo, 2)
    ours, bicubic = up.upscale(clean, seed=0).astype(np.float32), resize(clean, (256, 256)).astype(np.float32)
    # The steepest slopes are edges; their mean would also count noise, which is to go.
    edges, its_edges = (float(np.percentile(np.abs(np.diff(p.mean(2), axis=1)), 98)) for p in (ours, bicubic))
    assert edges > 1.15 * its_edges
    assert abs(ours.mean((0, 1)) - clean.mean((0, 1))).max() < 1  # no colour shift

    for levels, most in ((10, 1), (20, 1.1)):
        noisy = small_and_noisy(photo, levels)
        ours, bicubic = up.upscale(noisy, seed=0).astype(np.float32), resize(noisy, (256, 256)).astype(np.float32)
        assert np.square(ours - photo).mean() < most * np.square(bicubic - photo).mean()


@MODELS
@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (255, 0, 0), (30, 30, 200)])
def test_a_flat_picture_has_no_frame(model, colour):
    """Zeros beyond the border made a white page's outermost row 10 levels dark, and corners of red 51."""
    flat = np.full((24, 40, 3), colour, np.uint8)
    drawn = Upscaler.load(model, threads=1).upscale(flat, seed=0).astype(int)
    assert np.abs(drawn - colour).max() <= 4


def test_the_border_of_a_photo_is_as_good_as_its_inside(up, photo):
    """A part of a picture, upscaled alone, is the same part of the whole: nearly so in its outermost row."""
    whole = up.upscale(photo[:96, :96].copy(), seed=0, color="none")[64:320, 64:320].astype(float)
    part = up.upscale(photo[16:80, 16:80].copy(), seed=0, color="none").astype(float)
    rows = [np.abs(part - whole)[[y, 255 - y]].mean() for y in (0, 8)]
    assert rows[0] < 3 * rows[1]


@PHOTOS
def test_quality_sharpens_clean_photos_and_cleans_noisy_ones_better_than_tiny(up, name, y, x):
    from skimage import data

    photo = getattr(data, name)()[y : y + 256, x : x + 256].astype(np.float32)
    quality = Upscaler.load("quality", threads=1, precision="fp32")

    def errors(noise: float) -> tuple[float, float, float]:
        small = small_and_noisy(photo, noise)
        drawn = quality.upscale(small, seed=0), up.upscale(small, seed=0), resize(small, (256, 256))
        edges = [float(np.percentile(np.abs(np.diff(p.astype(float).mean(2), axis=1)), 98)) for p in drawn]
        assert noise > 2 or edges[0] > 1.1 * edges[2]
        ours, tinys, bicubic = (float(np.square(p - photo).mean()) for p in drawn)
        return ours, tinys, bicubic

    ours, _, bicubic = errors(2)
    assert ours < 1.1 * bicubic
    for noise in (10, 20):
        ours, tinys, bicubic = errors(noise)
        assert ours < 0.97 * min(tinys, bicubic)


@pytest.mark.parametrize("tile, most, mean", [(64, 5, 0.05), (32, 15, 0.4)])
def test_shorter_tiles_change_a_photo_little(up, photo, tile, most, mean):
    """The model sees 18 pixels around each; short tiles overlap by less."""
    rgb = photo[:128, :128]
    difference = np.abs(up.upscale(rgb, tile=tile).astype(int) - up.upscale(rgb).astype(int))
    print(f"tile {tile}: at most {difference.max()} levels, {difference.mean():.3f} in the mean")
    assert 0 < difference.max() <= most and difference.mean() <= mean
