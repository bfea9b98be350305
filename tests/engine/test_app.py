"""The page, in a real browser: what is dropped comes back with the command line's bytes."""

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from tests.support.folders import model, write_folder
from tests.support.pictures import exif_block
from tests.support.service import ROOT

pytest.importorskip("gradio", reason="the extra app is not installed (pip install -e '.[app]')")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
WAIT = 90_000  # milliseconds; much less on a machine that is not busy


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("app") / "model", model())


@pytest.fixture(scope="module")
def url(folder):
    command = [sys.executable, "-m", "engine.app", "--port", "0", "--model", folder, "--pictures", "3"]
    command += ["--max-pixels", "10000", "--max-mib", "0.2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        yield next(m[1] for line in process.stderr if (m := re.search(r"listening on (http://127\S+)", line)))
    finally:
        process.terminate()
        rest = process.communicate(timeout=60)[1]
        assert process.returncode == 143 and rest.strip().splitlines()[-1:] == ["error: terminated"], rest


@pytest.fixture(scope="module")
def browser():
    options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
    with sync_api.sync_playwright() as playwright, playwright.chromium.launch(**options) as running:
        yield running


def photo(path: Path, top: int, left: int, height: int = 40, width: int = 60, **more) -> Path:
    Image.fromarray(data.astronaut()[top : top + height, left : left + width]).save(path, **more)
    return path


def command_line(source: Path, folder: Path, out: Path, *options: str) -> bytes:
    command = [sys.executable, "-m", "engine.upscale", source, out, "--model", folder, "--no-progress", *options]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    return out.read_bytes()


class Window:
    """The page in one window."""

    def __init__(self, browser, url: str):
        self.page = browser.new_context(accept_downloads=True).new_page()
        self.page.set_default_timeout(WAIT)
        self.page.goto(url)

    def drop(self, *files: Path) -> None:
        self.page.set_input_files("#pictures input[type=file]", list(files))
        for file in files:
            self.page.locator("#pictures").get_by_text(file.stem, exact=False).first.wait_for()

    def start(self) -> None:
        self.page.click("#start")

    def downloads(self, count: int) -> dict[str, bytes]:
        links = self.page.locator("#downloads a[download]")
        sync_api.expect(links).to_have_count(count, timeout=WAIT)
        found = {}
        for link in links.all():
            with self.page.expect_download() as begun:
                link.click()
            found[begun.value.suggested_filename] = Path(begun.value.path()).read_bytes()
        return found


@needs_chromium
def test_a_photo_comes_back_with_the_bytes_of_the_command_line(url, browser, folder, tmp_path):
    source = photo(tmp_path / "cat.jpg", 90, 180, exif=exif_block(), quality=90)
    window = Window(browser, url)
    window.page.locator("#seed input").fill("7")
    window.drop(source)
    window.start()
    made = window.downloads(1)
    assert made == {"cat.jpg": command_line(source, folder, tmp_path / "out.jpg", "--seed", "7")}
    assert Image.open(io.BytesIO(made["cat.jpg"])).getexif()[271] == "Maker"  # metadata is kept
    images = window.page.locator("#slider img")
    sync_api.expect(images).to_have_count(2, timeout=WAIT)
    window.page.wait_for_function(
        "[...document.querySelectorAll('#slider img')].every(i => i.complete && i.naturalWidth)"
    )
    sizes = window.page.evaluate(
        "[...document.querySelectorAll('#slider img')].map(i => [i.naturalWidth, i.naturalHeight])"
    )
    assert sizes == [[240, 160], [240, 160]]
    cut = "[...document.querySelectorAll('#slider img')].map(i => i.getAttribute('style')).join()"
    before, box = window.page.evaluate(cut), window.page.locator("#slider").bounding_box()
    handle = window.page.locator("#slider .inner, #slider .outer").first.bounding_box()
    middle = box["y"] + box["height"] / 2
    window.page.mouse.move(handle["x"] + handle["width"] / 2, middle)
    window.page.mouse.down()
    window.page.mouse.move(box["x"] + 0.3 * box["width"], middle, steps=5)
    window.page.mouse.up()
    assert window.page.evaluate(cut) != before  # the line was dragged


@needs_chromium
def test_two_windows_with_three_pictures_each_get_their_own(url, browser, folder, tmp_path):
    windows, expected = [Window(browser, url) for _ in range(2)], []
    for i, window in enumerate(windows):
        (tmp_path / str(i)).mkdir()
        files = [photo(tmp_path / str(i) / f"{n}.png", 60 * n, 100 * i, 30 + n, 50) for n in range(3)]
        expected.append({f.name: command_line(f, folder, tmp_path / f"{i}-{f.name}") for f in files})
        window.drop(*files)
    for window in windows:
        window.start()
    assert [window.downloads(3) for window in windows] == expected


@needs_chromium
def test_a_bad_file_is_one_sentence_and_the_others_go_on(url, browser, folder, tmp_path):
    bad, good = tmp_path / "bad.png", photo(tmp_path / "good.png", 0, 0)
    bad.write_bytes(good.read_bytes()[:200])
    window = Window(browser, url)
    window.drop(bad, good)
    window.start()
    assert window.downloads(1) == {"good.png": command_line(good, folder, tmp_path / "out.png")}
    text = window.page.locator("#failures textarea").input_value()
    assert text.startswith("bad.png: damaged") and "\n" not in text and str(tmp_path) not in text


@needs_chromium
def test_limits_are_told(url, browser, tmp_path):
    window = Window(browser, url)
    window.start()
    window.page.get_by_text("Drop at least one picture first.").wait_for()
    window.drop(*[photo(tmp_path / f"{i}.png", 0, 0, 8, 8) for i in range(4)])
    window.start()
    window.page.get_by_text("4 pictures; at most 3 at a time.").wait_for()

    window, noise = Window(browser, url), tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)).save(noise)
    window.page.set_input_files("#pictures input[type=file]", noise)
    window.page.get_by_text("exceed the maximum allowed size").first.wait_for()

    window = Window(browser, url)
    window.drop(photo(tmp_path / "large.png", 0, 0, 120, 130))
    window.start()
    failures = window.page.locator("#failures textarea")
    sync_api.expect(failures).to_have_value(
        "large.png: 130x120 is 0.0156 megapixels; at most 0.01 are read", timeout=WAIT
    )


def test_one_picture_of_the_page(folder, tmp_path):
    """Without a browser: the file, and what the slider shows of deep, transparent and large pictures."""
    from engine.app import AS_INPUT, load, make
    from engine.settings import Settings

    up, told = load(str(folder)), []
    rgba = np.zeros((20, 30, 4), np.uint8)
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    (tmp_path / "1").mkdir()
    file, before, after = make(
        tmp_path / "clear.png", Settings(), AS_INPUT, up, tmp_path / "1", lambda *tiles: told.append(tiles)
    )
    assert Path(file).read_bytes() == command_line(tmp_path / "clear.png", folder, tmp_path / "out.png")
    shown = [np.asarray(Image.open(file)) for file in (before, after)]
    assert [picture.shape for picture in shown] == [(80, 120, 3)] * 2
    assert shown[1].min() > 250  # white shows through
    assert told[-1][0] == told[-1][1] > 0
    with pytest.raises(ValueError, match=r"clear.png: JPEG cannot hold the picture's transparency"):
        make(tmp_path / "clear.png", Settings(), "jpg", up, tmp_path / "1", lambda *tiles: None)
    with pytest.raises(ValueError, match="megapixels"):
        make(tmp_path / "clear.png", Settings(scale=64, max_pixels=1000), AS_INPUT, up, tmp_path / "1", print)
