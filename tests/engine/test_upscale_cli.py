"""`python -m engine.upscale` as a user meets it."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from engine import upscale
from engine.io import journal
from engine.io.images import read_image
from engine.jobs import plan
from engine.runtime.backends import tensorrt as trt_backend
from tests.support.pictures import save

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def test_one_picture_to_one_file(run, photo, tmp_path):
    source = save(tmp_path / "in.png", photo[:30, :41])
    assert run(source, tmp_path / "out.webp")[::2] == (0, "")
    code, _, err = run(source, tmp_path / "out.webp")
    assert code == 0 and "1 skipped (finished before; --overwrite" in err  # silence would pass for success
    assert read_image(tmp_path / "out.webp").pixels.shape == (120, 164, 3)
    code, _, _ = run("-i", source, "-o", tmp_path / "out.png", "-s", "2", "--seed", "5", "--color", "wavelet")
    assert code == 0 and read_image(tmp_path / "out.png").pixels.shape == (60, 82, 3)


@pytest.mark.parametrize("there", ["half a picture", "another scale"])
def test_what_is_no_result_is_not_called_finished(run, photo, tmp_path, there):
    source, out = save(tmp_path / "in.png", photo[:16, :20]), tmp_path / "out.png"
    if there == "another scale":
        save(out, photo[:32, :40])
    else:
        out.write_bytes(b"\x89PNG\r\n\x1a\n")
    before = out.read_bytes()
    code, _, err = run(source, out)
    assert code == 1 and "0 written, 1 failed" in err
    assert "is there already and was not made by this command; --overwrite replaces it" in err
    assert out.read_bytes() == before
    assert run(source, out, "--overwrite")[0] == 0 and read_image(out).pixels.shape == (64, 80, 3)


def test_gray_alpha_depth_profile_and_metadata_are_kept(run, photo, tmp_path):
    gray = np.repeat(photo[:24, :24, :1], 3, axis=2).astype(np.uint16) * 257
    source = save(tmp_path / "in.png", gray, gray=True, alpha=gray[..., 0].copy(), xmp=b"<x/>", text={"Title": "t"})
    assert run(source, tmp_path / "out.png")[0] == 0
    out = read_image(tmp_path / "out.png")
    assert out.gray and out.pixels.dtype == np.uint16 and out.alpha.shape == (96, 96)
    assert out.xmp == b"<x/>" and out.text == {"Title": "t"}
    assert run(source, tmp_path / "bare.png", "--strip-metadata")[0] == 0
    bare = read_image(tmp_path / "bare.png")
    assert bare.xmp is None and bare.exif is None and not bare.text


def test_a_folder_mirrors_its_tree_skips_what_is_done_and_goes_on_after_a_bad_file(run, photo, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "photos" / "out"
    save(photos / "a.png", photo[:16, :16])
    save(photos / "deep" / "b.jpg", photo[:16, :20])
    (photos / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    code, stdout, err = run(photos, out, "--recursive", "--json")
    assert code == 1 and "2 written, 1 failed" in err and "bad.png" in err
    rows = {Path(r["input"]).name: r for r in map(json.loads, stdout.splitlines())}
    assert rows["a.png"]["status"] == "written" and rows["a.png"]["width"] == 64
    assert rows["bad.png"]["status"] == "failed" and "error" in rows["bad.png"]
    assert (out / "deep" / "b.jpg").is_file() and not (out / "bad.png").exists()
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*.*")}
    code, _, err = run(photos, out, "--recursive")  # its own outputs lie below the input: they are no inputs
    assert code == 1 and "0 written, 2 skipped" in err
    assert stamps == {p: p.stat().st_mtime_ns for p in out.rglob("*.*")}
    assert "2 written" in run(photos, out, "--recursive", "--overwrite")[2]
    assert {p.name for p in photos.rglob(".*")} == {journal.NAME}  # nothing staged is left


def test_compare_writes_one_self_contained_page(run, photo, tmp_path):
    for i in range(2):
        save(tmp_path / "in" / f"<{i}>.png", photo[:16, 16 * i : 16 * i + 16])
    assert run(tmp_path / "in", tmp_path / "out", "--compare", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4 and page.count('type="range"') == 2
    assert "&lt;0&gt;.png" in page and "<0>" not in page and "http" not in page.replace("https://", "http://")


def test_the_page_of_a_second_run_shows_what_the_first_one_finished(run, photo, tmp_path):
    save(tmp_path / "in" / "a.png", photo[:16, :16])
    assert run(tmp_path / "in", tmp_path / "out")[0] == 0
    save(tmp_path / "in" / "b.png", photo[:16, :16], icc=SRGB)
    code, _, err = run(tmp_path / "in", tmp_path / "out", "--compare", tmp_path / "page.html")
    assert code == 0 and "1 written, 1 skipped" in err
    jpegs = [base64.b64decode(t) for t in re.findall('base64,([^"]*)', (tmp_path / "page.html").read_text())]
    pictures = [Image.open(io.BytesIO(data)) for data in jpegs]
    assert [p.size for p in pictures] == [(64, 64), (16, 16), (64, 64), (16, 16)]
    assert [p.info.get("icc_profile") for p in pictures] == [None, None, SRGB, SRGB]  # the colours are the photo's


def test_a_page_takes_what_a_jpeg_cannot_hold(run, tmp_path):
    source = save(tmp_path / "in.png", np.zeros((1, 17_000, 3), np.uint8))
    code, _, err = run(source, tmp_path / "out.png", "--compare", tmp_path / "page.html")
    assert (code, err) == (0, "") and (tmp_path / "page.html").read_text().count('type="range"') == 1


@pytest.mark.parametrize("text, suffix", [("JPG", ".jpg"), (".Png", ".png"), ("tiff", ".tiff")])
def test_a_format_is_named_in_capitals_or_with_a_dot(run, photo, tmp_path, text, suffix):
    source = save(tmp_path / "in.webp", photo[:16, :16])
    assert run(source, tmp_path / "out" / "", "-f", text)[0] == 0
    assert read_image(tmp_path / "out" / f"in{suffix}").pixels.shape == (64, 64, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "name at least one input"),
        (["a.png"], "name at least one input and an output"),
        (["missing.png", "out.png"], r"missing.png: no such file"),
        (["in/a.png", "out.gif"], "cannot write .gif"),
        (["in/a.png", "in/a.png"], "it would be overwritten"),
        (["in", "in"], "it would be overwritten"),
        (["in/a.png", "in/a.jpg", "out", "-f", "png"], "would both be written"),
        (["empty", "out"], "no .png .jpg"),
        (["*.bmp", "out"], "no picture matches"),
        (["in/a.png", "in/a.jpg", "in/a.png"], "is a file; several inputs need a folder"),
        (["in/a.png", "/dev/null"], "output /dev/null is a file; name it with one of .png .jpg"),
        (["in/a.png", "o.png", "--tile", "1"], "tile must be 16 to 256 input pixels for this model; got 1"),
        (["in/a.png", "o.png", "--tile", "-5"], "tile must be 16 to 256 input pixels for this model; got -5"),
        (["in/a.png", "o.png", "--batch", "0"], "batch must be 1 to 8 for this model; got 0"),
        (["in/a.png", "o.png", "--scale", "0"], "scale must be between 0.05 and 64; got 0"),
        (["in/a.png", "o.png", "--max-pixels", "-2"], "max-pixels must be at least 1; got -2"),
        (["in/a.png", "o.png", "--threads", "-1"], "threads must be 0 (all) or more; got -1"),
        (["in/a.png", "o.png", "--compare", "in/a.jpg/page.html"], "in/a.jpg: this is, or lies below, a file"),
        (["in/a.png", "o.png", "--compare", "empty"], "--compare empty: this is a folder"),
        (["in/a.png", "o.png", "--compare", "in/a.jpg"], "a page's name ends in .html, such as in/a.html"),
        (["in/a.png", "in/a.jpg", "all.png"], "all.png is named like a picture; several inputs need a folder"),
        (["in/a.png", ""], "the output is an empty path"),
        (["", "o.png"], "an input or the output is an empty path"),
        (["in/a.png", "o.png", "--seed", "-1"], "seed must be in"),
        (["in/a.png", "o.png", "--quality", "0"], "quality must be 1 to 100"),
        (["in/a.png", "o.png", "--precision", "fp16"], "this folder is fp32"),
        (["in/a.png", "o.png", "--precision", "fp16", "--backend", "openvino"], "precision fp16: this folder is fp32"),
        (["in/a.png", "o.png", "--device", "cuda:x"], "device must be cpu, cuda or cuda:N; got 'cuda:x'"),
        (["in/a.png", "o.png", "--backend", "tensorrt"], "pip install 'gdpo-sr[tensorrt]'"),
        (["in/a.png", "in/a.jpg/b/o.png"], "lies below, a file"),
        (["in/a.png", "o.png", "--nonsense"], "see: python -m engine.upscale --help"),
        (["in/a.png", "o.png", "--scale", "big"], "error: scale must be a number; got big (see: "),
        (["in/a.png", "o.png", "--scale", "nan"], "error: scale must be a number; got nan (see: "),
        (["in/a.png", "o.png", "--seed", "1.5"], "error: seed must be an integer; got 1.5 (see: "),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(run, photo, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(trt_backend._NAMES, "tensorrt", ("tensorrt_that_is_not_installed",))
    save(tmp_path / "in/a.png", photo[:16, :16])
    save(tmp_path / "in/a.jpg", photo[:16, :16])
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(upscale.Worker, "run", lambda *a: pytest.fail("began to work"))
    code, _, err = run(*arguments)
    assert code == 2 and err.count("\n") == 1 and message in err and err.startswith("error: ")


def test_a_folder_that_cannot_be_written_is_found_before_work(run, photo, tmp_path, monkeypatch):
    source = save(tmp_path / "in.png", photo[:16, :16])
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    code, _, err = run(source, tmp_path / "locked" / "out.png")
    assert code == 2 and "cannot be written" in err
    (tmp_path / "file").touch()
    code, _, err = run(source, tmp_path / "file" / "out.png")
    assert code == 2 and "file" in err


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
def test_a_result_that_the_format_cannot_hold_is_refused_before_work(run, photo, tmp_path, name, monkeypatch):
    source = save(tmp_path / "in.png", np.zeros((1, 20_000, 3), np.uint8))
    monkeypatch.setattr(
        "engine.runtime.upscaler.Upscaler.upscale", lambda *a, **k: pytest.fail("worked before it looked")
    )
    code, _, err = run(source, tmp_path / name)
    assert code == 1 and "pixels a side, got 80000x4" in err


def test_two_outputs_that_differ_in_case_clash(photo, tmp_path):
    save(tmp_path / "x" / "A.png", photo[:8, :8])
    save(tmp_path / "y" / "a.png", photo[:8, :8])
    with pytest.raises(ValueError, match="would both be written"):
        plan([str(tmp_path / "x" / "A.png"), str(tmp_path / "y" / "a.png")], str(tmp_path / "out"))


def test_suffixed_outputs_beside_their_inputs_are_not_taken_again(photo, tmp_path):
    save(tmp_path / "a.png", photo[:8, :8])
    save(tmp_path / "a_x4.png", photo[:8, :8])
    save(tmp_path / "b_x4.png", photo[:8, :8])  # no b.png: a picture of the user's
    jobs = plan([str(tmp_path)], str(tmp_path), suffix="_x4")
    assert sorted(j.source.name for j in jobs) == ["a.png", "b_x4.png"]


def command(*arguments):
    return [sys.executable, "-m", "engine.upscale", *map(str, arguments)]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_in_the_middle_leaves_no_partial_file(tiny_engine, photo, tmp_path, number, code):
    for i in range(200):
        save(tmp_path / "in" / f"{i:03}.png", photo[:128, :128])
    line = command(tmp_path / "in", tmp_path / "out", "--model", tiny_engine, "--threads", 1)
    # A shell that runs the tests in the background has them ignore Ctrl-C, and their children with them.
    process = subprocess.Popen(
        line, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("[0-9]*.png")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and err.splitlines()[-1].startswith("error: ")
    done = [p for p in (tmp_path / "out").iterdir() if p.name != journal.NAME]
    assert 0 < len(done) < 200 and all(p.suffix == ".png" and not p.name.startswith(".") for p in done)
    for path in done:
        assert read_image(path).pixels.shape == (512, 512, 3)


def test_a_real_photo_of_several_tiles(tiny_engine, photo, tmp_path):
    source = save(tmp_path / "in.png", photo[:256, :256])
    subprocess.run(command(source, tmp_path / "out.png", "--model", tiny_engine), check=True, timeout=60)
    assert read_image(tmp_path / "out.png").pixels.shape == (1024, 1024, 3)


def test_a_folder_called_like_the_output_is_found_before_work(run, photo, tmp_path):
    source, out = save(tmp_path / "a.png", photo[:16, :20]), tmp_path / "o"
    (out / "a.png").mkdir(parents=True)
    for more in ((), ("--overwrite",)):
        code, _, err = run(source, f"{out}/", *more)
        assert code == 1 and f"{out}/a.png: is there already and is a folder; --on-clash rename" in err
    assert run(source, f"{out}/", "--on-clash", "rename")[0] == 0 and (out / "a-2.png").is_file()
