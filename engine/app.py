"""A page in the browser for `engine.upscale`: `python -m engine.app` (Gradio)."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import time
import webbrowser
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from engine.io import cli
from engine.io.images import READABLE, SUFFIXES, ImageError, Picture, read_image
from engine.io.listen import listen
from engine.io.notices import say
from engine.io.picture import to_8_bit
from engine.io.profiles import as_srgb
from engine.runtime import color
from engine.runtime.upscaler import BUNDLED_MODELS, Upscaler
from engine.settings import Settings
from engine.worker import OF_ONE_PICTURE

if TYPE_CHECKING:
    import gradio

AS_INPUT = "as the input"
_PREVIEW = 2048  # longest side of what the slider shows; downloads have every pixel
_KEPT = 3600  # seconds for which results of a window are kept
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Limits:
    """What one drop may hold.

    Attributes:
        pictures: in one drop.
        max_pixels: of an input; a result has at most 16 times as many.
        max_mib: of a file.
    """

    pictures: int = 20
    max_pixels: int = 16_000_000
    max_mib: float = 64


@dataclass
class Results:
    """What one window has made: the folder, and by name what the slider shows."""

    folder: Path | None = None
    pairs: dict[str, tuple[str, str]] = field(default_factory=dict)

    def remove(self) -> None:
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


@functools.lru_cache(maxsize=3)
def load(model: str) -> Upscaler:
    """A model by its folder; three stay loaded."""
    return Upscaler.load(model)


def make(
    source: Path, settings: Settings, kind: str, up: Upscaler, folder: Path, progress: Any
) -> tuple[str, str, str]:
    """One picture: the file to download, and what the slider shows before and after.

    Args:
        source: the picture.
        settings: how it is made.
        kind: format of the result, or AS_INPUT.
        up: the model.
        folder: an empty folder for the three files.
        progress: called with (tiles done, tiles in all).

    Raises:
        ValueError: a bad picture or option; the message names it.
    """
    picture = read_image(source, max_pixels=settings.max_pixels, notice=lambda line: None)
    suffix = source.suffix if kind == AS_INPUT else f".{kind}"
    target = folder / f"{source.stem}{suffix if suffix.lower() in SUFFIXES else '.png'}"
    up.check_tiling(settings.tile)
    height, width = picture.pixels.shape[:2]
    factor = settings.factor(height, width)
    if height * width * factor**2 > 16 * settings.max_pixels:
        raise ValueError(
            f"the result would have {height * width * factor**2 / 1e6:.0f} megapixels; choose a smaller scale"
        )
    try:
        settings.make(up, picture, target, progress, notice=lambda line: None)
        result = read_image(target, max_pixels=settings.limit, notice=lambda line: None)
    except ImageError as error:
        raise ImageError(str(error).replace(str(target), source.name)) from None
    shown = (folder / "before.jpg", folder / "after.jpg")
    largest = max(result.pixels.shape[:2])
    size = tuple(max(side * min(_PREVIEW, largest) // largest, 1) for side in result.pixels.shape[1::-1])
    for path, shape in zip(shown, (picture, result)):
        _preview(shape).resize(size, Image.Resampling.BICUBIC).save(path, quality=95, subsampling=0)
    return str(target), str(shown[0]), str(shown[1])


def _preview(picture: Picture) -> Image.Image:
    """What a browser can show: sRGB of 8 bit, transparency on white."""
    picture = as_srgb(picture)
    image = Image.fromarray(to_8_bit(picture.pixels))
    if picture.alpha is None:
        return image
    return Image.composite(image, Image.new("RGB", image.size, "white"), Image.fromarray(to_8_bit(picture.alpha)))


def page(models: list[str], limits: Limits, root: Path, *, at_once: int = 2, any_model: bool = True) -> gradio.Blocks:
    """The page.

    Args:
        models: engine folders on offer; the first is chosen.
        limits: what one drop may hold.
        root: where results lie while their window is open.
        at_once: drops that are worked on at a time; others wait.
        any_model: let people name other folders of this machine.
    """
    import gradio as gr

    def run(
        files: list[str] | None, model: str, kind: str, scale: float, seed: float, tile: float, colour: str,
        strip: bool, before: Results, progress=gr.Progress(),  # noqa: B008
    ) -> Iterator[tuple]:  # fmt: skip
        before.remove()
        if not files:
            raise gr.Error("Drop at least one picture first.", print_exception=False)
        if len(files) > limits.pictures:
            raise gr.Error(f"{len(files)} pictures; at most {limits.pictures} at a time.", print_exception=False)
        try:
            settings = Settings.of(seed=int(seed or 0), scale=scale, tile=int(tile or 0), color=colour,
                                   strip_metadata=strip, max_pixels=limits.max_pixels)  # fmt: skip
            up = load(model)
            up.check_tiling(settings.tile)
        except OF_ONE_PICTURE as error:
            raise gr.Error(_sentence(error), print_exception=False) from None
        results = Results(Path(tempfile.mkdtemp(dir=root)))
        assert results.folder is not None
        made: list[str] = []
        failed: list[str] = []
        for i, source in enumerate(map(Path, files)):
            name, told = f"{i + 1}. {source.name}", 0.0

            def tiles(done: int, total: int, name: str = name) -> None:
                nonlocal told
                if done == total or time.monotonic() > told + 0.1:
                    told = time.monotonic()
                    progress((done, total), desc=f"{name} of {len(files)}", unit="tiles")

            progress((0, None), desc=f"{name} of {len(files)}", unit="tiles")
            folder = results.folder / str(i)
            folder.mkdir()
            try:
                file, *pair = make(source, settings, kind, up, folder, tiles)
                made.append(file)
                results.pairs[name] = (pair[0], pair[1])
            except OF_ONE_PICTURE as error:
                failed.append(_sentence(error, source))
            shown = name if name in results.pairs else next(iter(results.pairs), None)
            yield (
                results.pairs.get(shown or ""),
                gr.Dropdown(list(results.pairs), value=shown, visible=len(results.pairs) > 1),
                made,
                gr.Textbox("\n".join(failed), visible=bool(failed)),
                results,
            )

    def show(name: str | None, results: Results) -> tuple[str, str] | None:
        return results.pairs.get(name or "")

    with gr.Blocks(
        title="GDPO-SR", analytics_enabled=False, delete_cache=(_KEPT, 24 * _KEPT), fill_width=True
    ) as blocks:
        gr.Markdown("# GDPO-SR\nDrop photos, press Upscale, and drag the line to compare. They stay on this machine.")
        results = gr.State(Results(), time_to_live=_KEPT, delete_callback=Results.remove)
        with gr.Row():
            with gr.Column(scale=1, min_width=340):
                files = gr.File(
                    label=f"Pictures (up to {limits.pictures}, {limits.max_pixels / 1e6:g} megapixels each)",
                    file_count="multiple", file_types=sorted(READABLE), height=180, elem_id="pictures",
                )  # fmt: skip
                with gr.Row():
                    start = gr.Button("Upscale", variant="primary", min_width=90, elem_id="start")
                    stop = gr.Button("Stop", min_width=90, elem_id="stop")
                with gr.Row():
                    scale = gr.Number(4, label="Scale", minimum=0.05, maximum=64, min_width=90, elem_id="scale")
                    seed = gr.Number(0, label="Seed", minimum=0, precision=0, min_width=90, elem_id="seed")
                with gr.Row():
                    kind = gr.Dropdown([AS_INPUT, *(s[1:] for s in SUFFIXES)], label="Format", min_width=90)
                    colour = gr.Dropdown(list(color.METHODS), value=color.DEFAULT, label="Colours", min_width=90)
                with gr.Accordion("More", open=False):
                    tile = gr.Number(0, label="Tile, in input pixels (0: the model's choice)", minimum=0, precision=0)
                    model = gr.Dropdown(models, label="Model folder", allow_custom_value=any_model)
                    strip = gr.Checkbox(False, label="Leave out EXIF, XMP and text")
            with gr.Column(scale=3):
                slider = gr.ImageSlider(
                    label="Before | after", type="filepath", buttons=["fullscreen"], interactive=False,
                    max_height=600, elem_id="slider",
                )  # fmt: skip
                chosen = gr.Dropdown([], label="Shown", visible=False, elem_id="shown")
                failures = gr.Textbox(label="Not made", visible=False, elem_id="failures")
                downloads = gr.File(label="Download", file_count="multiple", interactive=False, elem_id="downloads")
        work = start.click(
            run,
            [files, model, kind, scale, seed, tile, colour, strip, results],
            [slider, chosen, downloads, failures, results],
            concurrency_limit=at_once,
            show_progress_on=slider,
            api_visibility="private",
        )
        stop.click(None, cancels=work, api_visibility="private")
        chosen.input(show, [chosen, results], slider, api_visibility="private")
    return blocks


def _sentence(error: Exception, source: Path | None = None) -> str:
    """What was wrong, in one line that names the picture and no folder of this machine."""
    text = "not enough memory" if isinstance(error, MemoryError) else " ".join(str(error).split())
    text = text or type(error).__name__
    if source is None:
        return text
    text = text.replace(str(source), source.name)
    return text if text.startswith(source.name) else f"{source.name}: {text}"


def parser() -> cli.Parser:
    p = cli.Parser(prog="python -m engine.app", description="Open a page that upscales pictures in the browser.")
    p.add_argument("-n", "--model", nargs="+", default=[], help="engine folders on offer (default: the bundled models)")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on; at any but the default, "
                   "whoever reaches this machine can use the page")  # fmt: skip
    p.add_argument("--port", type=int, default=7860, help="port to listen on; 0: any that is free")
    p.add_argument("--pictures", type=int, default=20, help="number of pictures in one drop")
    p.add_argument("--max-pixels", type=int, default=16_000_000, help="size limit of a picture")
    p.add_argument("--max-mib", type=float, default=64, help="size limit of a file, in MiB")
    p.add_argument("--at-once", type=int, default=2, help="number of drops that are worked on at a time")
    p.add_argument("--queue", type=int, default=32, help="number of drops that may wait")
    p.add_argument("--browser", action="store_true", help="open the page in a browser")
    return p


def main() -> int:
    options = parser().parse_args()
    for name in ("pictures", "max_pixels", "max_mib", "at_once", "queue"):
        if not getattr(options, name) > 0:
            raise ValueError(f"{name.replace('_', '-')} must be more than 0; got {getattr(options, name)}")
    models = options.model or list(BUNDLED_MODELS)
    load(models[0])  # a folder that cannot be used says so now
    with tempfile.TemporaryDirectory(prefix="gdpo-app-", ignore_cleanup_errors=True) as folder:
        os.environ |= {"GRADIO_TEMP_DIR": str(Path(folder) / "cache"), "GRADIO_ANALYTICS_ENABLED": "False"}
        try:
            import gradio as gr
            import uvicorn
            from fastapi import FastAPI
        except ImportError as error:
            raise RuntimeError(f"{error.name} is not installed; pip install 'gdpo-sr[app]'") from None
        limits = Limits(options.pictures, options.max_pixels, options.max_mib)
        blocks = page(models, limits, Path(folder), at_once=options.at_once, any_model=options.host in _LOOPBACK)
        blocks.queue(max_size=options.queue)
        with listen(options.host, options.port) as listener:
            port = listener.getsockname()[1]
            site = gr.mount_gradio_app(
                FastAPI(openapi_url=None), blocks, "/", server_name=options.host, server_port=port, footer_links=[],
                max_file_size=int(options.max_mib * 2**20), ssr_mode=False, enable_monitoring=False, run_history=False,
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            )  # fmt: skip
            url = f"http://{options.host}:{port}"
            say(f"listening on {url} (Ctrl-C ends it)")
            if options.browser:
                webbrowser.open(url)
            config = uvicorn.Config(site, log_level="error", access_log=False, timeout_graceful_shutdown=1)
            uvicorn.Server(config).run(sockets=[listener])
    return 0


def console() -> None:
    cli.run(main)


if __name__ == "__main__":
    console()
