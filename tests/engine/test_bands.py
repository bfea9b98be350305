"""A picture streams: bands are the whole. Bytes as they always were; gray stays gray, flat stays flat; many threads."""

import hashlib
import importlib.util
import itertools
import threading

import numpy as np
import pytest

from engine import Upscaler
from engine.runtime import color as colors
from engine.runtime.backends import Waiting
from engine.runtime.manifest import Geometry, Manifest, Profile
from engine.runtime.resample import resize, resize_bands

PATHS = [
    False,
    pytest.param(
        True,
        marks=pytest.mark.skipif(importlib.util.find_spec("engine._core") is None, reason="engine._core was not built"),
    ),
]


class Exact(Waiting):
    """A model whose arithmetic is the same on every CPU: the picture, softened, and some of the noise."""

    def __call__(self, inputs):
        noise = inputs["noise"][:, :3].repeat(4, axis=2).repeat(4, axis=3)
        return inputs["image"] * np.float32(0.875) + noise * np.float32(0.03125)


MANIFEST = Manifest("onnx", "", "fp32", Geometry(4, 4, 48, 16, 64), Profile((1, 1, 8), (64, 512, 1024)), {})
HASHES = {  # of the run time as it was before pictures streamed (commit c188880)
    "{}": "d41097dbee27fd58",
    "{'color': 'adain', 'tile': 48, 'batch': 3}": "8f6108c0697a96ba",
    "{'color': 'none', 'tile': 40}": "fa41dbd096bbbc40",
    "{'scale': 2.5, 'tile': 64}": "7241cc5c8c45af08",
    "{'scale': 0.7, 'color': 'adain'}": "c23cdc62c5922a40",
}


@pytest.mark.parametrize("options", list(HASHES))
def test_the_bytes_of_a_picture_are_what_they_were(options):
    """Resampling, noise, tiles, blending, colours, rounding; no backend, whose kernels differ from CPU to CPU."""
    up = Upscaler(MANIFEST, {"generator": Exact()}, "exact")
    y, x, c = np.mgrid[0:70, 0:90, 0:3]
    rgb = ((x * x * 3 + y * 5 + c * 40 + x * y) % 256).astype(np.uint8)
    digest = hashlib.sha256()
    for picture in (rgb, rgb.astype(np.uint16) * 200):
        digest.update(up.upscale(picture, 7, **eval(options)).tobytes())
    assert digest.hexdigest()[:16] == HASHES[options]


def collect(up, rgb, **options):
    """(what the sink got, the greatest number of rows at once)."""
    bands = []

    def sink(first, rows):
        assert first == sum(map(len, bands))
        bands.append(rows.copy())

    assert up.upscale(rgb, sink=sink, **options) is None
    return np.concatenate(bands), max(map(len, bands))


@pytest.mark.parametrize("core", PATHS)
@pytest.mark.parametrize(
    "options",
    [{}, {"color": "none"}, {"color": "adain"}, {"scale": 2.3}, {"scale": 0.4, "color": "none"}, {"scale": 5}],
    ids=str,
)
def test_a_sink_gets_the_rows_of_the_result(tiny_engine, photo, core, options):
    up, rgb = Upscaler.load(tiny_engine, core=core, threads=1), np.ascontiguousarray(photo[:140, :50])
    whole = up.upscale(rgb, 1, 48, **options)
    bands, most = collect(up, rgb, seed=1, tile=48, **options)
    assert np.array_equal(bands, whole) and bands.dtype == np.uint8
    assert most <= 256 < 560


def test_a_sink_that_fails_ends_the_run_and_the_next_picture_is_right(tiny_engine, photo):
    up, rgb = Upscaler.load(tiny_engine, core=False, threads=1), np.ascontiguousarray(photo[:40, :40])

    def full(first, rows):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        up.upscale(rgb, sink=full)
    with pytest.raises(RuntimeError, match="was called from progress or sink of the same Upscaler"):
        up.upscale(rgb, progress=lambda done, total: up.upscale(rgb))
    assert np.array_equal(up.upscale(rgb), Upscaler.load(tiny_engine).upscale(rgb))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("new", [(9, 7), (300, 41), (513, 130), (1, 1)])
def test_resizing_bands_is_resizing(dtype, new):
    picture = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (200, 33, 3), dtype=dtype)
    cuts = [0, 1, 60, 61, 190, 200]
    bands = ((a, picture[a:b]) for a, b in itertools.pairwise(cuts))
    rows = list(resize_bands(bands, (200, 33), new))
    assert [first for first, _ in rows] == list(np.cumsum([0, *(len(r) for _, r in rows)])[:-1])
    assert np.array_equal(np.concatenate([r for _, r in rows]), resize(picture, new))


@pytest.mark.parametrize("core", PATHS)
@pytest.mark.parametrize("color", ["wavelet", "adain", "none"])
def test_a_gray_picture_stays_gray(tiny_engine, photo, core, color):
    up = Upscaler.load(tiny_engine, core=core, threads=1)
    gray = np.repeat(photo[:30, :40, 1:2], 3, axis=2)
    for rgb in (gray, gray.astype(np.uint16) * 257):
        result = up.upscale(rgb, color=color)
        assert (result == result[..., :1]).all()
    almost = gray.copy()
    almost[29, 39, 2] ^= 1  # one level in one pixel: a picture in colour
    assert (np.ptp(up.upscale(almost, color=color), axis=2) > 0).any()


