"""A result goes to its file row by row: refused before the work, cancelled in the middle, never half a file."""

import errno
import os

import numpy as np
import pytest

from engine.io import images, sink
from engine.io.bands import Bands
from engine.io.formats import FORMATS
from engine.io.images import ImageError, Picture, image_writer, read_image
from engine.settings import Settings
from tests.support.pictures import gradient, installed

WRITABLE = [row for row in FORMATS if row.write and installed(row.name)]
HDR = {"cICP": bytes([9, 16, 0, 1])}  # BT.2020 primaries, PQ


class Model:
    """Repeats pixels, hands over some rows at a time, and counts them."""

    def __init__(self, rows=5, end=None):
        self.rows, self.end, self.made = rows, end, 0

    def upscale(self, rgb, *, sink, **options):
        result = np.kron(rgb, np.ones((4, 4, 1), rgb.dtype))
        for top in range(0, len(result), self.rows):
            sink(top, result[top : top + self.rows])
            self.made = top + self.rows
            if self.end and self.made >= 2 * len(result) // 3:
                raise self.end


@pytest.mark.parametrize("row", WRITABLE, ids=lambda row: row.name)
@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("kind", ["rgb", "alpha", "deep", "gray"])
def test_a_file_does_not_depend_on_how_its_rows_come(tmp_path, row, rows, kind):
    suffix = row.suffixes[0]
    dtype = np.uint16 if kind == "deep" else np.uint8
    pixels = gradient(40, 37, dtype)
    pixels = np.repeat(pixels[..., :1], 3, axis=2) if kind == "gray" else pixels
    alpha = pixels[..., 1].copy() if kind == "alpha" and row.alpha else None
    picture = Picture(pixels, gray=kind == "gray", alpha=alpha, text={})
    images.write_image(tmp_path / f"whole{suffix}", picture)
    with image_writer(tmp_path / f"rows{suffix}", picture, (40, 37)) as put:
        for top in range(0, 40, rows):
            put(pixels[top : top + rows], None if alpha is None else alpha[top : top + rows])
    assert (tmp_path / f"whole{suffix}").read_bytes() == (tmp_path / f"rows{suffix}").read_bytes()
    if row.lossless == "always":
        result = read_image(tmp_path / f"rows{suffix}")
        assert np.array_equal(result.pixels, pixels)
        assert alpha is None or np.array_equal(result.alpha, alpha)


@pytest.mark.parametrize("row", [row for row in WRITABLE if row.name != "PNG"], ids=lambda row: row.name)
def test_colours_that_a_container_cannot_hold_are_refused_before_the_work(tmp_path, row):
    model, picture = Model(), Picture(gradient(dtype=np.uint16), color_tags=HDR)
    with pytest.raises(ImageError, match=r"its colours are HDR \(PQ\), which only PNG keeps here"):
        Settings().make(model, picture, tmp_path / f"a{row.suffixes[0]}")
    assert model.made == 0 and not list(tmp_path.iterdir())
    Settings().make(model, picture, tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").color_tags == HDR


def test_a_transparent_picture_is_refused_before_the_work(tmp_path):
    model, picture = Model(), Picture(gradient(), alpha=gradient()[..., 0])
    with pytest.raises(ImageError, match="JPEG cannot hold the picture's transparency"):
        Settings().make(model, picture, tmp_path / "a.jpg")
    assert model.made == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("row", WRITABLE, ids=lambda row: row.name)
@pytest.mark.parametrize("end", [KeyboardInterrupt(), FloatingPointError("not finite")], ids=["interrupt", "failure"])
def test_what_ends_the_model_leaves_no_file(tmp_path, row, end):
    target = tmp_path / f"a{row.suffixes[0]}"
    target.write_bytes(b"before")
    with pytest.raises(type(end)):
        Settings().make(Model(end=end), Picture(gradient(200, 300)), target)
    assert target.read_bytes() == b"before" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_a_full_disk_ends_the_model(tmp_path, monkeypatch, suffix):
    class Full(sink.Sink):
        def write(self, data):
            if self.tell() > 20_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr(sink, "Sink", Full)
    model, noise = Model(), np.random.default_rng(0).integers(0, 256, (400, 500, 3), dtype=np.uint8)
    with pytest.raises(OSError, match="No space left on device") as caught:
        Settings().make(model, Picture(noise), tmp_path / f"a{suffix}")
    assert caught.value.filename == str(tmp_path / f"a{suffix}")
    assert model.made < 1200 and not list(tmp_path.iterdir())  # of 1600 rows


def test_rows_that_are_missing_are_an_error(tmp_path):
    with (
        pytest.raises(OSError, match=r"a\.png"),
        image_writer(tmp_path / "a.png", Picture(gradient()), (24, 37)) as put,
    ):
        put(gradient()[:20], None)
    assert not list(tmp_path.iterdir())
    with (
        pytest.raises(AssertionError, match="more rows"),
        image_writer(tmp_path / "a.png", Picture(gradient()), (20, 37)) as put,
    ):
        put(gradient(), None)
    assert not list(tmp_path.iterdir())


def test_a_page_gets_what_the_file_gets(tmp_path):
    kept = []

    def keep(shape, dtype):
        kept.append(np.empty(shape, dtype))
        return kept[0]

    size = Settings().make(Model(), Picture(gradient()), tmp_path / "a.png", keep=keep)
    assert size == (96, 148) and np.array_equal(kept[0], read_image(tmp_path / "a.png").pixels)


def test_a_pipe_carries_every_kind_of_sample():
    for samples in (1, 2, 3, 4):
        for dtype in (np.uint8, np.uint16):
            picture = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (131, 7, samples), dtype=dtype)
            bands, got = Bands(picture.shape, dtype), []
            with bands.encoding(lambda bands=bands, got=got: got.append(bands.array())):
                bands.put(picture[:70])
                bands.put(picture[70:])
            assert np.array_equal(got[0], picture) and got[0].dtype == dtype
