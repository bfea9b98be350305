"""Upscale pictures: `python -m engine.upscale IN... OUT`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.compare_page import ComparePage, compare_page
from engine.io import cli
from engine.io.images import MAX_PIXELS, SUFFIXES, Picture, check_writable, picture_size, read_image, write_image
from engine.jobs import Job, plan
from engine.runtime.color import METHODS
from engine.runtime.resample import resize
from engine.runtime.upscaler import MAX_OUTPUT_PIXELS, Upscaler, output_size

_FAILURES = (ValueError, OSError, RuntimeError, FloatingPointError, MemoryError)  # of one picture; the others go on


def parser() -> cli.Parser:
    p = cli.Parser(
        prog="python -m engine.upscale",
        description="Upscale pictures x4 (PNG, JPEG, WebP, TIFF; 8 and 16 bit).",
        epilog="Exit codes: 0 done, 1 some pictures failed, 2 bad usage, 130 interrupted, 143 terminated.",
    )
    p.add_argument("paths", nargs="*", metavar="IN... OUT", help="files, globs or folders, then a file or a folder")
    p.add_argument("-i", "--input", nargs="+", default=[], help="the inputs, instead of positions")
    p.add_argument("-o", "--output", help="the output, instead of the last position")
    p.add_argument("-n", "--model", help="an engine folder (default: the shipped tiny model)")
    p.add_argument("--seed", type=int, default=0, help="of the noise; the same seed gives the same picture")
    p.add_argument("-s", "--scale", type=float, default=4.0, help="of the result; other factors than 4 resize the x4")
    p.add_argument("-t", "--tile", type=int, default=0, help="longest tile side in input pixels; 0: the model's choice")
    p.add_argument("--batch", type=int, help="tiles at once")
    p.add_argument("--color", default="adain", choices=METHODS, help="align the colours to the input's")
    p.add_argument("-f", "--format", choices=[s[1:] for s in SUFFIXES], help="of the outputs (default: the input's)")
    p.add_argument("--suffix", default="", help="appended to the names of the outputs, such as _x4")
    p.add_argument("--quality", type=int, default=95, help="of JPEG and WebP")
    p.add_argument("--recursive", action="store_true", help="descend into folders and mirror their trees")
    p.add_argument("--overwrite", action="store_true", help="do finished files again")
    p.add_argument("--strip-metadata", action="store_true", help="drop EXIF, XMP and text (the colour profile stays)")
    p.add_argument("--compare", metavar="PAGE.html", help="write a page with a before/after slider")
    p.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="refuse larger inputs")
    p.add_argument("--backend", default="auto", help="auto, onnxruntime, openvino, tensorrt, tensorrt-rtx or torch")
    p.add_argument("--device", help="cpu, cuda or cuda:N")
    p.add_argument("--precision", default="auto", choices=("auto", "fp32", "fp16", "bf16"))
    p.add_argument("--compile", action="store_true", help="of --backend torch: the first tile waits for the compiler")
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all")
    p.add_argument(
        "--trust-plan", action="store_true", help="load a TensorRT plan built elsewhere (it is executable code)"
    )
    p.add_argument("--no-progress", action="store_true")
    p.add_argument("--json", action="store_true", help="one JSON object a picture on stdout")
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
    if not 1 <= options.quality <= 100:
        raise ValueError(f"quality must be 1 to 100; got {options.quality}")
    if not 0 <= options.seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2^64); got {options.seed}")
    if options.max_pixels < 1:
        raise ValueError(f"max-pixels must be at least 1; got {options.max_pixels}")
    if options.threads < 0:
        raise ValueError(f"threads must be 0 (all) or more; got {options.threads}")
    output_size(1, 1, options.scale)
    jobs = plan(inputs, output, suffix=options.suffix, extension=options.format, recursive=options.recursive)
    if not any(job.source.exists() for job in jobs):
        raise ValueError(
            f"{jobs[0].source}: no such file" if jobs else "nothing to do: every match is an earlier output"
        )
    page = [Path(options.compare)] if options.compare else []
    if page and page[0].is_dir():
        raise ValueError(f"--compare {page[0]}: this is a folder; name the page, such as {page[0] / 'page.html'}")
    if page and page[0].suffix.lower() not in (".html", ".htm"):  # so that it is never a picture, nor an input
        raise ValueError(f"--compare {page[0]}: a page's name ends in .html, such as {page[0].with_suffix('.html')}")
    for folder in {target.parent for target in [job.target for job in jobs] + page}:
        _writable(folder)
    up = _load(options)
    up.check_tiling(options.tile, options.batch)
    return _Worker(up, options).run(jobs)


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{folder}: this is, or lies below, a file; name another folder for the output") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{folder}: this folder cannot be written")


def _load(options: Any) -> Upscaler:
    up = Upscaler.load(
        options.model,
        options.backend,
        options.device,
        threads=options.threads,
        trust_plan=options.trust_plan,
        bf16=options.precision == "bf16" and options.backend in ("openvino", "torch"),
        compiled=options.compile,
    )
    own = up.manifest.precision
    if options.precision in ("auto", own) or (options.precision == "bf16" and up.backend in ("openvino", "torch")):
        return up
    raise ValueError(
        f"precision {options.precision}: this folder is {own}; precision is chosen at export (python -m engine.export "
        "--precision), and bf16 also by --backend openvino or torch"
    )


class _Worker:
    def __init__(self, up: Upscaler, options: Any):
        self.up, self.options = up, options
        self.failed: list[str] = []
        self.written = self.skipped = 0

    def run(self, jobs: list[Job]) -> int:
        page = compare_page(self.options.compare) if self.options.compare else contextlib.nullcontext()
        with page as slider, _progress(len(jobs), self.options.no_progress) as step:
            for job in jobs:
                begin = time.perf_counter()
                row: dict[str, Any] = {"input": str(job.source), "output": str(job.target)}
                try:
                    row |= self._one(job, slider, step)
                except _FAILURES as error:
                    reason = " ".join(str(error).split()) or type(error).__name__
                    reason = reason if str(job.source) in reason else f"{job.source}: {reason}"
                    self.failed.append(reason)
                    row |= {"status": "failed", "error": reason}
                step(None, None)
                if self.options.json:
                    print(json.dumps(row | {"seconds": round(time.perf_counter() - begin, 3)}), flush=True)
        return self._report()

    def _one(self, job: Job, slider: ComparePage | None, step: Callable) -> dict[str, Any]:
        o = self.options
        if job.target.exists() and not o.overwrite:
            self._check_finished(job)
            if slider is not None:  # the page shows every picture, whenever it was finished
                before, after = (
                    read_image(job.source, max_pixels=o.max_pixels),
                    read_image(job.target, max_pixels=MAX_OUTPUT_PIXELS),
                )
                slider.add(job.source.name, before.pixels, after.pixels, before.icc)
            self.skipped += 1
            return {"status": "skipped"}
        picture = read_image(job.source, max_pixels=o.max_pixels)
        height, width = output_size(picture.pixels.shape[0], picture.pixels.shape[1], o.scale)
        check_writable(job.target, width, height, alpha=picture.alpha is not None)
        result = self.up.upscale(
            picture.pixels, o.seed, o.tile, scale=o.scale, color=o.color, batch=o.batch, progress=step
        )
        alpha = None if picture.alpha is None else resize(picture.alpha[..., None], (height, width))[..., 0]
        done: Picture = replace(picture, pixels=result, alpha=alpha)
        write_image(job.target, done.without_metadata() if o.strip_metadata else done, quality=o.quality)
        self.written += 1
        if slider is not None:
            slider.add(job.source.name, picture.pixels, result, picture.icc)
        return {"status": "written", "width": width, "height": height, "path": self.up.path}

    def _check_finished(self, job: Job) -> None:
        """The picture that is there has the size that this run would write.

        Raises:
            ValueError: it has another or cannot be read; skipping it would call a wrong picture finished.
        """
        size = picture_size(job.source)
        wanted = output_size(*size, self.options.scale) if size else None
        if wanted and (found := picture_size(job.target)) != wanted:
            there = f"a picture of {found[1]}x{found[0]}" if found else "no picture that can be read"
            raise ValueError(
                f"{job.target}: is there already and holds {there}, not one of {wanted[1]}x{wanted[0]}; "
                "--overwrite replaces it"
            )

    def _report(self) -> int:
        if not self.options.no_progress or self.failed or self.skipped:
            counts = [f"{self.written} written"]
            counts += [f"{self.skipped} skipped (finished before; --overwrite does them again)"] if self.skipped else []
            counts += [f"{len(self.failed)} failed:"] if self.failed else []
            print(f"{self.up.backend} ({self.up.path}): {', '.join(counts)}", file=sys.stderr)
        for line in self.failed:
            print(f"error: {line}", file=sys.stderr)
        return 1 if self.failed else 0


@contextmanager
def _progress(pictures: int, quiet: bool) -> Iterator[Callable[[int | None, int | None], None]]:
    """A bar over pictures with the current one's tiles: step(done, total) counts tiles, step(None, None) a picture."""
    from tqdm import tqdm

    with tqdm(total=pictures, unit="picture", disable=True if quiet else None, file=sys.stderr) as bar:

        def step(done: int | None, total: int | None) -> None:
            if done is None:
                bar.update(1)
            else:
                bar.set_postfix_str(f"tile {done}/{total}", refresh=True)

        yield step


def console() -> None:
    cli.run(main)


if __name__ == "__main__":
    console()
