"""Files as other programs write them, which a reader may take for damaged, or for another picture."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from engine.io.images import ImageError, Picture, picture_size, read_image, write_image
from engine.io.picture import upright
from engine.io.profiles import gray_profile, matrix_profile
from tests.support.pictures import SRGB, exif_block, gradient, installed

PIXELS = gradient()
HEIGHT, WIDTH = PIXELS.shape[:2]
P3 = matrix_profile(((0.68, 0.32), (0.265, 0.69), (0.15, 0.06)), (0.3127, 0.3290), "srgb")
XMP = b'<rdf:RDF xmlns:tiff="http://ns.adobe.com/tiff/1.0/"><rdf:Description %s/></rdf:RDF>'


def chunk(kind: bytes, content: bytes, *, right: bool = True) -> bytes:
    crc = zlib.crc32(kind + content) ^ (not right)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def png(*extra: bytes, deep: bool = False, end: bool = True) -> bytes:
    """PIXELS as a PNG with chunks of the caller's before the pixels."""
    pixels = (PIXELS.astype(">u2") * 257 if deep else PIXELS).reshape(HEIGHT, -1)
    lines = np.pad(np.ascontiguousarray(pixels).view(np.uint8), ((0, 0), (1, 0))).tobytes()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16 if deep else 8, 2, 0, 0, 0))
    tail = chunk(b"IEND", b"") if end else b""
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", zlib.compress(lines)) + tail


MANY = b"a" * 3_000_000
ODD_CHUNKS = {
    "long text": chunk(b"zTXt", b"k\0\0" + zlib.compress(MANY)),
    "long international text": chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(MANY)),
    "large profile": chunk(b"iCCP", b"p\0\0" + zlib.compress(P3 + MANY)),
    "text of a wrong checksum": chunk(b"tEXt", b"a\0b", right=False),
    "gamma of a wrong checksum": chunk(b"gAMA", struct.pack(">I", 45455), right=False),
    "profile of a wrong checksum": chunk(b"iCCP", b"p\0\0" + zlib.compress(SRGB), right=False),
    "no text": chunk(b"tEXt", b""),
}


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("name", ODD_CHUNKS)
def test_no_chunk_beside_the_pixels_costs_the_picture(tmp_path, name, deep):
    (tmp_path / "a.png").write_bytes(png(ODD_CHUNKS[name], deep=deep))
    picture = read_image(tmp_path / "a.png")
    assert np.array_equal(picture.pixels, PIXELS * np.uint16(257) if deep else PIXELS)
    if name == "large profile":
        assert picture.icc == P3 + MANY
    if "text of" not in name and "long" not in name and name != "no text":
        assert picture.icc or picture.color_tags


@pytest.mark.parametrize("deep", [False, True])
def test_a_png_without_its_end_or_with_more_behind_it_is_read(tmp_path, deep):
    for data in (png(deep=deep, end=False), png(deep=deep) + b"more" * 100):
        (tmp_path / "a.png").write_bytes(data)
        assert read_image(tmp_path / "a.png").pixels.shape == PIXELS.shape


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_an_orientation_that_only_xmp_tells_is_applied(tmp_path, suffix, orientation):
    xmp = XMP % (b'tiff:Orientation="%d"' % orientation)
    path = tmp_path / f"a.{suffix}"
    write_image(path, Picture(PIXELS), quality=100)
    flat = read_image(path)
    options = {"lossless": True} if suffix == "webp" else {}
    if suffix == "png":
        path.write_bytes(png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)))
    else:
        Image.fromarray(PIXELS).save(path, xmp=xmp, quality=100, subsampling=0, **options)
        flat = read_image(path) if orientation == 1 else flat
    picture, wanted = read_image(path), upright(Picture(PIXELS), orientation)
    assert picture_size(path) == picture.pixels.shape[:2] == wanted.pixels.shape[:2]
    assert np.abs(picture.pixels.astype(int) - wanted.pixels).max() <= (12 if suffix == "jpg" else 0)
    assert b'tiff:Orientation="1"' in picture.xmp


def test_exif_goes_before_xmp(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=exif_block(1), xmp=XMP % b'tiff:Orientation="6"')
    assert read_image(tmp_path / "a.jpg").pixels.shape == PIXELS.shape


