"""Resampling against Pillow and torch, colour alignment against its definition, tiles against the whole."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.runtime import color
from engine.runtime.resample import resize, resize_window, taps
from engine.runtime.tiles import blend, cover


@pytest.mark.parametrize(
    "size, new",
    [((40, 57), (160, 228)), ((1, 1), (4, 4)), ((200, 133), (50, 33)), ((64, 64), (100, 31)), ((3, 2), (12, 8))],
)
def test_the_resampler_is_pillows_and_torchs(size, new):
    pixels = np.random.default_rng(0).random((*size, 3)).astype(np.float32)
    ours = resize_window(pixels, new, (0, new[0]), (0, new[1]))
    for c in range(3):
        pillow = Image.fromarray(pixels[..., c].copy()).resize(new[::-1], Image.Resampling.BICUBIC)
        assert np.abs(ours[c] - np.asarray(pillow)).max() < 1e-6
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    reference = torch.nn.functional.interpolate(planes.double(), new, mode="bicubic", antialias=True)[0].numpy()
    # torch's float32 is the yardstick: we may be off by as much as it is, and an ulp.
    theirs = torch.nn.functional.interpolate(planes, new, mode="bicubic", antialias=True)[0].numpy()
    assert np.abs(ours - reference).max() <= 2 * np.abs(theirs - reference).max() + 3e-7


@given(st.integers(1, 60), st.integers(1, 60), st.data())
@settings(max_examples=40, deadline=None)
def test_windows_of_a_resized_picture_are_bit_equal(height, width, data):
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    size = (data.draw(st.integers(1, 150)), data.draw(st.integers(1, 150)))
    whole = resize_window(pixels, size, (0, size[0]), (0, size[1]))
    y = sorted(data.draw(st.tuples(st.integers(0, size[0]), st.integers(0, size[0]))))
    x = sorted(data.draw(st.tuples(st.integers(0, size[1]), st.integers(0, size[1]))))
    if y[0] < y[1] and x[0] < x[1]:
        assert np.array_equal(resize_window(pixels, size, tuple(y), tuple(x)), whole[:, y[0] : y[1], x[0] : x[1]])


def test_a_window_beyond_the_picture_is_its_mirror():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    whole = resize_window(pixels, (20, 24), (0, 20), (0, 24))
    beyond = resize_window(pixels, (20, 24), (0, 50), (0, 24))
    assert np.array_equal(beyond[:, 20:40], whole[:, ::-1]) and np.array_equal(beyond[:, 40:], whole[:, :10])


def test_resize_keeps_constants_rounds_and_clips():
    assert (resize(np.full((7, 9, 3), 200, np.uint8), (31, 8)) == 200).all()
    step = np.zeros((8, 8, 1), np.uint16)
    step[:, 4:] = 65535
    assert resize(step, (32, 32)).max() == 65535  # the overshoot does not wrap around
    with pytest.raises(ValueError, match="at least 1"):
        taps(0, 5)


def random_pair(height=50, width=61):
    rng = np.random.default_rng(3)
    result = rng.integers(0, 65536, (height, width, 3)).astype(np.uint16)
    target = np.clip(result * 0.5 + 9000 + rng.normal(0, 1500, result.shape), 0, 65535).astype(np.uint16)
    return result, target


def test_adain_gives_the_targets_mean_and_deviation_whatever_the_order():
    result, target = random_pair()
    a, b = color.Moments(), color.Moments()
    for rows in (slice(30, 50), slice(0, 30)):
        a.add(result[rows].transpose(2, 0, 1))
    b.add(target.transpose(2, 0, 1))
    straight = color.Moments()
    straight.add(result.transpose(2, 0, 1))
    assert (a.total == straight.total).all() and (a.squares == straight.squares).all()
    tables = color.adain_tables(a, b)
    aligned = np.stack([tables[c][result[..., c]] for c in range(3)], axis=2) / 65535
    assert np.allclose(aligned.mean((0, 1)), target.mean((0, 1)) / 65535, atol=1e-4)
    assert np.allclose(aligned.std((0, 1)), target.std((0, 1)) / 65535, atol=1e-3)


def test_wavelet_bands_are_the_whole_and_take_the_low_frequencies():
    result, target = random_pair(90, 70)

    whole = color.wavelet_band(result, target.transpose(2, 0, 1), (0, 90))

    def band(first, last):
        top, bottom = max(first - color.HALO, 0), min(last + color.HALO, 90)
        rows = target[top:bottom].transpose(2, 0, 1)
        return color.wavelet_band(result[top:bottom], rows, (first - top, last - top))

    bands = np.concatenate([band(*b) for b in ((0, 1), (1, 40), (40, 90))])
    assert np.array_equal(whole, bands)

    # Its definition, in torch: result - low(result) + low(target).
    def low(x):
        kernel = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
        x = torch.from_numpy(x.astype(np.float64)).permute(2, 0, 1)[:, None]
        for d in (1, 2, 4, 8, 16):
            x = torch.nn.functional.pad(x, (0, 0, d, d), mode="replicate")
            x = torch.nn.functional.conv2d(x, kernel[None, None, :, None], dilation=(d, 1))
            x = torch.nn.functional.pad(x, (d, d, 0, 0), mode="replicate")
            x = torch.nn.functional.conv2d(x, kernel[None, None, None], dilation=(1, d))
        return x[:, 0].permute(1, 2, 0).numpy()

    expected = np.clip(result - low(result) + low(target), 0, 65535)
    assert np.abs(whole - expected).max() < 0.6


@given(
    st.integers(1, 300),
    st.integers(2, 20),
    st.integers(0, 6),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.integers(1, 4),
)
@settings(max_examples=150, deadline=None)
def test_tiles_cover_overlap_and_sum_to_one(size, tile, overlap, multiple, fixed, resolution):
    tile, overlap = tile * multiple, overlap * multiple
    if size > tile and tile <= overlap:
        with pytest.raises(ValueError, match="longer than its overlap"):
            cover(size, tile, overlap, multiple, fixed=fixed)
        return
    axis = cover(size, tile, overlap, multiple, fixed=fixed)
    assert axis.starts[0] == 0 and axis.starts[-1] + axis.tile >= size
    assert axis.tile <= max(tile, multiple) and axis.tile % multiple == 0 and (not fixed or axis.tile == tile)
    assert all(s % multiple == 0 for s in axis.starts)
    assert all(a + axis.tile - b >= overlap for a, b in zip(axis.starts, axis.starts[1:]))
    total = np.zeros((axis.starts[-1] + axis.tile) * resolution)
    for start, share in zip(axis.starts, axis.weights(resolution)):
        total[start * resolution :][: len(share)] += share
    assert np.allclose(total, 1, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 3])
def test_blending_tiles_of_a_picture_gives_the_picture(batch):
    rows, columns = cover(100, 32, 8, 4), cover(77, 32, 8, 4)
    rng = np.random.default_rng(0)
    field = rng.random((3, 2 * (rows.starts[-1] + rows.tile), 2 * (columns.starts[-1] + columns.tile))).astype(
        np.float32
    )

    def run(places):
        return np.stack([field[:, 2 * y : 2 * (y + rows.tile), 2 * x : 2 * (x + columns.tile)] for y, x in places])

    result = np.full((3, 200, 154), np.nan, np.float32)
    for first, band in blend(rows, columns, 3, 2, lambda batches: map(run, batches), batch):
        result[:, first : first + band.shape[1]] = band
    assert np.abs(result - field[:, :200, :154]).max() < 1e-6


def test_one_tile_is_passed_on_unchanged():
    axis = cover(30, 64, 8, 4)
    tile = np.random.default_rng(0).random((1, 3, 32, 32)).astype(np.float32)
    ((first, band),) = blend(axis, axis, 3, 1, lambda batches: iter([tile]))
    assert first == 0 and np.array_equal(band, tile[0, :, :30, :30])
