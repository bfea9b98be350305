"""Upscale many pictures: `python -m engine.bulk IN OUT`."""

from __future__ import annotations

import json
import os
from typing import Any

from engine.io import cli
from engine.io.formats import KINDS, kind_of
from engine.io.images import MAX_PIXELS
from engine.io.notices import say
from engine.runtime import color
from engine.runtime import manifest as manifests
from engine.runtime.backends.registry import BACKENDS
from engine.runtime.manifest import Manifest
from engine.runtime.upscaler import BUNDLED, model_folder
from engine.settings import Settings

_SHOWN = 20  # failures that are named on stderr


def parser() -> cli.Parser:
    p = cli.Parser(
        prog="python -m engine.bulk",
        description="Upscale many pictures x4, on this machine or on a Ray cluster. A result has the bytes that "
        "python -m engine.upscale would write. Pictures that are finished are skipped.",
        epilog="The ledger (key, output, status, sha256, size, seconds, error) is in OUT/.gdpo-bulk/ledger. Exit "
        "codes: 0 done, 1 some pictures failed or the run could not go on, 2 bad usage, 130 interrupted, "
        "143 terminated.",
    )
    p.add_argument("input", metavar="IN", help="folder, glob, or .parquet or .csv file with a column key; a path or "
                   "an fsspec URL (s3://, gs://, ...)")  # fmt: skip
    p.add_argument("output", metavar="OUT", help="folder, a path or an fsspec URL; sub-folders are kept")
    p.add_argument("--root", help="folder that the keys of a .parquet or .csv file are relative to (default: its own)")
    p.add_argument("--retry-failed", action="store_true", help="try again the pictures that failed in an earlier run")
    p.add_argument(
        "-n",
        "--model",
        help="an engine folder, on every machine, or a bundled model: tiny, quality or faithful (default: tiny)",
    )
    p.add_argument("--seed", type=int, default=0, help="random seed of the noise, the same for every picture")
    p.add_argument("-s", "--scale", type=float, help="factor (default: 4)")
    p.add_argument("--longest", type=int, metavar="PIXELS", help="length of the longer side, instead of a factor")
    p.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="size limit of inputs (default: %(default)s)")
    p.add_argument("-t", "--tile", type=int, default=0, help="longest tile side in input pixels; 0: the model's choice")
    p.add_argument("--batch", type=int, help="number of tiles that go through the model at once")
    p.add_argument("--color", default=color.DEFAULT, choices=color.METHODS,
                   help="method that matches the colours to the input's")  # fmt: skip
    p.add_argument(
        "--background", metavar="COLOUR", help="colour to put under transparent pixels; the result is opaque"
    )
    p.add_argument("-f", "--format", type=kind_of, choices=KINDS, help="format of outputs (default: the input's)")
    p.add_argument("--quality", type=int, default=95, help="quality of lossy formats, 1 to 100 (default: %(default)s)")
    p.add_argument("--lossless", action="store_true", help="write lossless WebP and JPEG XL (PNG and TIFF always are)")
    p.add_argument(
        "--strip-metadata", action="store_true", help="leave out EXIF, XMP and text; keep the colour profile"
    )
    machine = p.add_argument_group("machines")
    machine.add_argument("--address", help="address of a Ray cluster, or auto (default: this machine alone)")
    machine.add_argument("--workers", type=int, default=0, help="number of processes; 0: as many as there is room for")
    machine.add_argument("--threads", type=int, default=1, help="number of CPU threads of each process")
    machine.add_argument("--gpus-per-worker", type=float, default=0, help="GPUs of each process; 0.5: two share one")
    served = [name for name, backend in BACKENDS.items() if backend.runs_folders]
    machine.add_argument(
        "--backend", default="auto", metavar="NAME", help=f"auto, {', '.join(served)} (auto: the model's own)"
    )
    machine.add_argument("--precision", default="auto", choices=("auto", "fp32", "fp16", "bf16"),
                         help="number format of the computation")  # fmt: skip
    machine.add_argument("--trust-plan", action="store_true", help="load a TensorRT plan that was built elsewhere "
                         "(it is executable code)")  # fmt: skip
    p.add_argument("--no-progress", action="store_true", help="show no progress bar or lines")
    return p


