"""From a photo to its crops: halved, converted, cut, filtered by texture; near-duplicates; drawn pages."""

import io
import time

import numpy as np
import pytest
from PIL import Image, ImageCms
from skimage import data as samples

from engine.io.images import Picture
from engine.io.profiles import gray_profile, matrix_profile, profile_of
from gdpo.photos.crops import convert, cut, difference_hash, near_duplicates, positions
from gdpo.photos.drawn import PANEL, page

NOISE = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
SRGB_PRIMARIES = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)), (0.3127, 0.3290)


@pytest.mark.parametrize("halvings", [1, 2])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_halving_averages_areas_and_rounds_once(halvings, dtype):
    full, side = np.iinfo(dtype).max, 2**halvings
    pixels = np.random.default_rng(0).integers(0, full + 1, (21, 34, 3)).astype(dtype)
    got = convert(Picture(pixels), halvings).pixels
    h, w = 21 // side, 34 // side
    blocks = pixels[: h * side, : w * side].astype(np.float64).reshape(h, side, w, side, 3).mean((1, 3)) * 255 / full
    assert got.shape == (h, w, 3) and got.dtype == np.uint8
    assert np.abs(got - blocks).max() <= 0.5 + 1e-4


def test_colour_profiles_become_srgb():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(convert(Picture(pixels, icc=srgb), 0).pixels, pixels)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    with pytest.raises(ValueError, match="its colour profile cannot be used"):
        convert(Picture(pixels, icc=lab), 0)
    # A profile whose red and blue primaries are swapped: what it calls red is sRGB's blue.
    swapped = bytearray(srgb)
    tags = {bytes(swapped[i : i + 4]): i for i in range(132, 132 + 12 * int.from_bytes(swapped[128:132], "big"), 12)}
    for offset in (4, 8):
        red, blue = tags[b"rXYZ"] + offset, tags[b"bXYZ"] + offset
        swapped[red : red + 4], swapped[blue : blue + 4] = swapped[blue : blue + 4], swapped[red : red + 4]
    other = bytes(swapped).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")).replace(b"sRGB", b"swap")
    photo = convert(Picture(pixels, icc=other), 0)
    assert photo.converted == ["colour profile: to sRGB"]
    assert np.abs(photo.pixels.astype(int) - pixels[..., ::-1]).max() <= 2


# (200, 100, 100) of Display P3 is (215, 92, 97) of sRGB, by hand through XYZ: see tests/engine/test_picture_colors.py.
P3 = {"tags": {"color_tags": {"cICP": bytes([12, 13, 0, 1])}}, "profile": {"icc": profile_of({"cICP": b"\x0c\r\0\1"})}}


@pytest.mark.parametrize("how", P3)
@pytest.mark.parametrize("halvings", [0, 1])
def test_display_p3_becomes_srgb_however_it_is_told(how, halvings):
    photo = convert(Picture(np.full((8, 8, 3), (200, 100, 100), np.uint8), **P3[how]), halvings)
    assert photo.converted == ["colour profile: to sRGB"]
    assert np.abs(photo.pixels.astype(int) - [215, 92, 97]).max() <= 1


def test_a_profile_is_srgb_by_what_it_does_and_not_by_its_name():
    flat = np.full((8, 8, 3), 128, np.uint8)
    linear = matrix_profile(*SRGB_PRIMARIES, 1.0)
    named = linear.replace("RGB, as".encode("utf-16-be"), "sRGB,as".encode("utf-16-be"))
    assert named != linear and "srgb" in ImageCms.getProfileDescription(io.BytesIO(named)).lower()
    for icc in (linear, named):  # 128 of 255 linear is 188 of sRGB
        assert np.abs(convert(Picture(flat, icc=icc), 0).pixels.astype(int) - 188).max() <= 1
    unnamed = matrix_profile(*SRGB_PRIMARIES, "srgb")
    assert "srgb" not in ImageCms.getProfileDescription(io.BytesIO(unnamed)).lower()
    photo = convert(Picture(NOISE, icc=unnamed), 0)
    assert photo.converted == [] and np.array_equal(photo.pixels, NOISE)


def test_a_gray_picture_of_another_tone_curve_becomes_srgb():
    photo = convert(Picture(np.full((8, 8, 3), 128, np.uint8), gray=True, icc=gray_profile(1.0)), 0)
    assert photo.converted == ["gray: three equal channels", "colour profile: to sRGB"]
    assert np.abs(photo.pixels.astype(int) - 188).max() <= 1