@pytest.mark.parametrize("core", PATHS)
@pytest.mark.parametrize("pattern", ["lines", "checkers", "halftone", "chart"])
def test_flat_patches_keep_their_colour(core, pattern):
    """Of the bundled model, by default: within 2 levels, whatever is beside them; AdaIN moves them by up to 40."""
    y, x = np.mgrid[0:64, 0:128]
    dark = {
        "lines": y % 2 == 0,
        "checkers": (x + y) % 2 == 0,
        "halftone": (x % 4 < 2) & (y % 4 < 2),
        "chart": (x // 32) % 2 == 0,
    }[pattern]
    rgb = np.where(dark[..., None], np.array([20, 30, 60]), np.array([240, 230, 200])).astype(np.uint8)
    rgb[:, 64:] = np.array([[200, 90, 40], [60, 140, 210]], np.uint8)[(x[:, 64:] >= 96).astype(int)]
    result = Upscaler.load(core=core, threads=1).upscale(rgb)
    for left in (64, 96):
        inside = result[32:224, 4 * left + 40 : 4 * left + 88].reshape(-1, 3).mean(0)
        assert np.abs(inside - rgb[0, left]).max() <= 2


GROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255), "light": (200, 200, 200), "blue": (40, 80, 200)}


@pytest.mark.parametrize("core", PATHS)
@pytest.mark.parametrize("model", ["tiny", "faithful"])
@pytest.mark.parametrize("ground", GROUNDS)
def test_what_is_flat_stays_flat_beside_saturated_patterns(core, model, ground):
    """One pixel away from them; the low frequencies that the model gave a checker alone move it by 17 levels."""
    up = Upscaler.load(model, core=core, threads=1)
    y, x = np.mgrid[0:24, 0:48]
    worst = 0.0
    for ink in ((0, 255, 0), (255, 255, 255), (0, 0, 255)):
        for pattern in ((x + y) % 2 == 0, y % 2 == 0, x == 30):
            rgb = np.where((pattern & (x >= 24))[..., None], ink, GROUNDS[ground]).astype(np.uint8)
            flat = up.upscale(rgb)[:, : 4 * 23].astype(int) - rgb[0, 0]
            assert np.abs(flat).max() <= 2
            raw = up.upscale(rgb, color="none")[:, : 4 * 23].astype(int) - rgb[0, 0]
            worst = max(worst, np.abs(raw).max())
    assert worst > 2  # as the model drew it


def limited(rows, rgb, scale):
    """`keep_flat`, by its words."""
    out = rows.copy()
    unit = 65535 // np.iinfo(rgb.dtype).max
    for y, x, c in np.ndindex(*rgb.shape):
        around = rgb[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2, c].astype(int) * unit
        if np.ptp(around) <= 514:
            part = np.s_[y * scale : (y + 1) * scale, x * scale : (x + 1) * scale, c]
            out[part] = np.clip(out[part].astype(int), around.max() - 514, around.min() + 514)
    return out


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("size", [(9, 7), (1, 5), (6, 1)])
def test_the_limits_of_flat_places_are_those_of_their_definition(dtype, size):
    random = np.random.default_rng(size[0])
    unit = 1 if dtype == np.uint8 else 257
    levels = random.integers(0, 3, (*size, 3)) + random.choice([0, 3, 250, 253], (*size, 1), p=[0.9, 0.05, 0.03, 0.02])
    rgb = (levels * unit).astype(dtype)
    rows = random.integers(0, 65536, (4 * size[0], 4 * size[1], 3)).astype(np.uint16)
    expected = limited(rows, rgb, 4)
    assert (expected != rows).any()
    for cuts in ([0, 4 * size[0]], [0, 1, 3, 4 * size[0]]):
        parts = [rows[a:b].copy() for a, b in itertools.pairwise(cuts)]
        for first, part in zip(cuts, parts):
            colors.keep_flat(part, first, rgb)
        assert np.array_equal(np.concatenate(parts), expected)


@pytest.mark.parametrize("core", PATHS)
def test_eight_threads_on_one_upscaler_give_the_serial_bytes(tiny_engine, photo, core):
    up = Upscaler.load(tiny_engine, core=core, threads=1)
    pictures = [np.ascontiguousarray(photo[i : i + 17 + i, 3 * i : 3 * i + 40]) for i in range(8)]
    serial = [up.upscale(rgb, seed) for seed, rgb in enumerate(pictures)]
    results: list[np.ndarray | None] = [None] * 8

    def work(i):
        results[i] = up.upscale(pictures[i], i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(a, b) for a, b in zip(serial, results))


def test_the_limit_of_pixels_can_be_raised_and_lowered(tiny_engine):
    from engine.runtime.upscaler import output_size

    rgb = np.zeros((20, 20, 3), np.uint8)
    with pytest.raises(ValueError, match="20x20 upscaled is 0 megapixels"):
        Upscaler.load(tiny_engine).upscale(rgb, max_pixels=6399)
    assert Upscaler.load(tiny_engine).upscale(rgb, max_pixels=6400).shape == (80, 80, 3)
    with pytest.raises(ValueError, match="9000x7000 upscaled is 1008 megapixels; at most 1000 fit"):
        output_size(7000, 9000, 1)
    assert output_size(7000, 9000, 1, 16 * 63_000_000) == (7000, 9000)
