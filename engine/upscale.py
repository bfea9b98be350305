"""Upscale pictures: `python -m engine.upscale IN... OUT`.

Options that decide how a picture is made are fields of `engine.settings.Settings` as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from engine.io import cli
from engine.io.files import clean_leftovers
from engine.io.formats import KINDS, kind_of
from engine.io.images import MAX_BYTES, MAX_PIXELS, SUFFIXES
from engine.jobs import plan
from engine.runtime import color
from engine.runtime.backends.registry import BACKENDS
from engine.runtime.upscaler import Upscaler, model_folder
from engine.settings import Settings
from engine.worker import Worker, model_identity

STREAM = "-"  # as input: standard input; as output: standard output


def parser() -> cli.Parser:
    p = cli.Parser(
        prog="python -m engine.upscale",
        description="Upscale pictures x4. An output already made from the same input with the same options is skipped; "
        "one made from another input or with other options is made again.",
        epilog="Exit codes: 0 done, 1 some pictures failed, 2 bad usage, 130 interrupted, 143 terminated.",
    )
    p.add_argument(
        "paths",
        nargs="*",
        metavar="IN... OUT",
        help="inputs (files, globs, folders or -), then the output (a file, a folder or -)",
    )
    p.add_argument("-i", "--input", nargs="+", default=[], help="inputs, instead of positional arguments; -: stdin")
    p.add_argument("-o", "--output", help="output, instead of the last positional argument; -: stdout")
    p.add_argument("-n", "--model", help="engine folder, or a bundled model: tiny, quality (slower, sharper) or "
                   "faithful (for clean photos); backend torch: a generator's folder (default: tiny)")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="random seed of the noise; the same seed gives the same picture")
    size = p.add_argument_group("size of the result (the aspect ratio is always kept)")
    size.add_argument("-s", "--scale", type=float, help="factor (default: 4); any other factor resizes the x4 result")
    size.add_argument("--width", type=int, metavar="PIXELS", help="largest width, instead of a factor")
    size.add_argument("--height", type=int, metavar="PIXELS", help="largest height, instead of a factor")
    size.add_argument("--longest", type=int, metavar="PIXELS", help="length of the longer side, instead of a factor")
    size.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="size limit of inputs (default: %(default)s)")
    work = p.add_argument_group("processing")
    work.add_argument(
        "-t", "--tile", type=int, default=0, help="longest tile side in input pixels; 0: the model's choice"
    )
    work.add_argument("--batch", type=int, help="number of tiles that go through the model at once")
    work.add_argument(
        "--color", default=color.DEFAULT, choices=color.METHODS, help="method that matches the colours to the input's"
    )
    work.add_argument("--background", metavar="COLOUR", help="colour to put under transparent pixels, such as "
                      "white or #ff8800; the result is opaque")  # fmt: skip
    work.add_argument("--wrap", action="store_true", help="join opposite edges on both axes (tileable textures)")
    work.add_argument("--wrap-x", action="store_true", help="join the left and right edges (360-degree panoramas)")
    files = p.add_argument_group("files")
    files.add_argument("-f", "--format", type=kind_of, choices=KINDS, help="format of outputs (default: the input's)")
    files.add_argument("--suffix", default="", help="text appended to output names, such as _x4")
    files.add_argument(
        "--quality", type=int, default=95, help="quality of lossy formats, 1 to 100 (default: %(default)s)"
    )
    files.add_argument(
        "--lossless", action="store_true", help="write lossless WebP and JPEG XL (PNG and TIFF always are)"
    )
    files.add_argument("--recursive", action="store_true", help="include sub-folders; the output mirrors their tree")
    files.add_argument("--overwrite", action="store_true", help="redo finished outputs, and replace unknown files")
    files.add_argument("--on-clash", choices=("error", "rename"), default="error", help="if an output would "
                       "replace an input, another output or an unknown file: fail, or number its name")  # fmt: skip
    files.add_argument(
        "--strip-metadata", action="store_true", help="leave out EXIF, XMP and text; keep the colour profile"
    )
    files.add_argument("--compare", metavar="PAGE.html", help="write a page with a before/after slider")
    machine = p.add_argument_group("machine")
    machine.add_argument(
        "--backend",
        default="auto",
        metavar="NAME",
        help=f"auto, {', '.join(BACKENDS)} (auto: what the model is for)",
    )
    machine.add_argument("--device", help="cpu, cuda or cuda:N")
    machine.add_argument("--precision", default="auto", choices=("auto", "fp32", "fp16", "bf16"),
                         help="number format of the computation")  # fmt: skip
    machine.add_argument(
        "--compile", action="store_true", help="compile the model (backend torch only); the first tile is slow"
    )
    machine.add_argument("--threads", type=int, default=0, help="number of CPU threads; 0: all")
    machine.add_argument("--url", metavar="HOST:PORT", help="gRPC port of a Triton Inference Server (backend triton "
                         "only); --model is the model's name there")  # fmt: skip
    machine.add_argument(
        "--timeout", type=float, default=60, help="seconds to wait for the server's answer to a batch of tiles"
    )
    machine.add_argument("--trust-plan", action="store_true", help="load a TensorRT plan that was built elsewhere "
                         "(it is executable code)")  # fmt: skip
    report = p.add_argument_group("reports")
    report.add_argument(
        "--no-progress", action="store_true", help="show no progress bar or lines; with --json, no progress events"
    )
    report.add_argument(
        "--json", action="store_true", help="print progress and results on stdout, one JSON object per line"
    )
    return p


def main() -> int:
    options = parser().parse_args()
    inputs, output = list(options.input) + list(options.paths), options.output
    if output is None:
        if len(inputs) < 2 or not options.paths:
            raise ValueError("name at least one input and an output: python -m engine.upscale IN... OUT")
        output = inputs.pop()
    if not inputs:
        raise ValueError("name at least one input: python -m engine.upscale IN... OUT")
    if options.threads < 0:
        raise ValueError(f"threads must be 0 (all) or more; got {options.threads}")
    settings = _settings(options)
    _check_page(options.compare)
    with _streams(inputs, output, options) as (inputs, target, labels):
        jobs = plan(
            inputs,
            target,
            suffix=options.suffix,
            extension=options.format,
            recursive=options.recursive,
            on_clash=options.on_clash,
        )
        if not any(job.source.exists() for job in jobs):
            raise ValueError(
                f"{jobs[0].source}: no such file" if jobs else "nothing to do: every match is an earlier output"
            )
        jobs = [replace(job, label=labels.get(job.source, "")) for job in jobs]
        pages = [Path(options.compare)] if options.compare else []
        for folder in dict.fromkeys(path.parent for path in [job.target for job in jobs] + pages):
            _writable(folder)
            clean_leftovers(folder)
        up = _load(options)
        up.check_tiling(options.tile, options.batch)
        worker = Worker(
            up,
            settings,
            _identity(options, up),
            overwrite=options.overwrite,
            rename=options.on_clash == "rename",
            events=options.json,
            quiet=options.no_progress,
            page=options.compare,
        )
        code = worker.run(jobs)
        if output == STREAM and code == 0:
            _write_stdout(jobs[0].target)
        return code


def _settings(options: Any) -> Settings:
    names = ("seed", "scale", "width", "height", "longest", "tile", "batch", "color", "background", "quality")
    wrap: Literal["none", "both", "horizontal"] = "both" if options.wrap else "horizontal" if options.wrap_x else "none"
    return Settings.of(
        **{name: getattr(options, name) for name in names},
        wrap=wrap,
        lossless=options.lossless,
        strip_metadata=options.strip_metadata,
        max_pixels=options.max_pixels,
    )


def _check_page(text: str | None) -> None:
    if text is None:
        return
    page = Path(text)
    if page.is_dir():
        raise ValueError(f"--compare {page}: this is a folder; name the page, such as {page / 'page.html'}")
    if page.suffix.lower() not in (".html", ".htm"):  # so that it is never a picture, nor an input
        raise ValueError(f"--compare {page}: a page's name ends in .html, such as {page.with_suffix('.html')}")


@contextlib.contextmanager
def _streams(inputs: list[str], output: str, options: Any) -> Iterator[tuple[list[str], str, dict[Path, str]]]:
    """Inputs and output with files in a temporary folder in place of standard streams, and how messages call those."""
    if STREAM not in (*inputs, output):
        yield inputs, output, {}
        return
    with tempfile.TemporaryDirectory(prefix="gdpo-upscale-") as folder:
        labels = {}
        if STREAM in inputs:
            file = Path(folder) / "stdin"
            _read_stdin(file)
            inputs = [str(file) if text == STREAM else text for text in inputs]
            labels[file] = "standard input"
        if output == STREAM:
            _check_stdout(inputs, options)
            suffix = Path(inputs[0]).suffix.lower()
            kind = options.format or (suffix[1:] if suffix in SUFFIXES else "png")
            output = str(Path(folder) / f"stdout.{kind}")
        yield inputs, output, labels


def _read_stdin(file: Path) -> None:
    if sys.stdin.isatty():
        raise ValueError("input -: standard input is a terminal; send a picture to it (< photo.jpg)")
    with open(file, "wb") as f:
        while chunk := sys.stdin.buffer.read(1 << 20):
            if f.tell() > MAX_BYTES:
                raise ValueError(f"input -: more than {MAX_BYTES >> 20} MiB; files of at most that are read")
            f.write(chunk)


def _write_stdout(file: Path) -> None:
    try:
        with open(file, "rb") as picture:
            shutil.copyfileobj(picture, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None


def _check_stdout(inputs: list[str], options: Any) -> None:
    if len(inputs) != 1 or Path(inputs[0]).is_dir():
        raise ValueError("output -: standard output takes one picture; give one input file")
    if options.json:
        raise ValueError("output - and --json would both write to standard output; leave one out")
    if sys.stdout.isatty():
        raise ValueError("output -: standard output is a terminal; send it to a file or a program (> photo.png)")
    if sys.stdout.name == os.devnull:  # engine.io.early opened it in place of a closed one
        raise ValueError("output -: standard output is closed")


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{folder}: this is, or lies below, a file; name another folder for the output") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{folder}: this folder cannot be written")


def _load(options: Any) -> Upscaler:
    return Upscaler.load(
        options.model,
        options.backend,
        options.device,
        threads=options.threads,
        trust_plan=options.trust_plan,
        precision=options.precision,
        compiled=options.compile,
        url=options.url,
        timeout=options.timeout,
    )


def _identity(options: Any, up: Upscaler) -> str:
    if options.url:
        return hashlib.sha256(up.manifest.content()).hexdigest()
    return model_identity(model_folder(options.model))


def console() -> None:
    cli.run(main)


if __name__ == "__main__":
    console()
