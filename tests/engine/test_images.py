"""Pictures in and out: what must survive a round trip, and what must be refused."""

import io
import os
import random
import struct
import time
import zlib
from dataclasses import replace

import numpy as np
import pytest
import pyvips
from PIL import Image, ImageCms

from engine.io.files import atomic_path
from engine.io.images import ImageError, Picture, check_writable, picture_size, read_image, write_image
from tests.support.pictures import exif_block, gradient, mutated, resident

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("gray", [False, True])
def test_a_round_trip_keeps_pixels_depth_gray_and_alpha(tmp_path, suffix, dtype, alpha, gray):
    pixels = gradient(dtype=dtype)
    pixels = np.repeat(pixels[..., :1], 3, axis=2) if gray else pixels
    picture = Picture(pixels, gray, pixels[..., 0].copy() if alpha else None)
    path = tmp_path / f"picture.{suffix}"
    if alpha and suffix == "jpg":
        with pytest.raises(ImageError, match="transparency"):
            write_image(path, picture)
        assert not list(tmp_path.iterdir())
        return
    write_image(path, picture)
    back = read_image(path)
    deep = dtype == np.uint16 and suffix in ("png", "tif")
    assert back.pixels.dtype == (np.uint16 if deep else np.uint8)
    assert back.gray == (gray and suffix != "webp")  # WebP has no gray
    expected = pixels if deep or dtype == np.uint8 else np.rint(pixels / 257).astype(np.uint8)
    difference = np.abs(back.pixels.astype(int) - expected)
    assert difference.max() <= (0 if suffix in ("png", "tif") else 10)
    if alpha:
        assert np.array_equal(back.alpha, expected[..., 0])
    else:
        assert back.alpha is None


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_metadata_survives_and_can_be_stripped(tmp_path, suffix):
    source = tmp_path / "source.jpg"
    xmp = b'<x:xmpmeta><rdf tiff:Orientation="6"/></x:xmpmeta>'
    image = Image.fromarray(gradient())
    image.save(source, exif=exif_block(6), icc_profile=SRGB, xmp=xmp, dpi=(300, 150))
    picture = read_image(source)
    assert picture.icc == SRGB and picture.dpi == (150, 300)  # turned with the picture
    path = tmp_path / f"out.{suffix}"
    write_image(path, picture)
    back = read_image(path)
    assert back.icc == SRGB and back.xmp == xmp.replace(b'"6"', b'"1"')
    exif = Image.Exif()
    exif.load(back.exif)
    assert exif[271] == "Maker" and exif.get(0x0112, 1) == 1
    assert exif.get_ifd(0x8769)[0x9003] == "2020:01:01 00:00:00"
    write_image(path, picture.without_metadata())
    bare = read_image(path)
    assert bare.icc == SRGB and bare.exif is None and bare.xmp is None


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_pillow_does_and_reset(tmp_path, suffix, orientation):
    from PIL import ImageOps

    path = tmp_path / f"turned.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "jpg" else {}
    Image.fromarray(gradient()).save(path, exif=exif_block(orientation), **options)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    picture = read_image(path)
    assert np.abs(picture.pixels.astype(int) - expected).max() <= 1
    exif = Image.Exif()
    exif.load(picture.exif)
    assert exif.get(0x0112, 1) == 1
    assert picture_size(path) == expected.shape[:2]


