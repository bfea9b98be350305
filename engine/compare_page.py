"""One self-contained HTML page with a before/after slider for every picture."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from engine.io.sink import Sink, atomic_file

_LARGEST_SIDE = 16_384  # of a picture on the page: browsers show no more, a JPEG holds no more than 65,500

_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Before and after</title>
<meta name="viewport" content="width=device-width"><style>
body{font:15px system-ui,sans-serif;margin:2rem;background:#181818;color:#ddd}
figure{margin:0 0 3rem}figcaption{margin-bottom:.5rem}
.pair{position:relative;display:inline-block;max-width:100%;line-height:0}
.pair img{max-width:100%;display:block}
.pair img+img{position:absolute;inset:0;width:100%;height:100%;clip-path:inset(0 calc(100% - var(--cut,50%)) 0 0)}
.pair input{position:absolute;inset:0;width:100%;height:100%;margin:0;opacity:0;cursor:ew-resize}
.pair::after{content:"";position:absolute;top:0;bottom:0;left:var(--cut,50%);width:2px;background:#fff;pointer-events:none}
</style><h1>Before and after</h1><p>Left of the line: the input, enlarged. Right of it: the result. Drag.</p>
"""
_PAIR = """<figure><figcaption>{name}</figcaption><div class="pair"><img alt="after" src="{after}">
<img alt="before" src="{before}"><input type="range" min="0" max="100" step="0.1" value="50" aria-label="{name}"
oninput="this.parentNode.style.setProperty('--cut',this.value+'%')"></div></figure>
"""


class ComparePage:
    """A page being written, picture by picture, so that a long folder takes no memory."""

    def __init__(self, file: Sink):
        self._file = file
        self._write(_HEAD)

    def add(self, name: str, before: np.ndarray, after: np.ndarray, icc: bytes | None = None) -> None:
        """before, after: [H,W,3] uint8 or uint16, of any two sizes, in the colours of the profile `icc`."""
        icc = icc if icc and icc[16:20] == b"RGB " else None  # a gray profile does not fit three channels
        urls = {"before": _data_url(before, icc), "after": _data_url(after, icc)}
        self._write(_PAIR.format(name=html.escape(name, quote=True), **urls))

    def end(self) -> None:
        self._write("</html>\n")

    def _write(self, text: str) -> None:
        self._file.write(text.encode("utf-8", "backslashreplace"))


@contextmanager
def compare_page(path: str | Path) -> Iterator[ComparePage]:
    """Write a page, whole or not at all."""
    with atomic_file(path) as file:
        page = ComparePage(file)
        yield page
        page.end()


def _data_url(pixels: np.ndarray, icc: bytes | None) -> str:
    eight = pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)
    image = Image.fromarray(eight)
    image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0, icc_profile=icc)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
