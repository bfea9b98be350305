"""What travels with a picture is true of the result, and what cannot travel is named."""

import random
import re
import struct
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, IptcImagePlugin

from engine.io.images import Picture, read_image, write_image
from engine.io.metadata import iptc_from_resources, iptc_to_resource, orientation_of, sized_exif, xmp_of_pixels_alone
from engine.pictures import upscale_picture
from tests.support.pictures import exif_block, gradient, mutated

IPTC = b"\x1c\x02\x05\x00\x08My title" + b"\x1c\x02\x19\x00\x06garden"
GAIN_MAP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/"'
    b' xmlns:dc="d" xmlns:Container="http://ns.google.com/photos/1.0/container/" hdrgm:Version="1.0">'
    b"<dc:title>Hill</dc:title>"
    b'<Container:Directory><rdf:Seq><rdf:li><Container:Item Item:Semantic="Primary"/></rdf:li><rdf:li>'
    b'<Container:Item Item:Semantic="GainMap" Item:Length="900"/></rdf:li></rdf:Seq></Container:Directory>'
    b"</rdf:Description></rdf:RDF></x:xmpmeta>"
)
PANORAMA = (
    b'<rdf:Description GPano:FullPanoWidthPixels="64" GPano:FullPanoHeightPixels="48" tiff:ImageWidth="64" '
    b'GPano:CroppedAreaLeftPixels="3" GPano:CroppedAreaTopPixels="0" GPano:PoseHeadingDegrees="64">'
    b"<GPano:CroppedAreaImageWidthPixels>64</GPano:CroppedAreaImageWidthPixels>"
    b"<GPano:CroppedAreaImageHeightPixels>48</GPano:CroppedAreaImageHeightPixels></rdf:Description>"
)


def enlarging():
    """A model that repeats pixels."""

    def upscale(rgb, *, sink, progress=None):
        sink(0, np.kron(rgb, np.ones((4, 4, 1), rgb.dtype)))

    return SimpleNamespace(upscale=upscale)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_iptc_and_comments_survive(tmp_path, suffix):
    picture = Picture(gradient(), iptc=IPTC, text={"Comment": "Grüße", "Description": "a hill"})
    said = []
    write_image(tmp_path / f"a.{suffix}", picture, notice=said.append)
    back = read_image(tmp_path / f"a.{suffix}")
    assert back.iptc == IPTC
    lost = {"jpg": {"Description"}, "png": set(), "tif": {"Comment"}}[suffix]
    assert back.text == {key: value for key, value in picture.text.items() if key not in lost}
    assert len(said) == len(lost) and all(name in said[0] for name in lost)
    if suffix != "png":
        with Image.open(tmp_path / f"a.{suffix}") as image:  # another reader agrees
            assert IptcImagePlugin.getiptcinfo(image)[(2, 5)] == b"My title"


def test_what_a_format_does_not_hold_is_named(tmp_path):
    said = []
    write_image(tmp_path / "a.webp", Picture(gradient(), iptc=IPTC, text={"Software": "x"}), notice=said.append)
    assert [re.sub(r"^.*a\.webp: ", "", line) for line in said] == [
        "text left out, which WEBP does not hold: Software",
        "IPTC left out, which WEBP does not hold",
    ]
    long = replace(Picture(gradient()), exif=b"II*\0\x08\0\0\0\0\0" + bytes(70_000), xmp=b"x" * 70_000)
    said.clear()
    write_image(tmp_path / "a.jpg", long, notice=said.append)
    assert len(said) == 2 and "EXIF left out" in said[0] and "XMP left out" in said[1]
    assert read_image(tmp_path / "a.jpg").exif is None


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_sizes_are_those_of_the_result(tmp_path, suffix):
    Image.fromarray(gradient()).save(tmp_path / "a.jpg", exif=exif_block(6), xmp=PANORAMA)
    result = upscale_picture(enlarging(), read_image(tmp_path / "a.jpg"))
    path = tmp_path / f"b.{suffix}"
    write_image(path, result)
    with Image.open(path) as image:
        assert image.size == (96, 148)  # 37x24, turned, fourfold
        directory = image.getexif().get_ifd(0x8769)
        assert (directory[0xA002], directory[0xA003]) == (96, 148)
    xmp = read_image(path).xmp
    assert b'FullPanoWidthPixels="256"' in xmp and b'CroppedAreaLeftPixels="12"' in xmp
    assert b"WidthPixels>256<" in xmp and b"HeightPixels>192<" in xmp and b'tiff:ImageWidth="96"' in xmp
    assert b'PoseHeadingDegrees="64"' in xmp


