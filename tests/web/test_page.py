"""The browser page against the command line: the same picture within one level, and nothing sent anywhere."""

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine import Upscaler

ROOT = Path(__file__).parents[2]
WEB = ROOT / "web"
SEED = 12345678901234567890  # both words of the key
PATIENCE = 90_000  # milliseconds


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """Two tiles wide, one high."""
    from skimage import data

    return data.chelsea()[60:104, 100:250].copy()


@pytest.fixture(scope="module")
def node() -> str:
    if not (WEB / "node_modules").is_dir():
        pytest.skip("needs web/node_modules (make web)")
    return shutil.which("node") or pytest.skip("needs Node")


def command_line(photo: Path, out: Path, *options: str) -> np.ndarray:
    command = [sys.executable, "-m", "engine.upscale", str(photo), str(out), "--no-progress", *options]
    subprocess.run(command, cwd=ROOT, check=True)
    return np.asarray(Image.open(out))


def assert_within_a_level(ours: np.ndarray, expected: np.ndarray) -> None:
    assert ours.shape == expected.shape
    difference = np.abs(ours.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("kind", ["photo", "gray", "small", "chart"])
def test_the_flow_in_node(node, tmp_path, photo, kind):
    chart = photo.copy()
    chart[:, :75] = (200, 90, 40)
    chart[:, 75:] = np.indices((44, 75)).sum(0)[..., None] % 2 * 255
    rgb = {"photo": photo, "gray": photo[..., :1].repeat(3, 2), "small": photo[:9, :5], "chart": chart}[kind]
    alpha = np.full((*rgb.shape[:2], 1), 255, np.uint8)
    np.concatenate([rgb, alpha], 2).tofile(tmp_path / "in.rgba")
    height, width = rgb.shape[:2]
    script = ROOT / "tests" / "web" / "upscale.mjs"
    values = [width, height, SEED, tmp_path / "in.rgba", tmp_path / "out.png"]
    subprocess.run([node, str(script), *map(str, values)], check=True, env=os.environ | {"NODE_NO_WARNINGS": "1"})
    out = np.asarray(Image.open(tmp_path / "out.png"))
    assert_within_a_level(out, Upscaler.load().upscale(np.ascontiguousarray(rgb), seed=SEED))
    assert kind != "gray" or (out == out[..., :1]).all()


@pytest.fixture(scope="module")
def built(node) -> Path:
    """web/dist, made where it is older than what it is made of."""
    index = WEB / "dist" / "index.html"
    sources = [*WEB.glob("src/**/*.*"), WEB / "index.html", WEB / "vite.config.js", WEB / "package-lock.json"]
    sources += [ROOT / "engine" / "data" / "tiny" / "generator.onnx"]
    if not index.is_file() or index.stat().st_mtime < max(file.stat().st_mtime for file in sources):
        subprocess.run(["npm", "run", "build"], cwd=WEB, check=True, stdout=subprocess.DEVNULL)
    return index.parent


class Handler(http.server.SimpleHTTPRequestHandler):
    def guess_type(self, path):
        return "text/javascript" if str(path).endswith(".js") else super().guess_type(path)  # whatever the system says

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address(built):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=built)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def chromium():
    """launch(*switches): a headless Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install -e '.[web]')")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs Chromium (apt install chromium)")
    with api.sync_playwright() as p:
        yield lambda *switches: p.chromium.launch(executable_path=found, args=["--no-sandbox", *switches])


@pytest.fixture(scope="module")
def browser(chromium):
    browser = chromium()
    yield browser
    browser.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page()
    page.errors, page.requested = [], []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("request", lambda request: page.requested.append((request.method, request.url)))
    page.goto(address)
    yield page
    page.close()


def upscale(page, photo: Path, out: Path) -> np.ndarray:
    page.set_input_files("#file", photo)
    page.wait_for_selector("body[data-state=done], body[data-state=failed]", timeout=PATIENCE)
    assert page.get_attribute("body", "data-state") == "done", page.inner_text("#error")
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == f"{photo.stem}-x4.png"
    download.value.save_as(out)
    return np.asarray(Image.open(out))


def test_upload_slider_download(page, address, tmp_path, photo):
    file = tmp_path / "chelsea.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: both must set it upright
    Image.fromarray(photo).save(file, quality=95, subsampling=0, exif=exif)
    page.fill("#seed", str(SEED))
    out = upscale(page, file, tmp_path / "page.png")
    assert out.shape == (4 * photo.shape[1], 4 * photo.shape[0], 3)
    assert_within_a_level(out, command_line(file, tmp_path / "command.png", "--seed", str(SEED)))

    assert page.get_attribute("body", "data-device") == "wasm"  # no GPU in a headless Chromium
    assert page.text_content("#device") == "on the CPU: this browser offers no WebGPU"
    slider = page.locator("img-comparison-slider")
    page.evaluate("scrollTo(0, 0)")
    box = slider.bounding_box()
    assert page.viewport_size["height"] > box["height"] > box["width"] > 50  # upright, and wholly visible
    assert slider.evaluate("s => s.value") == 50
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 50, steps=4)
    page.mouse.up()
    assert abs(slider.evaluate("s => s.value") - 25) < 2

    assert not page.errors and not page.is_visible("#unloaded")
    outside = [r for r in page.requested if r[0] != "GET" or not r[1].startswith((address, f"blob:{address}", "data:"))]
    assert page.requested and not outside


def test_the_same_worker_takes_another_photo(page, tmp_path, photo):
    for seed in (0, 1):
        file = tmp_path / f"{seed}.png"
        Image.fromarray(photo[:30, :40]).save(file)
        page.fill("#seed", str(seed))
        out = upscale(page, file, tmp_path / f"page{seed}.png")
        assert_within_a_level(out, command_line(file, tmp_path / f"command{seed}.png", "--seed", str(seed)))


def test_transparency_becomes_white(page, tmp_path, photo):
    file = tmp_path / "cut.png"
    alpha = np.full(photo[:30, :40].shape[:2], 255, np.uint8)
    alpha[:, :20] = 0
    Image.fromarray(np.dstack([photo[:30, :40], alpha])).save(file)
    out = upscale(page, file, tmp_path / "page.png")
    flat = photo[:30, :40] * (alpha[..., None] > 0) + (255 - alpha[..., None])
    assert_within_a_level(out, Upscaler.load().upscale(flat))


@pytest.mark.slow  # minutes, in software
def test_webgpu(chromium, address, tmp_path, photo):
    """On SwiftShader, Chromium's GPU in software."""
    browser = chromium("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")
    try:
        page = browser.new_page()
        page.goto(address)
        if not page.evaluate("navigator.gpu?.requestAdapter().then(Boolean)"):
            pytest.skip("this Chromium has no WebGPU in software")
        file = tmp_path / "photo.png"
        Image.fromarray(photo[:24, :24]).save(file)
        out = upscale(page, file, tmp_path / "page.png")
        assert page.get_attribute("body", "data-device") == "webgpu"
        assert_within_a_level(out, command_line(file, tmp_path / "command.png"))
    finally:
        browser.close()


