"""Formats: content decides, what is not installed is named, limits hold before decoding, and no byte is lost."""

import io
import struct
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from engine.io.codecs.png import chunks
from engine.io.formats import FORMATS, READABLE, SUFFIXES
from engine.io.images import ImageError, Picture, check_writable, picture_size, read_image, write_image
from engine.io.libraries import vips
from tests.support.pictures import SRGB, exif_block, gradient, needs, write_seeds

WRITABLE = [row for row in FORMATS if row.write]


@pytest.mark.parametrize("row", WRITABLE, ids=lambda row: row.name)
def test_what_is_written_is_read(tmp_path, row):
    needs(row.name)
    path, said = tmp_path / f"a{row.suffixes[-1].upper()}", []
    picture = Picture(gradient(), icc=SRGB, exif=exif_block(1)[6:], xmp=b"<x:xmpmeta/>")
    write_image(path, picture, notice=said.append)
    back = read_image(path, notice=said.append)
    assert back.format == row.name and not said and picture_size(path) == (24, 37)
    assert np.abs(back.pixels.astype(int) - gradient()).mean() <= (0 if row.lossless == "always" else 3)
    assert back.xmp == picture.xmp and b"Maker" in back.exif
    assert back.icc == (SRGB if row.icc else back.icc)


@pytest.mark.parametrize("name", ["a.webp", "a.jxl"])
def test_lossless_on_request(tmp_path, name):
    needs(SUFFIXES[name[1:]])
    mask = gradient()[..., 1].copy()
    write_image(tmp_path / name, Picture(gradient(), alpha=mask), lossless=True)
    back = read_image(tmp_path / name)
    assert np.array_equal(back.pixels, gradient()) and np.array_equal(back.alpha, mask)
    with pytest.raises(ImageError, match="JPEG is not written lossless"):
        check_writable("a.jpg", 9, 9, alpha=False, lossless=True)


def test_every_seed_is_read_by_its_content_under_any_name(tmp_path):
    for seed in write_seeds(tmp_path / "seeds"):
        seed.rename(path := tmp_path / "seeds" / "misleading.jpe")
        assert seed.suffix in READABLE
        assert min(read_image(path).pixels.shape[:2]) == 24 and picture_size(path) == read_image(path).pixels.shape[:2]


def test_the_first_frame_of_a_gif_is_read_and_said(tmp_path):
    frames = [Image.fromarray(gradient()), Image.fromarray(255 - gradient())]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    said = []
    picture = read_image(tmp_path / "a.gif", notice=said.append)
    assert said == [f"{tmp_path / 'a.gif'}: this GIF has 2 frames; the first is read"]
    assert np.abs(picture.pixels.astype(int) - gradient()).mean() < 12


def test_pnm_of_16_bit_keeps_its_depth(tmp_path):
    deep = gradient(dtype=np.uint16)
    (tmp_path / "a.ppm").write_bytes(b"P6\n# words\n37 24\n65535\n" + deep.astype(">u2").tobytes())
    assert np.array_equal(read_image(tmp_path / "a.ppm").pixels, deep)
    (tmp_path / "b.pgm").write_bytes(b"P5 37 24 1023 " + (deep[..., 0] >> 6).astype(">u2").tobytes())
    picture = read_image(tmp_path / "b.pgm")
    assert picture.gray and np.abs(picture.pixels[..., 0].astype(int) - deep[..., 0]).max() <= 64
    (tmp_path / "c.pgm").write_bytes((tmp_path / "b.pgm").read_bytes()[:-1])
    with pytest.raises(ImageError, match="a part of its pixels is missing"):
        read_image(tmp_path / "c.pgm")