def main() -> int:
    options = parser().parse_args()
    try:
        import fsspec  # noqa: F401
        import pyarrow  # noqa: F401
        import ray  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"{error.name} is not installed; pip install 'gdpo-sr[cluster]'") from None
    from engine.bulk.cluster import Machines
    from engine.bulk.enlarger import Work
    from engine.bulk.keys import source_of
    from engine.bulk.run import run
    from engine.bulk.storage import Storage
    from engine.worker import model_identity

    _check(options)
    names = ("seed", "scale", "longest", "tile", "batch", "color", "background", "quality", "lossless")
    settings = Settings.of(
        **{name: getattr(options, name) for name in names},
        strip_metadata=options.strip_metadata,
        max_pixels=options.max_pixels,
    )
    folder = model_folder(options.model).resolve()
    manifest = manifests.load(folder)
    source, keys = source_of(_absolute(options.input), options.root and _absolute(options.root))
    out = Storage(_absolute(options.output))
    for storage in (source, out):
        if not storage.shared:
            raise ValueError(f"{storage.url}: is in the memory of one process alone; others would not see it")
    if out.holds(source.root, source):
        raise ValueError(f"{options.output}: the pictures are in it; give another output")
    work = Work(
        source=source.url,
        out=out.url,
        settings=settings,
        extension=f".{options.format}" if options.format else None,
        model=folder.name if folder.parent == BUNDLED.resolve() else str(folder),  # bundled: wherever it is on a node
        identity=model_identity(folder),
        load={"backend": _backend(options, manifest), "precision": options.precision, "threads": options.threads}
        | {"trust_plan": options.trust_plan, "device": "cuda" if options.gpus_per_worker else None},
    )
    machines = Machines(options.address, options.workers, options.threads, options.gpus_per_worker)
    summary = run(work, keys, machines, retry_failed=options.retry_failed, quiet=options.no_progress)
    _report(summary)
    print(json.dumps(summary))
    return 1 if summary["failed"] or summary["failed_before"] else 0


def _backend(options: Any, manifest: Manifest) -> str:
    """The backend, chosen once: every machine makes the same bytes."""
    if options.backend != "auto":
        return options.backend
    return "openvino" if options.precision == manifest.options.get("on_cpu") == "bf16" else manifest.backend


def _check(options: Any) -> None:
    if "" in (options.input, options.output):
        raise ValueError("an input or the output is an empty path; an unset variable?")
    if options.workers < 0:
        raise ValueError(f"workers must be 0 (as many as there is room for) or more; got {options.workers}")
    if options.threads < 1:
        raise ValueError(f"threads must be at least 1; got {options.threads}")
    if options.gpus_per_worker < 0:
        raise ValueError(f"gpus-per-worker must be 0 or more; got {options.gpus_per_worker:g}")
    if options.backend == "torch":
        raise ValueError("backend torch is not run here; export the model (python -m engine.export)")


def _absolute(text: str) -> str:
    """Local paths as they are from everywhere: actors work in a folder of their own."""
    return text if "://" in text or "::" in text else os.path.abspath(text)


def _report(summary: dict[str, Any]) -> None:
    for failure in summary["failures"][:_SHOWN]:
        say(f"error: {failure['key']}: {failure['error']}")
    if summary["failed"] > _SHOWN:
        say(f"... and {summary['failed'] - _SHOWN} more failed; {summary['ledger']} has all")
    counts = [f"{summary['done']} made"]
    counts += [f"{summary['skipped']} finished before"] if summary["skipped"] else []
    counts += [f"{summary['failed']} failed"] if summary["failed"] else []
    before = summary["failed_before"]
    counts += [f"{before} failed in an earlier run (--retry-failed tries them again)"] if before else []
    say(f"{', '.join(counts)}, of {summary['keys']} pictures, in {summary['seconds']} s")


def console() -> None:
    cli.run(main)


if __name__ == "__main__":
    console()
