"""What the numbers of a picture mean is kept, converted or refused by name."""

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from engine.io.codecs import isobmff
from engine.io.images import ImageError, Picture, read_image, write_image
from engine.io.picture import to_8_bit
from engine.io.profiles import matrix_profile, profile_of

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
BT709 = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
TAGS = {
    "linear": {"gAMA": struct.pack(">I", 100_000)},
    "p3 by primaries": {
        "gAMA": struct.pack(">I", 45455),
        "cHRM": struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000),
    },
    "p3 by name": {"cICP": bytes([12, 13, 0, 1])},
    "srgb": {"sRGB": b"\0"},
    "pq": {"cICP": bytes([9, 16, 0, 1])},
}


def gradient(dtype=np.uint8, height=24, width=37):
    y, x = np.mgrid[0:height, 0:width]
    planes = np.stack([x / width, y / height, (x + y) / (height + width)], axis=2)
    return np.rint(planes * np.iinfo(dtype).max).astype(dtype)


def chunks(path):
    data, at, found = path.read_bytes(), 8, {}
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, content = data[at + 4 : at + 8].decode(), data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length)[0] == zlib.crc32(kind.encode() + content)
        found.setdefault(kind, content)
        at += 12 + length
    return found


def shown(path):
    """The picture as a colour-managed viewer shows it, float [H,W,3] of sRGB levels."""
    with Image.open(path) as image:
        icc = image.info.get("icc_profile")
        image = image.convert("RGB")
        if icc:
            image = ImageCms.profileToProfile(image, ImageCms.ImageCmsProfile(io.BytesIO(icc)), SRGB, outputMode="RGB")
        return np.asarray(image).astype(float)


@pytest.mark.parametrize("name", TAGS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_keeps_its_colour_tags_and_numbers(tmp_path, name, dtype):
    write_image(tmp_path / "a.png", Picture(gradient(dtype), color_tags=TAGS[name]))
    picture = read_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png", picture)
    found = chunks(tmp_path / "b.png")
    assert {key: found.get(key) for key in TAGS[name]} == TAGS[name] == picture.color_tags
    assert list(found)[: 1 + len(TAGS[name])] == ["IHDR", *(k for k in ("cICP", "sRGB", "gAMA", "cHRM") if k in found)]
    assert np.array_equal(read_image(tmp_path / "b.png").pixels, gradient(dtype))


@pytest.mark.parametrize("suffix", ["jpg", "tif", "webp", "avif"])
def test_other_formats_show_the_colours_that_the_tags_meant(tmp_path, suffix):
    """Samples of gamma 1.0 must look as bright as they do in the PNG: 128 of 255 linear is 188 of sRGB."""
    flat = np.full((16, 16, 3), 128, np.uint8)
    write_image(tmp_path / f"a.{suffix}", Picture(flat, color_tags=TAGS["linear"]))
    assert np.abs(shown(tmp_path / f"a.{suffix}") - 188).max() <= 2
    write_image(tmp_path / f"b.{suffix}", Picture(flat, color_tags=TAGS["srgb"]))
    assert np.abs(shown(tmp_path / f"b.{suffix}") - 128).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", ["jpg", "tif", "webp", "avif"])
def test_a_gray_picture_with_tags_gets_a_profile_for_gray_or_srgb(tmp_path, suffix, dtype):
    """No program takes a profile of RGB for a picture of one channel; its primaries mean nothing."""
    flat = np.full((16, 16, 3), 128 if dtype == np.uint8 else 128 * 257, dtype)
    tags = TAGS["linear"] | {"cHRM": TAGS["p3 by primaries"]["cHRM"]}
    write_image(tmp_path / f"a.{suffix}", Picture(flat, True, color_tags=tags))
    back = read_image(tmp_path / f"a.{suffix}")
    if suffix in ("webp", "avif"):
        assert back.icc is None and np.abs(to_8_bit(back.pixels).astype(int) - 188).max() <= 1
    else:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(back.icc))
        seen = ImageCms.profileToProfile(Image.new("L", (1, 1), 128), profile, SRGB, outputMode="RGB")
        assert back.gray and np.abs(np.array(seen.getpixel((0, 0))) - 188).max() <= 1
    for meaning_srgb in ({"cICP": bytes([12, 13, 0, 1])}, TAGS["p3 by primaries"], {"cHRM": bytes(32)}):
        write_image(tmp_path / f"b.{suffix}", Picture(flat, True, color_tags=meaning_srgb))
        back = read_image(tmp_path / f"b.{suffix}")
        assert back.icc is None and np.abs(to_8_bit(back.pixels).astype(int) - 128).max() <= 1