@pytest.mark.parametrize("kind, package", [("JXL", "pillow_jxl"), ("HEIC", "pillow_heif")])
def test_a_format_whose_decoder_is_missing_names_the_extra(tmp_path, monkeypatch, kind, package):
    monkeypatch.setitem(sys.modules, package, None)
    heads = {"JXL": bytes.fromhex("ff0a98003c80480000001600"), "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"}
    (tmp_path / "a").write_bytes(heads[kind] + bytes(64))
    with pytest.raises(ImageError, match=r"a: .* needs pillow-\w+.*pip install 'gdpo-sr\[formats\]'"):
        read_image(tmp_path / "a")


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_end_is_read_with_a_warning_one_without_pixels_is_not(tmp_path, progressive):
    buffer, path, said = io.BytesIO(), tmp_path / "a.jpg", []
    Image.fromarray(gradient(200, 300)).save(buffer, "JPEG", progressive=progressive, quality=95)
    data = buffer.getvalue()
    path.write_bytes(data)
    whole = read_image(path, notice=said.append).pixels
    assert not said
    path.write_bytes(data[:-2])
    assert np.array_equal(read_image(path, notice=said.append).pixels, whole)
    assert len(said) == 1 and "the end of this JPEG is missing" in said[0]
    cuts = [len(data) - 40, len(data) // 2]
    if progressive:  # whole scans, but not all of them
        starts = [i for i in range(len(data)) if data.startswith(b"\xff\xda", i)]
        assert len(starts) > 5
        cuts += starts[1:]
    for cut in cuts:
        for end in (b"", b"\xff\xd9", b"\xff\xd9" + data):  # cut short; given an end; and another picture behind it
            path.write_bytes(data[:cut] + end)
            with pytest.raises(ImageError, match=r"truncated JPEG: .* (is|are) missing"):
                read_image(path, notice=said.append)
    path.write_bytes(data + data[: data.rindex(b"\xff\xda")])  # what follows the end of a picture is none of its scans
    assert np.array_equal(read_image(path, notice=said.append).pixels, whole)
    assert len(said) == 1


def jpeg_of_grain(height: int, width: int, sampling: str) -> bytes:
    """A JPEG with sampling factors that Pillow does not write: their MCUs hold the same blocks as those of others."""
    written = {"4:4:0": "4:2:2", "gray 2x2": "gray"}.get(sampling, sampling)
    if sampling == "4:4:0":  # one block above the other instead of beside it
        shape = (8 * (-(-height // 16)), 16 * (-(-width // 8)), 3)
    else:
        shape = (height, width, 3)
    grain, buffer = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), io.BytesIO()
    if written == "gray":
        Image.fromarray(grain[..., 0]).save(buffer, "JPEG", quality=90)
    else:
        Image.fromarray(grain).save(buffer, "JPEG", quality=90, subsampling=written)
    data = bytearray(buffer.getvalue())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    data[frame + 11] = {"4:4:0": 0x12, "gray 2x2": 0x22}.get(sampling, data[frame + 11])
    return bytes(data)


@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:2", "4:2:0", "4:4:0", "gray", "gray 2x2"])
@pytest.mark.parametrize("height", [1, 5, 8, 9, 20, 64, 67, 72, 75])
def test_a_jpeg_whose_last_rows_are_missing_is_refused(tmp_path, sampling, height):
    path, said = tmp_path / "a.jpg", []
    data = jpeg_of_grain(height, 80, sampling)
    path.write_bytes(data)
    whole = read_image(path, notice=said.append).pixels
    plain = vips().Image.jpegload_buffer(data).numpy().reshape(height, 80, -1)
    assert np.array_equal(whole, np.broadcast_to(plain, whole.shape)) and not said
    path.write_bytes(data[:-2])
    assert np.array_equal(read_image(path, notice=said.append).pixels, whole) and len(said) <= 1
    for cut in (5, 30, 60):
        path.write_bytes(data[:-cut] + b"\xff\xd9")
        with pytest.raises(ImageError, match="truncated JPEG: a part of its pixels is missing"):
            read_image(path)


def test_a_jpeg_of_12_bit_is_refused_by_name(tmp_path):
    data = bytearray(jpeg_of_grain(8, 8, "4:4:4"))
    data[data.index(b"\xff\xc0") + 1] = 0xC1  # extended sequential
    data[data.index(b"\xff\xc1") + 4] = 12
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(ImageError, match="a JPEG of 12 bit a sample; those of 8 bit are read"):
        read_image(tmp_path / "a.jpg")
    assert picture_size(tmp_path / "a.jpg") is None


@pytest.mark.parametrize("row", WRITABLE, ids=lambda row: row.name)
@pytest.mark.parametrize("size", [(1, 1), (1, 70), (70, 1)])
def test_pictures_of_one_pixel_one_row_one_column(tmp_path, row, size):
    path = tmp_path / f"a{row.suffixes[0]}"
    for dtype in (np.uint8, np.uint16):
        for gray in (False, True):
            pixels = np.full((*size, 3), np.iinfo(dtype).max // 5, dtype)
            write_image(path, Picture(pixels, gray=gray))
            result = read_image(path).pixels
            assert result.shape == pixels.shape
            assert np.abs(result / np.iinfo(result.dtype).max - 0.2).max() < 0.02


def test_both_decoders_of_jpeg_agree(tmp_path):
    """libvips decodes what is in order, Pillow what is not: the same pixels, whatever the subsampling."""
    for name, options in {"a": {}, "b": {"subsampling": 0}, "c": {"subsampling": 1, "progressive": True}}.items():
        for image in (Image.fromarray(gradient(123, 77)), Image.fromarray(gradient(123, 77)[..., 0])):
            image.save(tmp_path / f"{name}.jpg", quality=80, **options)
            with Image.open(tmp_path / f"{name}.jpg") as decoded:
                want = np.asarray(decoded.convert("RGB"))
            assert np.array_equal(read_image(tmp_path / f"{name}.jpg").pixels, want)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_gray_of_a_png_is_transparent(tmp_path, bits):
    stored = np.arange(48).reshape(3, 16) * 5 % (1 << min(bits, 8)) * (257 if bits == 16 else 1)
    lines = b""
    for row in stored:
        packed = "".join(format(value, f"0{bits}b") for value in row)
        lines += b"\0" + int(packed, 2).to_bytes(len(packed) // 8)
    clear = int(stored[1, 3])
    head, color = struct.pack(">IIBBBBB", 16, 3, bits, 0, 0, 0, 0), struct.pack(">H", clear)
    chunks = [(b"IHDR", head), (b"tRNS", color), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    picture = read_image(tmp_path / "a.png")
    full = np.iinfo(picture.pixels.dtype).max
    assert picture.gray and np.array_equal(picture.alpha == 0, stored == clear)
    assert np.array_equal(picture.pixels[..., 0], stored * (full // ((1 << bits) - 1)))


@pytest.mark.parametrize("compression", ["zstd", "lzma"])
def test_a_compression_that_is_not_read_is_named(tmp_path, compression):
    Image.fromarray(gradient()).save(tmp_path / "a.tif", compression=compression)
    try:
        assert np.array_equal(read_image(tmp_path / "a.tif").pixels, gradient())  # another build of libvips has it
    except ImageError as error:
        assert "its compression (" in str(error) and "save it with Deflate or LZW" in str(error)


@pytest.mark.parametrize("options", [{}, {"bigtiff": True}, {"tile": True, "tile_width": 32, "tile_height": 32}],
                         ids=["strips", "BigTIFF", "tiles"])  # fmt: skip
@pytest.mark.parametrize("gray", [False, True])
def test_a_tiff_of_jpegs_that_lacks_pixels_is_refused(tmp_path, options, gray):
    pixels = gradient(64, 80)[..., : 1 if gray else 3]
    image = vips().Image.new_from_array(pixels.copy())
    image.set_type(vips().GValue.gstr_type, "image-description", "a photo")
    path, said = tmp_path / "a.tif", []
    image.tiffsave(str(path), compression="jpeg", Q=95, **options)
    data = path.read_bytes()
    if not options:  # a tag of its own, which decoders warn of
        at = struct.unpack_from("<I", data, 4)[0]
        count = struct.unpack_from("<H", data, at)[0]
        old = [data[at + 2 + 12 * i : at + 14 + 12 * i] for i in range(count)]
        entries = [*old, struct.pack("<HHII", 65000, 3, 1, 7)]
        data = data[:4] + struct.pack("<I", len(data) + len(data) % 2) + data[8:] + bytes(len(data) % 2)
        data += struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
        path.write_bytes(data)
    whole = read_image(path, notice=said.append)
    assert np.abs(whole.pixels.astype(int) - pixels).max() <= 12 and whole.text == {"Description": "a photo"}
    first = data.index(b"\xff\xda") + 14
    last = data.index(b"\xff\xd9", first)
    for hole in (first + 20, (first + last) // 2, last - 20):
        path.write_bytes(data[:hole] + b"\xff\xd9" + data[hole + 2 :])  # the end comes early
        with pytest.raises(ImageError, match="truncated TIFF: a part of its pixels is missing"):
            read_image(path)
    assert not said


def strip_tiff(width, height):
    """A TIFF of many rows in one deflated strip."""
    packed = zlib.compress(bytes(1000))
    entries = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 8), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    entries += [(278, 4, height), (279, 4, len(packed))]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", t, k, 1, v) for t, k, v in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + directory + bytes(4)


def png(head, lines):
    """A PNG of a header's fields and filtered rows."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packed = zlib.compress(lines, 1)
    parts = [packed[at : at + 1000] for at in range(0, len(packed), 1000)]
    body = b"".join(chunk(b"IDAT", part) for part in parts)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", *head)) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("size", [(37, 24), (1, 1), (3, 2)])
@pytest.mark.parametrize("bits, color, samples", [(8, 2, 3), (8, 6, 4), (8, 4, 2), (8, 0, 1), (1, 0, 1), (4, 0, 1),
                                                  (16, 2, 3), (16, 0, 1)])  # fmt: skip
@pytest.mark.parametrize("black", [False, True])
def test_a_png_whose_pixels_end_early_is_refused(tmp_path, interlaced, size, bits, color, samples, black):
    """Its data are whole for zlib, and its end is there: decoders leave black what is missing."""
    width, height = size
    grain = np.random.default_rng(0).integers(0, 1 if black else 1 << min(bits, 8), (height, width, samples))
    adam7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = []
    for x, y, right, down in adam7 if interlaced else [(0, 0, 1, 1)]:
        for row in grain[y::down, x::right]:
            if row.size:
                text = "".join(format(value, f"0{bits}b") for value in row.ravel())
                rows.append(b"\0" + int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8)))
    path, head = tmp_path / "a.png", (width, height, bits, color, 0, 0, int(interlaced))
    path.write_bytes(png(head, b"".join(rows)))
    whole = read_image(path)
    expected = grain[..., :3] if samples >= 3 else grain[..., :1]
    stored = whole.pixels.astype(int) * ((1 << bits) - 1) // np.iinfo(whole.pixels.dtype).max
    assert np.array_equal(stored, np.broadcast_to(expected, stored.shape))
    for lines in (rows[:-1], rows[: len(rows) // 2], [*rows[:-1], rows[-1][:-1]]):
        path.write_bytes(png(head, b"".join(lines)))
        with pytest.raises(ImageError, match="truncated"):
            read_image(path)


def tall_png(depth, rows):
    return png((1, rows, depth, 0, 0, 0, 0), bytes(rows * (1 + depth // 8)))


SLOW = {
    "column.tif": lambda: strip_tiff(1, 99_000_000),
    "deep.png": lambda: tall_png(16, 20_000_000),
    "rows.png": lambda: tall_png(8, 1_048_576),
    "side.gif": lambda: b"GIF89a" + struct.pack("<HH", 65535, 9) + bytes(30),
    "scans.jpg": lambda: many_scans(6000, 5000, 300),
    "huge.pgm": lambda: b"P5 99999999 1 255\n" + bytes(100),
}


def many_scans(width, height, scans):
    buffer = io.BytesIO()
    Image.fromarray(gradient(64, 64)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    first, size = data.index(b"\xff\xda"), data.index(b"\xff\xc2") + 5
    second = data.index(b"\xff\xda", first + 2)
    head = data[:size] + struct.pack(">HH", height, width) + data[size + 4 : first]
    return head + data[first:second] * scans + data[second:]


@pytest.mark.parametrize("name", SLOW)
def test_what_would_take_long_is_refused_from_its_header(tmp_path, name):
    (tmp_path / name).write_bytes(SLOW[name]())
    begin = time.process_time()
    with pytest.raises(ImageError, match=r"a side are read|megapixels|of \d+ scans|truncated"):
        read_image(tmp_path / name)
    assert time.process_time() - begin < 1


@pytest.mark.parametrize(("count", "read"), [(4000, True), (100_000, False)])
def test_a_png_of_chunks_without_end_is_refused(tmp_path, count, read):
    file = tmp_path / "a.png"
    write_image(file, Picture(gradient()))
    data, text = file.read_bytes(), b"tEXtk\0v"
    chunk = struct.pack(">I", 3) + text + struct.pack(">I", zlib.crc32(text))
    file.write_bytes(data[:33] + chunk * count + data[33:])
    if read:
        assert np.array_equal(read_image(file).pixels, gradient())
        return
    with pytest.raises(ImageError, match="more than 5000 chunks beside its pixels"):
        read_image(file)


def test_a_pnm_comment_without_end_is_refused(tmp_path):
    """Pillow would read it byte by byte: seconds for some megabytes."""
    file = tmp_path / "a.ppm"
    file.write_bytes(b"P6 #" + b" " * 10_000_000)
    with pytest.raises(ImageError, match="damaged PNM header"):
        read_image(file)
    file.write_bytes(b"P6 # by hand\n1 # wide\n1\n255\n" + bytes(3))
    assert read_image(file).pixels.shape == (1, 1, 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_has_one_filter_and_the_size_of_the_best_of_all(tmp_path, dtype):
    from skimage import data

    photo = data.coffee()[:200] * dtype(np.iinfo(dtype).max // 255)
    write_image(tmp_path / "a.png", Picture(photo))
    assert np.array_equal(read_image(tmp_path / "a.png").pixels, photo)
    content = (tmp_path / "a.png").read_bytes()
    parts = (c for kind, c in chunks(io.BytesIO(content), contents={b"IDAT"}) if kind == b"IDAT")
    rows = np.frombuffer(zlib.decompress(b"".join(parts)), np.uint8).reshape(len(photo), -1)
    assert set(rows[:, 0]) == {3}  # the average of the samples to the left and above
    image = vips().Image.new_from_array(photo, interpretation="srgb" if dtype == np.uint8 else "rgb16")
    assert len(content) < 1.1 * len(image.pngsave_buffer(filter="all", compression=6, bitdepth=8 * photo.itemsize))