def test_hdr_is_refused():
    with pytest.raises(ValueError, match="its tags name HDR"):
        convert(Picture(NOISE, color_tags={"cICP": bytes([9, 16, 0, 1])}), 0)


@pytest.mark.parametrize("length", [64, 65, 100, 128, 1000, 1001])
@pytest.mark.parametrize("stride", [1, 40, 64, 500])
def test_windows_cover_a_photo_from_end_to_end(length, stride):
    starts = positions(length, 64, stride)
    assert starts[0] == 0 and starts[-1] == length - 64
    gaps = np.diff(starts)
    assert (gaps >= 1).all() and (gaps <= stride).all() and (gaps.size == 0 or gaps.max() - gaps.min() <= 1)
    assert positions(63, 64, stride) == []


def test_the_texture_filter_keeps_what_is_textured():
    pixels = np.full((64, 192, 3), 128, np.uint8)
    pixels[:, 128:] = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    photo = convert(Picture(pixels), 0)
    crops, seen = cut(photo, 64, 64, 0.5)
    assert seen == 3 and [(c.y, c.x, c.texture) for c in crops] == [(0, 128, 1.0)]
    assert [c.texture for c in cut(photo, 64, 64, 0.0)[0]] == [0.0, 0.0, 1.0]


def one_by_one(hashes, distance):
    """The definition: each hash against all that were kept before."""
    kept, found = [], []
    for index, value in enumerate(hashes):
        near = [i for i in kept if (hashes[i] ^ value).bit_count() <= distance]
        found.append(near[0] if near else -1)
        kept += [] if near else [index]
    return found


@pytest.mark.parametrize("distance", [0, 1, 3, 7, 8, 63])
def test_near_duplicates_are_those_of_the_definition(distance, monkeypatch):
    monkeypatch.setattr("gdpo.photos.crops._BLOCK", 16)
    monkeypatch.setattr("gdpo.photos.crops._AT_ONCE", 50)
    rng = np.random.default_rng(distance)
    centres = rng.integers(0, 1 << 63, 12).tolist()
    hashes = []
    for _ in range(300):
        value = int(centres[rng.integers(12)])
        for bit in rng.integers(0, 64, rng.integers(0, 2 * min(distance, 8) + 1)).tolist():
            value ^= 1 << bit
        hashes.append(value)
    expected = one_by_one(hashes, distance)
    assert 0 < sum(i >= 0 for i in expected) < 300 and near_duplicates(hashes, distance) == expected


def test_near_duplicates_of_many_hashes_take_seconds():
    """60 times the hashes take about 60 times as long, not 3600 times: a million of them well under a minute."""
    hashes = np.random.default_rng(0).integers(0, 1 << 63, 120_000).tolist()

    def seconds(count):
        start = time.process_time()
        near_duplicates(hashes[:count], 3)
        return time.process_time() - start

    few = min(seconds(2_000) for _ in range(3))
    assert seconds(120_000) < 60 * 8 * few


def test_near_duplicates_are_found_by_distance():
    assert near_duplicates([0b0000, 0b0111, 0b0001, 0b0111, 0b1111], 1) == [-1, -1, 0, 1, 1]
    assert near_duplicates([5, 5, 4], 0) == [-1, 0, -1] and near_duplicates([5, 5], -1) == [-1, -1]
    cat, coffee = samples.chelsea(), samples.coffee()
    near = np.asarray(Image.fromarray(cat).resize((300, 200)))
    distances = [(difference_hash(cat) ^ difference_hash(other)).bit_count() for other in (near, coffee, cat[:, ::-1])]
    assert distances[0] <= 3 and min(distances[1:]) > 15


@pytest.mark.parametrize("patterns", [False, True])
def test_drawn_pages_are_a_function_of_their_seed_and_full_of_edges(patterns):
    one = np.asarray(page(1, columns=3, rows=2, patterns=patterns))
    assert one.shape == (2 * PANEL, 3 * PANEL, 3)
    assert (one == np.asarray(page(1, columns=3, rows=2, patterns=patterns))).all()
    assert (one != np.asarray(page(2, columns=3, rows=2, patterns=patterns))).mean() > 0.5
    steep = np.abs(np.diff(one.astype(int), axis=1)).max(2) > 60
    panels = steep[:, :-1].reshape(2, PANEL, -1)[..., : 3 * PANEL - 3]
    assert panels.mean() > 0.005  # letters, strokes and lines everywhere