@pytest.mark.parametrize("order", "<>")
def test_an_orientation_of_32_bits_is_applied_and_reset(tmp_path, order):
    magic = b"II*\0" if order == "<" else b"MM\0*"
    exif = magic + struct.pack(order + "IHHHIII", 8, 1, 0x0112, 4, 1, 6, 0)
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif)
    picture = read_image(tmp_path / "a.jpg")
    assert picture.pixels.shape == (WIDTH, HEIGHT, 3)
    write_image(tmp_path / "b.jpg", picture)
    assert read_image(tmp_path / "b.jpg").pixels.shape == (WIDTH, HEIGHT, 3)


def test_what_stands_behind_a_jpeg_is_none_of_its_scans(tmp_path):
    """A phone puts a film behind a photo: in 40 MB, the two bytes that begin a scan come 600 times."""
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "JPEG")
    (tmp_path / "a.jpg").write_bytes(file.getvalue() + b"\xff\xda\0\1" * 600)
    assert read_image(tmp_path / "a.jpg").pixels.shape == PIXELS.shape


def test_scans_are_counted_behind_a_comment_that_looks_like_the_end(tmp_path):
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "JPEG", progressive=True)
    head, first, *_, last = file.getvalue().split(b"\xff\xda")
    scan = last.removesuffix(b"\xff\xd9")
    comment = b"\xff\xfe\0\4\xff\xd9"
    (tmp_path / "a.jpg").write_bytes(head + b"\xff\xda" + first + comment + (b"\xff\xda" + scan) * 600 + b"\xff\xd9")
    with pytest.raises(ImageError, match=r"a JPEG of 60\d scans"):
        read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("transparent", [False, True])
def test_a_gif_is_transparent_where_its_first_frame_draws_nothing(tmp_path, transparent):
    file = io.BytesIO()
    frame = Image.fromarray(np.arange(120, dtype=np.uint8).reshape(10, 12) % 4).convert("P")
    frame.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    frame.save(file, "GIF", **({"transparency": 1} if transparent else {}))
    data = bytearray(file.getvalue())
    place = re.search(rb",\0\0\0\0\x0c\0\x0a\0", data).start()
    struct.pack_into("<HH", data, 6, 20, 18)
    struct.pack_into("<HH", data, place + 1, 3, 4)
    (tmp_path / "a.gif").write_bytes(data)
    picture = read_image(tmp_path / "a.gif")
    inner = np.s_[4:14, 3:15]
    drawn = np.zeros((18, 20), bool)
    drawn[inner] = np.asarray(frame) != 1 if transparent else True
    assert np.array_equal(picture.alpha == 255, drawn) and picture.alpha[~drawn].max() == 0
    assert np.array_equal(picture.pixels[drawn], np.asarray(frame.convert("RGB"))[drawn[inner]])


@pytest.mark.parametrize("most", [1023, 65535])
@pytest.mark.parametrize("gray", [False, True])
def test_a_plain_pnm_of_more_than_8_bit_keeps_its_depth(tmp_path, most, gray):
    samples = np.rint((PIXELS[..., 0] if gray else PIXELS).astype(float) * most / 255).astype(int)
    head = b"P%d # a comment\n%d %d\n%d\n" % (2 if gray else 3, WIDTH, HEIGHT, most)
    words = [b"%d" % v for v in samples.ravel()]
    (tmp_path / "a.pnm").write_bytes(head + b" ".join(words[:99]) + b" # another 1 2 3\n" + b"\n".join(words[99:]))
    picture = read_image(tmp_path / "a.pnm")
    wanted = np.rint(samples * (65535 / most)).reshape(HEIGHT, WIDTH, -1) + np.zeros(3)
    assert picture.gray == gray and picture.pixels.dtype == np.uint16 and np.array_equal(picture.pixels, wanted)
    (tmp_path / "b.pnm").write_bytes(head + b" ".join(words[:-1]))
    with pytest.raises(ImageError, match="truncated PNM"):
        read_image(tmp_path / "b.pnm")


def pages(path, *kinds, sub=0):
    """A TIFF whose first page is PIXELS; the others are of its half size. kinds: their NewSubfileType."""
    with tifffile.TiffWriter(path) as file:
        for i, kind in enumerate(kinds):
            part = PIXELS if i == 0 else np.ascontiguousarray(PIXELS[::2, ::2])
            file.write(part, photometric="rgb", subfiletype=kind, subifds=sub if i == 0 else 0, metadata=None)