def test_opened_as_a_file_it_says_what_it_needs(browser, built):
    page = browser.new_page()
    page.goto((built / "index.html").as_uri())
    page.wait_for_selector("#unloaded", timeout=PATIENCE)
    assert "a web server" in page.inner_text("#unloaded")
    page.close()


def test_what_it_does_not_take_is_one_sentence(page, tmp_path):
    large = tmp_path / "large.png"
    Image.new("L", (10_000, 10_000), 128).save(large)
    notes = tmp_path / "notes.txt"
    notes.write_text("no picture")
    small = tmp_path / "small.png"
    Image.new("RGB", (8, 8)).save(small)
    for file, seed, expected in [
        (large, "0", r"large\.png has 100 megapixels \(10000 × 10000\), and this page takes up to 16; use .*"),
        (notes, "0", r"notes\.txt is no picture that this browser reads; choose a JPEG.*"),
        (small, "-1", r'The seed must be a whole number from 0 to 18446744073709551615; it is "-1"\.'),
        (small, str(1 << 64), r"The seed must be a whole number .*"),
    ]:
        page.fill("#seed", seed)
        page.set_input_files("#file", file)
        page.wait_for_selector("body[data-state=failed]", timeout=PATIENCE)
        assert re.fullmatch(expected, page.inner_text("#error"))
        page.evaluate("document.body.dataset.state = 'start'")
    assert not page.errors