@pytest.mark.parametrize("name", ["p3 by primaries", "p3 by name"])
def test_display_p3_by_tags_is_display_p3_as_a_profile(name):
    icc = profile_of(TAGS[name])
    image = Image.new("RGB", (1, 1), (200, 100, 100))
    seen = ImageCms.profileToProfile(image, ImageCms.ImageCmsProfile(io.BytesIO(icc)), SRGB, outputMode="RGB")
    # By hand: P3 -> XYZ -> sRGB of linear (0.578, 0.127, 0.127) is (0.679, 0.108, 0.118) linear.
    assert np.abs(np.array(seen.getpixel((0, 0))) - [215, 92, 97]).max() <= 1


def test_an_srgb_profile_made_here_changes_nothing():
    icc = matrix_profile(BT709, (0.3127, 0.3290), "srgb")
    image = Image.fromarray(gradient())
    seen = ImageCms.profileToProfile(image, ImageCms.ImageCmsProfile(io.BytesIO(icc)), SRGB, outputMode="RGB")
    assert np.abs(np.asarray(seen).astype(int) - gradient()).max() <= 1


def test_hdr_is_refused_by_name_where_it_cannot_be_kept(tmp_path):
    with pytest.raises(ImageError, match=r"a\.jpg: its colours are HDR \(PQ\)"):
        write_image(tmp_path / "a.jpg", Picture(gradient(), color_tags=TAGS["pq"]))
    with pytest.raises(ImageError, match="primaries"):
        write_image(tmp_path / "a.jpg", Picture(gradient(), color_tags={"cHRM": bytes(32)}))
    assert not list(tmp_path.iterdir())


def test_the_colours_of_an_avif_are_those_of_its_nclx_box(tmp_path):
    write_image(tmp_path / "a.avif", Picture(gradient()))
    data = (tmp_path / "a.avif").read_bytes()
    assert read_image(tmp_path / "a.avif").color_tags == {}
    at = data.index(b"nclx") + 4
    (tmp_path / "p3.avif").write_bytes(data[:at] + struct.pack(">HH", 12, 13) + data[at + 4 :])
    picture = read_image(tmp_path / "p3.avif")
    assert picture.color_tags == {"cICP": bytes([12, 13, 0, 1])}
    write_image(tmp_path / "p3.png", picture)
    assert chunks(tmp_path / "p3.png")["cICP"] == bytes([12, 13, 0, 1])
    (tmp_path / "pq.avif").write_bytes(data[:at] + struct.pack(">HH", 9, 16) + data[at + 4 :])
    with pytest.raises(ImageError, match="HDR"):
        write_image(tmp_path / "pq.jpg", read_image(tmp_path / "pq.avif"))


@pytest.mark.parametrize("bits", [10, 12])
def test_a_deep_avif_keeps_its_depth_and_orientation(tmp_path, bits):
    import pyvips

    samples = gradient(np.uint16, 64, 96)
    image = pyvips.Image.new_from_array(samples).copy(interpretation="rgb16")
    image.heifsave(str(tmp_path / "a.avif"), compression="av1", bitdepth=bits, lossless=True)
    back = read_image(tmp_path / "a.avif").pixels
    assert back.dtype == np.uint16
    assert np.sqrt(np.mean((back.astype(float) - samples) ** 2)) / 257 <= 0.6
    assert isobmff.depth((tmp_path / "a.avif").read_bytes()) == bits


def test_cmyk_is_the_same_in_every_container(tmp_path):
    image = Image.fromarray(gradient()).convert("CMYK")
    image.save(tmp_path / "a.jpg", quality=100, subsampling=0)
    image.save(tmp_path / "a.tif")
    jpeg, tiff = (read_image(tmp_path / name).pixels.astype(int) for name in ("a.jpg", "a.tif"))
    assert np.abs(jpeg - tiff).mean() < 1
    paper = tmp_path / "paper.tif"
    Image.new("CMYK", (4, 4), (0, 0, 0, 0)).save(paper)
    assert read_image(paper).pixels.min() == 255


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_with_a_profile_for_other_colours_is_refused_by_name(tmp_path, suffix):
    Image.new("CMYK", (4, 4)).save(tmp_path / f"a.{suffix}", icc_profile=SRGB.tobytes())
    with pytest.raises(ImageError, match="CMYK colour profile cannot be used"):
        read_image(tmp_path / f"a.{suffix}")


def ycbcr(rgb):
    return np.asarray(Image.fromarray(rgb).convert("YCbCr"))


def test_tiff_photometric_interpretations_give_the_colours_that_they_mean(tmp_path):
    rgb, path = gradient(), tmp_path / "a.tif"
    tifffile.imwrite(path, ycbcr(rgb), photometric="ycbcr", extratags=[(530, "H", 2, (1, 1), True)])
    assert np.abs(read_image(path).pixels.astype(int) - rgb).max() <= 3
    tifffile.imwrite(path, 255 - rgb[..., 0], photometric="miniswhite")
    assert np.array_equal(read_image(path).pixels[..., 1], rgb[..., 0]) and read_image(path).gray
    tifffile.imwrite(path, 65535 - gradient(np.uint16)[..., 0], photometric="miniswhite")
    assert np.array_equal(read_image(path).pixels[..., 1], gradient(np.uint16)[..., 0])