def test_a_tiff_with_smaller_copies_is_one_picture(tmp_path):
    for name, kinds, sub in (("pages", (0, 1, 1), 0), ("sub-directories", (0, 1), 1), ("lone", (1,), 0)):
        pages(tmp_path / f"{name}.tif", *kinds, sub=sub)
        assert np.array_equal(read_image(tmp_path / f"{name}.tif").pixels, PIXELS), name
    pages(tmp_path / "two.tif", 0, 0)
    with pytest.raises(ImageError, match="several pages"):
        read_image(tmp_path / "two.tif")


def test_the_preview_of_a_raw_file_is_not_taken_for_the_photo(tmp_path):
    for name, kinds, sub in (("dng", (1, 0), 1), ("arw", (1, 0), 0)):
        pages(tmp_path / f"a.{name}", *kinds, sub=sub)
        with pytest.raises(ImageError, match=r"a camera's raw file as it seems; develop it first"):
            read_image(tmp_path / f"a.{name}")


def test_kinds_of_tiff_that_are_not_read_are_named_and_not_called_damaged(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, PIXELS / 255, photometric="rgb")
    with pytest.raises(ImageError, match="64 bits a sample"):
        read_image(path)
    many = np.ascontiguousarray(np.tile(PIXELS, (6, 6, 1)).transpose(2, 0, 1))
    tifffile.imwrite(path, many, photometric="rgb", planarconfig="separate", tile=(64, 64))
    with pytest.raises(ImageError, match="one plane for each colour"):
        read_image(path)


@pytest.mark.skipif(not installed("JXL"), reason="JPEG XL needs the extra `formats`")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_inside_a_jpeg_xl_is_turned_upright(tmp_path, orientation):
    import pillow_jxl  # noqa: F401

    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", quality=95, exif=exif_block(orientation))
    with Image.open(tmp_path / "a.jpg") as image:
        wanted = upright(Picture(np.asarray(image)), orientation).pixels
        image.save(tmp_path / "a.jxl", lossless_jpeg=True)
    picture = read_image(tmp_path / "a.jxl")
    assert picture_size(tmp_path / "a.jxl") == wanted.shape[:2]
    assert np.abs(picture.pixels.astype(int) - wanted).max() <= 2


LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
UNUSABLE = {
    "nonsense": (b"nonsense", "it is damaged"),
    "cut": (P3[:300], "it is damaged"),
    "zeros": (bytes(600), "it is damaged"),
    "for gray": (gray_profile(2.2), "it is for gray pictures"),
    "for Lab": (LAB, "it is for other colours (Lab)"),
}


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("name", UNUSABLE)
def test_a_profile_that_cannot_be_meant_is_left_out_and_costs_no_colour(tmp_path, suffix, name):
    icc, reason = UNUSABLE[name]
    path, said = tmp_path / f"a.{suffix}", []
    options = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "jpg" else {}
    Image.fromarray(PIXELS).save(path, icc_profile=icc, **options)
    picture = read_image(path, notice=said.append)
    assert picture.icc is None and said == [f"{path}: its colour profile is left out: {reason}"]
    for target in ("b.jpg", "b.webp", "b.tif", "b.png"):
        write_image(tmp_path / target, picture, quality=100)
        back = read_image(tmp_path / target).pixels.astype(int)
        assert np.abs(back - PIXELS).mean() < 3, target


def test_a_gray_profile_of_a_neutral_picture_is_kept(tmp_path):
    """WebP and AVIF have no gray: a gray picture that some program put into one is RGB with a profile for gray."""
    neutral = PIXELS[..., :1].repeat(3, axis=2)
    Image.fromarray(neutral).save(tmp_path / "a.webp", lossless=True, icc_profile=gray_profile(1.0))
    picture = read_image(tmp_path / "a.webp")
    assert picture.icc == gray_profile(1.0)
    write_image(tmp_path / "b.jpg", picture, quality=100)
    linear = neutral / 255
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
    assert np.abs(read_image(tmp_path / "b.jpg").pixels - srgb).max() <= 4