def test_the_size_of_what_cannot_be_read_is_none_and_deep_files_have_one(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    assert picture_size(tmp_path / "bad.png") is None and picture_size(tmp_path / "none.png") is None
    for name in ("deep.png", "deep.tif"):
        write_image(tmp_path / name, Picture(np.zeros((9, 12, 3), np.uint16)))
        assert picture_size(tmp_path / name) == (9, 12)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_keeps_what_the_camera_said_and_its_pixels(tmp_path, dtype):
    said = Image.Exif()
    said[271], said[0x0112], said[33432] = "Größe".encode(), 1, b"me"
    said[0x8769], said[0x8825] = {0x829A: 0.004, 0x9003: "2020:01:01 00:00:00"}, {1: "N", 2: (47.0, 30.0, 0.0)}
    picture = Picture(gradient(dtype=dtype), exif=said.tobytes()[6:], icc=SRGB, dpi=(300, 300))
    write_image(tmp_path / "a.tif", picture)
    back, exif = read_image(tmp_path / "a.tif"), Image.Exif()
    exif.load(back.exif)
    assert np.array_equal(back.pixels, picture.pixels) and back.icc == SRGB and back.dpi == pytest.approx((300, 300))
    assert exif[33432] == "me" and exif[271].encode("latin1").decode() == "Größe"
    assert exif.get_ifd(0x8769)[0x829A] == 0.004 and exif.get_ifd(0x8825)[2] == (47.0, 30.0, 0.0)
    assert pyvips.Image.new_from_file(str(tmp_path / "a.tif")).get("n-pages") == 1  # another reader agrees


def test_a_tiff_keeps_the_interoperability_directory_inside_exif(tmp_path):
    said = Image.Exif()
    said[271], said[0x8769] = "Maker", {0x9003: "2020:01:01 00:00:00", 0xA005: {1: "R98", 2: b"0100"}}
    Image.fromarray(gradient()).save(tmp_path / "a.jpg", exif=said)
    for source, path in [("a.jpg", "a.tif"), ("a.tif", "b.tif")]:
        write_image(tmp_path / path, read_image(tmp_path / source))
        with Image.open(tmp_path / path) as image:
            exif = image.getexif()
            assert exif.get_ifd(0xA005) == {1: "R98", 2: b"0100"}
            assert exif.get_ifd(0x8769)[0x9003] == "2020:01:01 00:00:00"


def test_damaged_exif_never_damages_a_tiff(tmp_path):
    rng, good, kept = random.Random(0), exif_block()[6:], 0
    pixels = gradient()
    for _ in range(80):
        block = good[:12] + mutated(good[12:], rng)
        write_image(tmp_path / "a.tif", Picture(pixels, exif=block))
        back = read_image(tmp_path / "a.tif")
        assert np.array_equal(back.pixels, pixels)
        kept += back.exif is not None
    assert kept > 8


def test_palette_one_bit_transparent_colour_and_cmyk_are_expanded(tmp_path):
    base = Image.fromarray(gradient())
    base.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png").pixels.shape == (24, 37, 3)
    base.convert("P").save(tmp_path / "transparent.png", transparency=0)
    assert read_image(tmp_path / "transparent.png").alpha is not None
    base.convert("1").save(tmp_path / "bit.png")
    bit = read_image(tmp_path / "bit.png")
    assert bit.gray and set(np.unique(bit.pixels)) == {0, 255}
    base.convert("1").save(tmp_path / "bit.tif")
    assert np.array_equal(read_image(tmp_path / "bit.tif").pixels, bit.pixels)
    for name in ("cmyk.jpg", "cmyk.tif"):
        base.convert("CMYK").save(tmp_path / name)
        cmyk = read_image(tmp_path / name)
        # Two conversions and, for TIFF, a profile lie between: the hues must be right.
        assert np.corrcoef(cmyk.pixels.ravel(), gradient().ravel())[0, 1] > 0.9


def test_a_phone_jpeg_with_a_preview_behind_it_is_read(tmp_path):
    pictures = [Image.fromarray(gradient()), Image.fromarray(gradient(8, 8))]
    pictures[0].save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=pictures[1:])
    assert read_image(tmp_path / "phone.jpg").pixels.shape == (24, 37, 3)


def test_pages_are_refused(tmp_path):
    frames = [Image.fromarray(gradient()), Image.fromarray(255 - gradient())]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match=r"a\.tif: a TIFF of several pages"):
        read_image(tmp_path / "a.tif")