def test_a_lab_tiff_becomes_srgb(tmp_path):
    rgb = Image.fromarray(gradient())
    lab = ImageCms.profileToProfile(rgb, SRGB, ImageCms.createProfile("LAB", 5000), outputMode="LAB")
    lab.save(tmp_path / "a.tif")
    back = read_image(tmp_path / "a.tif")
    assert np.abs(back.pixels.astype(int) - gradient()).mean() <= 1.5 and back.icc is None


def test_chroma_that_is_not_read_is_refused_by_name(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", ycbcr(gradient()), photometric="ycbcr",
                     extratags=[(530, "H", 2, (1, 1), True)])  # fmt: skip
    data = (tmp_path / "a.tif").read_bytes()
    tag = struct.pack("<HHIHH", 530, 3, 2, 1, 1)
    assert data.count(tag) == 1
    (tmp_path / "a.tif").write_bytes(data.replace(tag, struct.pack("<HHIHH", 530, 3, 2, 2, 2)))
    with pytest.raises(ImageError, match="YCbCr with subsampled chroma"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_extra_samples_of_a_tiff_are_what_the_file_says(tmp_path, dtype):
    rgb, full = gradient(dtype), np.iinfo(dtype).max
    mask = np.full(rgb.shape[:2], full // 2, dtype)
    mask[:3] = 0
    four = np.concatenate([rgb, mask[..., None]], axis=2)
    path, said = tmp_path / "a.tif", []
    tifffile.imwrite(path, four, photometric="rgb", extrasamples=["unassalpha"])
    assert np.array_equal(read_image(path).alpha, mask) and np.array_equal(read_image(path).pixels, rgb)
    tifffile.imwrite(path, four, photometric="rgb", extrasamples=["unspecified"])
    picture = read_image(path, notice=said.append)
    assert picture.alpha is None and np.array_equal(picture.pixels, rgb)
    assert len(said) == 1 and "1 extra sample(s) a pixel left out" in said[0]
    premultiplied = np.rint(four[..., :3] * (mask[..., None] / full)).astype(dtype)
    tifffile.imwrite(path, np.concatenate([premultiplied, mask[..., None]], axis=2), photometric="rgb",
                     extrasamples=["assocalpha"])  # fmt: skip
    picture = read_image(path)
    assert np.array_equal(picture.alpha, mask)
    assert np.abs(picture.pixels[3:].astype(int) - rgb[3:]).max() <= 1


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_gray_picture_keeps_a_profile_of_rgb(tmp_path, suffix, alpha, dtype):
    if alpha and suffix == ".jpg":
        pytest.skip("JPEG has no transparency")
    pixels = gradient(dtype)[..., :1].repeat(3, 2)
    icc = matrix_profile(BT709, (0.3127, 0.3290), 1.0)
    path = tmp_path / f"a{suffix}"
    write_image(path, Picture(pixels, True, pixels[..., 0] if alpha else None, icc=icc))
    back = read_image(path)
    assert back.icc == icc and back.gray and (back.alpha is not None) == alpha
    assert suffix == ".jpg" or np.array_equal(back.pixels, pixels)


def test_a_gray_profile_is_not_put_on_rgb_samples(tmp_path):
    gray = Image.fromarray(gradient()[..., 0])
    icc = b"".join([struct.pack(">I4sI4s4s4s", 0, bytes(4), 0x02400000, b"mntr", b"GRAY", b"XYZ "), bytes(12), b"acsp",
                    bytes(28), struct.pack(">3i", 63190, 65536, 54061)]).ljust(128, b"\0")  # fmt: skip
    tags = {b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061),
            b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, 256)}  # fmt: skip  # gamma 1.0
    body, table = b"", struct.pack(">I", len(tags))
    for name, block in tags.items():
        table += name + struct.pack(">II", 128 + 4 + 24 + len(body), len(block))
        body += block + bytes(-len(block) % 4)
    icc = struct.pack(">I", len(icc + table + body)) + (icc + table + body)[4:]
    gray.save(tmp_path / "a.png", icc_profile=icc)
    picture = read_image(tmp_path / "a.png")
    assert picture.icc == icc
    write_image(tmp_path / "b.jpg", picture)  # JPEG has gray: the profile stays
    assert read_image(tmp_path / "b.jpg").icc == icc
    write_image(tmp_path / "c.webp", picture, lossless=True)  # WebP has not: the numbers become sRGB
    back = read_image(tmp_path / "c.webp")
    linear = gradient()[..., 0] / 255
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
    assert back.icc is None and np.abs(back.pixels[..., 1] - srgb).max() <= 4