def test_a_size_of_16_bits_grows_in_place():
    block = exif_block(3)[6:]
    exif = Image.Exif()
    exif.load(sized_exif(block, (70_000, 200_000)))
    assert exif.get_ifd(0x8769)[0xA002] == 200_000 and exif.get_ifd(0x8769)[0xA003] == 70_000
    assert orientation_of(block) == 3 and len(sized_exif(block, (1, 1))) == len(block)
    for cut in range(len(block)):  # damaged blocks raise nothing
        sized_exif(block[:cut], (1, 1))


def test_no_gain_map_is_promised(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.jpg", xmp=GAIN_MAP)
    xmp = read_image(tmp_path / "a.jpg").xmp
    assert b"<dc:title>Hill</dc:title>" in xmp and xmp.startswith(b"<x:xmpmeta") and xmp.endswith(b"</x:xmpmeta>")
    assert not re.search(rb"GainMap|hdrgm|Container|Item:", xmp)
    film = b'<a GCamera:MotionPhoto="1" GCamera:MicroVideoOffset="99" dc:x="y"/>'
    assert xmp_of_pixels_alone(film) == b'<a dc:x="y"/>'
    assert xmp_of_pixels_alone(b"<hdrgm:GainMap " * 200) is None and xmp_of_pixels_alone(b"plain") == b"plain"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "avif"])
def test_no_resolution_is_made_up_and_a_given_one_stays(tmp_path, suffix, dtype):
    path = tmp_path / f"a.{suffix}"
    write_image(path, Picture(gradient(dtype=dtype)))
    with Image.open(path) as image:
        assert "dpi" not in image.info
    assert read_image(path).dpi is None
    write_image(path, Picture(gradient(dtype=dtype), dpi=(300, 150)))
    if suffix in ("jpg", "png", "tif"):
        assert read_image(path).dpi == pytest.approx((300, 150), abs=0.02)


def test_a_resolution_from_exif_alone_is_not_written_as_jfif(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.jpg", exif=exif_block(1))
    assert read_image(tmp_path / "a.jpg").dpi is None  # Pillow says 72


def test_exif_that_older_programs_put_into_text_chunks_is_found(tmp_path):
    from PIL import PngImagePlugin

    block = exif_block(6)
    digits = "\n".join(re.findall(".{1,72}", block.hex()))
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(block):8}\n{digits}\n", zip=True)
    Image.fromarray(gradient()).save(tmp_path / "a.png", pnginfo=info)
    picture = read_image(tmp_path / "a.png")
    assert picture.pixels.shape == (37, 24, 3) and b"Maker" in picture.exif and not picture.text


def test_iptc_is_found_among_other_resources():
    other = b"8BIM\x03\xed\x04name\0" + struct.pack(">I", 3) + b"abc\0"
    assert iptc_from_resources(b"Photoshop 3.0\0" + other + iptc_to_resource(IPTC)) == IPTC
    assert iptc_from_resources(IPTC) == IPTC and iptc_from_resources(other) is None
    whole = other + iptc_to_resource(IPTC)
    for cut in range(len(whole)):  # damaged ones raise nothing
        iptc_from_resources(whole[:cut])


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "avif"])
def test_damaged_exif_is_written_or_named_and_costs_no_picture(tmp_path, suffix):
    rng, good, path = random.Random(1), exif_block(6)[6:], tmp_path / f"a.{suffix}"
    for _ in range(40):
        said = []
        write_image(path, Picture(gradient(), exif=good[:8] + mutated(good[8:], rng)), notice=said.append)
        assert read_image(path, notice=said.append).pixels.shape == (24, 37, 3)
        assert all("EXIF left out" in line for line in said)
