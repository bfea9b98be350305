"""Kinds of files: PAM, TGA and animations are read, others are refused by their name with what to do."""

import numpy as np
import pytest
from PIL import Image

from engine.io.images import ImageError, picture_size, read_image
from tests.support.pictures import gradient


@pytest.mark.parametrize("suffix", ["png", "webp", "avif"])
def test_the_first_frame_of_an_animation_is_read_and_said(tmp_path, suffix):
    frames, path, said = [Image.fromarray(gradient()), Image.fromarray(255 - gradient())], tmp_path / f"a.{suffix}", []
    frames[0].save(path, save_all=True, append_images=frames[1:], quality=95)
    picture = read_image(path, notice=said.append)
    assert said == [f"{path}: this {suffix.upper()} has 2 frames; the first is read"]
    assert np.abs(picture.pixels.astype(int) - gradient()).mean() < 6


@pytest.mark.parametrize("most", [1, 200, 255, 1000, 65535])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_pam(tmp_path, depth, most):
    samples = np.random.default_rng(depth).integers(0, most + 1, (5, 7, depth))
    head = f"P7\n# words\nWIDTH 7\nHEIGHT 5\nDEPTH {depth}\nMAXVAL {most}\nTUPLTYPE X\nENDHDR\n".encode()
    (tmp_path / "a").write_bytes(head + samples.astype(">u2" if most > 255 else np.uint8).tobytes())
    picture = read_image(tmp_path / "a")
    full = 65535 if most > 255 else 255
    assert picture.format == "PAM" and picture.pixels.dtype == (np.uint16 if most > 255 else np.uint8)
    expected = np.rint(samples * (full / most))
    assert picture.gray == (depth < 3) and np.array_equal(picture.pixels[..., 0], expected[..., 0])
    assert picture.gray or np.array_equal(picture.pixels, expected[..., :3])
    assert (picture.alpha is None) == (depth % 2 == 1)
    assert picture.alpha is None or np.array_equal(picture.alpha, expected[..., -1])
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-1])
    with pytest.raises(ImageError, match="truncated PAM: a part of its pixels is missing"):
        read_image(tmp_path / "a")


@pytest.mark.parametrize("line", ["DEPTH 5", "DEPTH 0", "MAXVAL 0", "MAXVAL 65536", "WIDTH -1", "WIDTH x"])
def test_a_pam_of_other_samples_or_without_its_numbers_is_refused(tmp_path, line):
    fields = {"WIDTH": "7", "HEIGHT": "5", "DEPTH": "3", "MAXVAL": "255"} | dict([line.split()])
    text = "".join(f"{key} {value}\n" for key, value in fields.items())
    (tmp_path / "a.pam").write_bytes(f"P7\n{text}ENDHDR\n".encode() + bytes(1000))
    count = fields["DEPTH"]
    reason = f"a PAM of {count} samples" if count in ("0", "5") else "damaged or truncated PAM header"
    with pytest.raises(ImageError, match=reason):
        read_image(tmp_path / "a.pam")


@pytest.mark.parametrize("compression", [None, "tga_rle"])
@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA"])
def test_tga(tmp_path, mode, compression):
    image = Image.fromarray(gradient()).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(gradient()[..., 0]))
    image.save(tmp_path / "a.tga", compression=compression)
    picture = read_image(tmp_path / "a.tga")
    assert picture.format == "TGA" and np.array_equal(picture.pixels, np.asarray(image.convert("RGB")))
    assert (picture.alpha is not None) == (mode == "RGBA") and picture.gray == (mode == "L")
    if mode == "RGBA":  # a file that says that its fourth samples mean nothing
        assert np.array_equal(picture.alpha, gradient()[..., 0])
        data = bytearray((tmp_path / "a.tga").read_bytes())
        data[17] &= 0xF0
        (tmp_path / "a.tga").write_bytes(data)
        assert read_image(tmp_path / "a.tga").alpha is None


UNREAD = {
    b"\0\0\0\x0cjP  \r\n\x87\n": "a JPEG 2000 picture, which is not read; save it as PNG or TIFF first",
    b"8BPS\0\1": "a Photoshop document, which is not read; export it as PNG or TIFF first",
    b"\x76\x2f\x31\x01\2\0\0\0": "an OpenEXR picture, which is not read; tone-map it",
    b"#?RADIANCE\n": "a Radiance HDR picture, which is not read; tone-map it",
    b"PF\n60 40\n-1.0\n": "a PFM picture, which is not read; tone-map it",
    b"\0\0\0\x18ftypcrx \0\0\0\1": r"a camera's raw file \(CR3\), which is not read; develop it",
    b"II*\0\x10\0\0\0CR\2\0": r"a camera's raw file \(CR2\), which is not read; develop it",
    b"FUJIFILMCCD-RAW 0201": r"a camera's raw file \(RAF\)",
    b"IIRO\x08\0\0\0": r"a camera's raw file \(ORF\)",
    b"\0\0\1\0\2\0\x10\x10": r"an icon \(ICO\)",
    b"<?xml version='1.0'?>\n<!-- made -->\n<svg xmlns=": "an SVG drawing, which is not read; export it",
    b"\0\0\0\x20ftypisom\0\0\2\0isomiso2": "a video, which is not read; extract the frames first",
    b"%PDF-1.7": "a PDF, which is not read",
    b"\n<!DOCTYPE html>": "a page of HTML, which is not read; the download may have failed",
    b"version https://git-lfs.github.com/spec/v1\n": "a Git LFS pointer, which is not read; fetch the file",
    b"PK\3\4": "a ZIP archive, which is not read; unpack it first",
    b"nothing of the kind": r"not a picture of a kind that is read \(PNG, ",
}


@pytest.mark.parametrize("head", UNREAD)
def test_a_kind_that_is_not_read_is_named_with_what_to_do(tmp_path, head):
    (tmp_path / "a.png").write_bytes(head + bytes(300))
    with pytest.raises(ImageError, match=f"a\\.png: {UNREAD[head]}"):
        read_image(tmp_path / "a.png")
    assert picture_size(tmp_path / "a.png") is None