def png(width, height, *, depth=8, color=2, body=b"", extra=b""):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def chunk_of(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def progressive_bomb(scans):
    buffer = io.BytesIO()
    Image.fromarray(gradient(64, 64)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    first = data.index(b"\xff\xda")
    second = data.index(b"\xff\xda", first + 2)
    return data[:first] + data[first:second] * scans + data[second:]


def tiff_bomb():
    """A TIFF of 60000x60000 whose strips are two bytes long."""
    entries = [(256, 4, 60000), (257, 4, 60000), (258, 3, 8), (259, 3, 8), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    entries += [(278, 4, 60000), (279, 4, 2)]
    ifd = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", t, k, 1, v) for t, k, v in entries)
    return b"II*\0" + struct.pack("<I", 10) + b"\x78\x9c" + ifd + b"\0\0\0\0"


HOSTILE = {
    "gigapixels.png": png(100_000, 100_000, body=zlib.compress(bytes(1000))),
    "wide.png": png(2**31 - 1, 1, body=zlib.compress(b"")),
    "zero.png": png(0, 5),
    "bomb16.png": png(60_000, 60_000, depth=16, body=zlib.compress(bytes(1 << 20))),
    "text.png": png(4, 4, body=b"", extra=chunk_of(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 28)))),
    "profile.png": png(4, 4, body=b"", extra=chunk_of(b"iCCP", b"p\0\0" + zlib.compress(bytes(1 << 28)))),
    "bomb.tif": tiff_bomb(),
    "scans.jpg": progressive_bomb(5000),
    "empty.png": b"",
    "short.png": b"\x89PNG\r\n\x1a\n",
    "script.png": b"%!PS-Adobe-3.0\n/x {x} def x\n",
    "vector.png": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "page.jpg": b"<html><script>alert(1)</script></html>",
    "zip.png": b"PK\x03\x04" + bytes(100),
    "pickle.png": b"\x80\x04c__builtin__\neval\n.",
    "bmp.png": b"BM" + bytes(60),
    "gif.png": b"GIF89a" + bytes(60),
    "gif.webp": b"RIFF\x10\0\0\0WEBPGIF89a" + bytes(60),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_bombs_and_polyglots_are_typed_errors_in_bounded_time_and_memory(tmp_path, name):
    (tmp_path / name).write_bytes(HOSTILE[name])
    before, begin = resident(), time.process_time()
    with pytest.raises(ImageError, match=name):
        read_image(tmp_path / name)
    assert time.process_time() - begin < 5
    assert resident() - before < 300


def test_a_polyglot_is_only_the_picture_that_it_begins_with(tmp_path):
    write_image(tmp_path / "a.png", Picture(gradient()))
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.jpg").write_bytes(data + b"PK\x03\x04 <script>")  # and its name lies
    assert read_image(tmp_path / "b.jpg").format == "PNG"


def test_a_picture_of_twenty_thousand_squared_is_refused_by_size(tmp_path):
    row = b"\0" + bytes(2500)
    (tmp_path / "large.png").write_bytes(png(20_000, 20_000, depth=1, color=0, body=zlib.compress(row * 20_000, 1)))
    with pytest.raises(ImageError, match=r"large\.png: 20000x20000 is 400 megapixels; at most 100 are read"):
        read_image(tmp_path / "large.png")
    with pytest.raises(ImageError, match="is 400 megapixels; at most 399 are read"):  # Pillow's own limit is 179
        read_image(tmp_path / "large.png", max_pixels=399_000_000)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_refused_without_waiting(tmp_path, make):
    make(tmp_path / "odd.png")
    with pytest.raises(ImageError, match=r"odd\.png: (not a regular file|damaged)"):
        read_image(tmp_path / "odd.png")
    with pytest.raises(ImageError, match="no such file"):
        read_image(tmp_path / "none.png")


@pytest.mark.parametrize("mode", ["float", "int", "lab"])
def test_other_pixel_formats_are_refused_by_name(tmp_path, mode):
    image = pyvips.Image.new_from_array(gradient())
    image = {"float": image.cast("float"), "int": image.cast("uint"), "lab": image.colourspace("lab")}[mode]
    image.tiffsave(str(tmp_path / "odd.tif"))
    with pytest.raises(ImageError, match="pixels of the kind"):
        read_image(tmp_path / "odd.tif")


def test_formats_that_cannot_hold_a_picture_say_so_before_any_work(tmp_path):
    with pytest.raises(ImageError, match="16383 pixels a side"):
        check_writable("x.webp", 20_000, 10, alpha=False)
    with pytest.raises(ImageError, match="65500 pixels a side"):
        check_writable("x.jpg", 10, 70_000, alpha=False)
    with pytest.raises(ImageError, match=r"cannot write \.gif"):
        check_writable("x.gif", 10, 10, alpha=False)


def test_oversized_metadata_does_not_stop_a_jpeg(tmp_path):
    picture = replace(Picture(gradient()), exif=b"II*\0\x08\0\0\0\0\0" + bytes(70_000), xmp=b"x" * 70_000)
    write_image(tmp_path / "a.jpg", picture)
    assert read_image(tmp_path / "a.jpg").exif is None


def test_a_missing_folder_is_told_by_the_path_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError) as error, atomic_path(tmp_path / "missing" / "page.html"):
        pass
    assert error.value.filename == str(tmp_path / "missing" / "page.html")
