"""What computes with pictures takes the colours that they show: one in another colour space is as its sRGB twin."""

import csv
import io
import sys

import numpy as np
import pytest
from PIL import Image, ImageCms

from engine.io.images import ImageError, Picture, read_srgb, write_image
from engine.io.profiles import gray_profile, matrix_profile
from engine.runtime.resample import resize
from gdpo import evaluate
from gdpo.degradation import __main__ as degradation
from gdpo.scores.metrics.fit import read_photos

_D65 = (0.3127, 0.3290)
PROFILES = {
    "Adobe RGB": matrix_profile(((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)), _D65, 2.19921875),
    "Display P3": matrix_profile(((0.68, 0.32), (0.265, 0.69), (0.15, 0.06)), _D65, "srgb"),
    "linear gray": gray_profile(1.0),
}


@pytest.fixture(scope="module")
def photo():
    return pytest.importorskip("skimage.data").astronaut()


def tagged(pixels, name, file):
    """A picture of these numbers in a colour space; returns its twin, made by Pillow."""
    image = Image.fromarray(pixels)
    image = image.convert("L") if "gray" in name else image
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, icc_profile=PROFILES[name])
    profile = ImageCms.ImageCmsProfile(io.BytesIO(PROFILES[name]))
    twin = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert np.abs(np.asarray(twin).astype(int) - np.asarray(image.convert("RGB"))).max() > 5, "it shows something else"
    return twin


def scores(monkeypatch, root, out):
    arguments = ["--lr", root / "lr", "--hr", root / "hr", "--sr", root / "sr", "--out", out, "--no-progress"]
    metrics = ["--metrics", "psnr_y", "ssim_y", "naturalness", "--bootstrap", "10"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments), *metrics])
    assert evaluate.main() == 0
    with open(out / "per_image.csv") as file:
        return {(row["image"], row["model"]): row for row in csv.DictReader(file)}


def test_the_scores_are_those_of_the_twins(photo, tmp_path, monkeypatch):
    """HR, LR and a model's pictures, each in another colour space: as if all were sRGB."""
    rng = np.random.default_rng(0)
    for k, spaces in enumerate([list(PROFILES), list(PROFILES)[1:] + list(PROFILES)[:1]]):
        hr = photo[100 + 60 * k : 196 + 60 * k, 180:276]
        noisy = np.clip(hr + rng.normal(0, 4, hr.shape), 0, 255).astype(np.uint8)
        for side, pixels, space in zip(("hr", "lr", "sr"), (hr, resize(hr, (24, 24)), noisy), spaces):
            twin = tagged(pixels, space, tmp_path / "tagged" / side / f"{k}.png")
            (tmp_path / "srgb" / side).mkdir(parents=True, exist_ok=True)
            twin.save(tmp_path / "srgb" / side / f"{k}.png")
    of_tagged = scores(monkeypatch, tmp_path / "tagged", tmp_path / "a")
    assert of_tagged == scores(monkeypatch, tmp_path / "srgb", tmp_path / "b")
    assert all(row["naturalness"] for row in of_tagged.values())


@pytest.mark.parametrize("name", PROFILES)
def test_what_is_degraded_is_the_twin(name, photo, tmp_path, monkeypatch):
    twin = tagged(photo[:128, 150:278], name, tmp_path / "tagged" / "a.png")
    (tmp_path / "srgb").mkdir()
    twin.save(tmp_path / "srgb" / "a.png")
    written = {}
    for folder in ("tagged", "srgb"):
        monkeypatch.setattr(
            sys, "argv", ["x", "--in", str(tmp_path / folder), "--pairs", str(tmp_path / f"{folder}-pairs")]
        )
        degradation.main()
        written[folder] = [(tmp_path / f"{folder}-pairs" / side / "a.png").read_bytes() for side in ("HR", "LR")]
    assert written["tagged"] == written["srgb"]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "tagged-pairs" / "HR" / "a.png")), np.asarray(twin))


def test_photos_that_parameters_are_fitted_to_are_the_twins(photo, tmp_path):
    twins = [tagged(photo[100:164, 180:244], name, tmp_path / f"{i}.png").reduce(2) for i, name in enumerate(PROFILES)]
    for read, twin in zip(read_photos(tmp_path), twins, strict=True):
        np.testing.assert_array_equal(read, np.asarray(twin))


def test_colours_that_cannot_become_srgb_are_named_with_the_file(photo, tmp_path):
    write_image(tmp_path / "hdr.png", Picture(photo[:16, :16], color_tags={"cICP": bytes([9, 16, 0, 1])}))
    with pytest.raises(ImageError, match=r"hdr\.png: its tags name HDR"):
        read_srgb(tmp_path / "hdr.png")
