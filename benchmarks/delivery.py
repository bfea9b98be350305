"""What users outside Python download and wait for: sizes, and seconds of a 128x128 picture in the browser and in Node.

    make wheel web
    GDPO_LIBRARY=.../libgdpo.so python -m benchmarks.delivery      # the library (docs/cpp.md) is for Node

Rows of benchmarks/results/delivery.jsonl. What is not built, or lacks Chromium or Node, is named and left out.
"""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.io import rows
from engine.io.cli import Parser, run
from engine.runtime.core import library
from engine.runtime.upscaler import BUNDLED

WEB = rows.ROOT / "web" / "dist"
NODE = rows.ROOT / "examples" / "programs" / "upscale.mjs"
SIDE = 128
ROUNDS = 5
Figures = dict[str, Any]


class Missing(Exception):
    """What a figure needs is not here."""


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def wheel() -> list[Figures]:
    found = sorted((rows.ROOT / "dist").glob("*.whl"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise Missing("no wheel in dist/ (make wheel)")
    return [{"measured": "wheel", "file": found[-1].name, "bytes": found[-1].stat().st_size}]


def models() -> list[Figures]:
    folders = sorted(file.parent for file in BUNDLED.glob("*/manifest.json"))
    return [{"measured": "model", "file": folder.name, "bytes": folder_bytes(folder)} for folder in folders]


def photo() -> np.ndarray:
    """Noise, which costs a network what any picture does."""
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)


def browser() -> list[Figures]:
    """The page in headless Chromium, on one thread of the CPU, as a server without headers gives it."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not (WEB / "index.html").is_file() or chromium is None:
        raise Missing("needs web/dist (make web) and Chromium")
    from playwright.sync_api import sync_playwright

    handler = functools.partial(_Quiet, directory=WEB)
    with (
        tempfile.TemporaryDirectory() as folder,
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        sync_playwright() as api,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        file = Path(folder) / "photo.png"
        Image.fromarray(photo()).save(file)
        chrome = api.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = chrome.new_page()
        fetched: list[int] = []
        page.on("requestfinished", lambda request: fetched.append(request.sizes()["responseBodySize"]))
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        seconds = []
        for _ in range(1 + ROUNDS):  # the first loads the model
            started = time.perf_counter()
            page.evaluate("document.body.dataset.state = 'start'")
            page.set_input_files("#file", file)
            page.wait_for_selector("body[data-state=done], body[data-state=failed]", timeout=300_000)
            if page.get_attribute("body", "data-state") == "failed":
                raise RuntimeError(page.inner_text("#error"))
            seconds.append(time.perf_counter() - started)
        device = page.get_attribute("body", "data-device")
        chrome.close()
        server.shutdown()
    took = {"first_s": round(seconds[0], 2), "picture_s": round(statistics.median(seconds[1:]), 3)}
    return [
        {"measured": "web page", "file": "web/dist", "bytes": folder_bytes(WEB), "fetched_bytes": sum(fetched)},
        {"measured": "browser", "device": device, "side": SIDE, **took},
    ]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def guess_type(self, path: Any) -> str:
        return "text/javascript" if str(path).endswith(".js") else super().guess_type(path)

    def log_message(self, *_: Any) -> None:
        pass


def node() -> list[Figures]:
    """The whole program, from its start to the written file."""
    program, lib, runtime = shutil.which("node"), os.environ.get("GDPO_LIBRARY"), library()
    if not program or not lib or runtime is None or not (NODE.parent / "node_modules").is_dir():
        raise Missing("needs Node, examples/programs/node_modules (make web), GDPO_LIBRARY and ONNX Runtime's library")
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in.ppm", Path(folder) / "out.ppm"
        Image.fromarray(photo()).save(source)
        seconds = []
        for _ in range(1 + ROUNDS):
            started = time.perf_counter()
            command = [program, NODE, BUNDLED / "tiny", source, out]
            subprocess.run(command, check=True, env=os.environ | {"GDPO_ONNXRUNTIME": str(runtime)})
            seconds.append(time.perf_counter() - started)
    return [{"measured": "node", "side": SIDE, "program_s": round(statistics.median(seconds[1:]), 3)}]


def main() -> int:
    Parser(prog="python -m benchmarks.delivery", description=__doc__).parse_args()
    rows.require_clean()
    for measure in (wheel, models, browser, node):
        try:
            for figures in measure():
                rows.append_row("delivery", **figures)
                print(" ".join(f"{k} {v}" for k, v in figures.items()))
        except Missing as reason:
            print(f"{measure.__name__}: left out: {reason}")
    return 0


if __name__ == "__main__":
    run(main)
