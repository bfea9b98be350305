"""Build an exported folder for a backend: `python -m engine.build ONNX_FOLDER --backend tensorrt --out DIR`."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engine.build.builder import TARGETS, BuildOptions, architecture_of, build
from engine.io import cli
from engine.io.images import READABLE, read_image
from engine.io.picture import to_8_bit
from engine.runtime import manifest as manifests
from engine.runtime.backends.registry import PLANS
from engine.runtime.backends.tensorrt import load_module
from engine.runtime.manifest import Manifest, Profile
from engine.runtime.repository import NAME

_MOST_PICTURES = 40  # more only take longer


def profile_from(options: Any, exported: Manifest, backend: str) -> Profile:
    """A profile from shapes as trtexec takes them (image:1x3x64x64) or from the exported folder.

    A plan is for the usual shape alone, unless the smallest or the largest is named.
    """
    low, usual, high = (_shape(text, exported) for text in (options.min_shapes, options.opt_shapes, options.max_shapes))
    old = exported.profile
    if backend in PLANS and not low and not high:
        old, low, high = old.usual, usual, usual
    batch = tuple(s[0] if s else b for s, b in zip((low, usual, high), old.batch))
    tile = tuple(s[1] if s else t for s, t in zip((low, usual, high), old.tile))
    if list(batch) != sorted(batch) or list(tile) != sorted(tile):
        raise ValueError(f"min, opt and max shapes must rise; got batches {batch} and sides {tile}")
    return Profile((batch[0], batch[1], batch[2]), (tile[0], tile[1], tile[2]))


def _shape(text: str | None, exported: Manifest) -> tuple[int, int] | None:
    """(batch, tile side in output pixels) of "image:1x3x512x512", of any one input."""
    if text is None:
        return None
    first = text.split(",")[0]
    found = re.fullmatch(r"(\w+):(\d+)x(\d+)x(\d+)x(\d+)", first)
    tensors = {t.name: t for graph in exported.graphs.values() for t in graph.inputs}
    if not found or found[1] not in tensors or found[4] != found[5]:
        raise ValueError(f"{text!r} is not a shape such as image:1x3x512x512 (a square; inputs: {', '.join(tensors)})")
    unit = 1 if tensors[found[1]].shape[2] == "height" else exported.geometry.factor
    return int(found[2]), int(found[4]) * unit


def _pictures(precision: str | None, folder: str | None) -> list[np.ndarray]:
    """The calibration pictures, as 8-bit RGB."""
    if precision != "int8":
        if folder:
            raise ValueError("--calibration is for --precision int8")
        return []
    if not folder:
        raise ValueError(
            "--precision int8 needs --calibration DIR, a folder of some pictures of the kind that will be upscaled "
            "(python -m gdpo.assets demo-photos fetches four)"
        )
    files = [f for f in sorted(Path(folder).iterdir()) if f.suffix.lower() in READABLE and not f.name.startswith(".")][
        :_MOST_PICTURES
    ]
    return [to_8_bit(read_image(f).pixels) for f in files]


def main() -> int:
    parser = cli.Parser(prog="python -m engine.build", description="Build an exported folder for a backend.")
    parser.add_argument("folder", help="a folder that engine.export wrote")
    parser.add_argument("--out", help="folder to write")
    parser.add_argument("--triton-repository", metavar="DIR", help="write models for Triton Inference Server to DIR, "
                        "not --out: ONNX (backend onnxruntime) or plans (tensorrt), for one tile size")  # fmt: skip
    parser.add_argument("--triton-name", default=NAME, help="the model's name on the server (default: %(default)s)")
    parser.add_argument(
        "--backend", choices=TARGETS, help="default: tensorrt if it and an NVIDIA GPU are available, else onnxruntime"
    )
    words = {"min": "smallest", "opt": "usual", "max": "largest"}
    for which in words:
        parser.add_argument(f"--{which}-shapes", metavar="image:BxCxHxW",
                            help=f"{words[which]} input shape (default: the folder's; plans: its usual)")  # fmt: skip
    parser.add_argument("--precision", choices=("int8",),
                        help="quantize to INT8 for CPUs with VNNI, if the pictures hardly change")  # fmt: skip
    parser.add_argument("--calibration", metavar="DIR", help="pictures to calibrate and check int8 with")
    parser.add_argument("--timing-cache", help="file that keeps timing measurements between builds")
    parser.add_argument("--builder-optimization-level", type=int, default=3, choices=range(6), metavar="0..5",
                        help="effort of TensorRT's search for fast kernels")  # fmt: skip
    parser.add_argument("--version-compatible", action="store_true",
                        help="build a plan that later TensorRT versions can load")  # fmt: skip
    parser.add_argument("--refit", action="store_true", help="build a plan whose weights can be replaced")
    parser.add_argument("--workspace", type=int, metavar="MIB", help="limit of TensorRT's scratch memory")
    parser.add_argument(
        "--architecture", nargs="+", default=[], help="GPUs to compile for ahead of time, such as sm_89 (tensorrt-rtx)"
    )
    parser.add_argument("--overwrite", action="store_true", help="build even if the output is up to date")
    parser.add_argument("--quiet", action="store_true", help="hide the backend's messages")
    options = parser.parse_args()
    source = Path(options.folder)
    if (options.out is None) == (options.triton_repository is None):
        raise ValueError("give a folder to write: --out DIR, or --triton-repository DIR")
    backend = options.backend or ("onnxruntime" if options.precision else _default_backend())
    chosen = BuildOptions(
        options.workspace,
        options.builder_optimization_level,
        options.refit,
        options.version_compatible,
        tuple(options.architecture),
    )
    # A server joins batches, so its plans are for any size of batch.
    profile = profile_from(options, manifests.load(source), "onnxruntime" if options.triton_repository else backend)
    cache = Path(options.timing_cache) if options.timing_cache else None

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def make(out: Path, profile: Profile) -> tuple[Manifest, bool]:
        return build(
            source,
            out,
            backend,
            profile=profile,
            options=chosen,
            timing_cache=cache,
            log=None if options.quiet else log,
            force=options.overwrite,
            precision=options.precision or "as exported",
            calibration=_pictures(options.precision, options.calibration),
        )

    if options.triton_repository:
        _write_repository(options, backend, make, profile)
        return 0
    out = Path(options.out)
    manifest, built = make(out, profile)
    from engine.info import describe

    print(describe(out, manifest))
    print("built" if built else "up to date (--overwrite builds it again)", file=sys.stderr)
    return 0


def _write_repository(options: Any, backend: str, make: Callable[[Path, Profile], Any], profile: Profile) -> None:
    """Models for Triton Inference Server: the exported graphs as they are, or what `make` builds of them."""
    from engine.build.triton import fixed_tile, write_repository

    if backend == "tensorrt-rtx":
        raise ValueError("Triton Inference Server runs ONNX and plans of tensorrt, not of tensorrt-rtx")
    profile = fixed_tile(profile)
    with tempfile.TemporaryDirectory(prefix="gdpo-build-") as temporary:
        folder = Path(options.folder)
        if backend != "onnxruntime" or options.precision:
            folder = Path(temporary) / "built"
            make(folder, profile)
        for model in write_repository(folder, Path(options.triton_repository), options.triton_name, profile):
            print(model)


def _default_backend() -> str:
    try:
        load_module("tensorrt")
        architecture_of("tensorrt")
    except RuntimeError:
        return "onnxruntime"
    return "tensorrt"


def console() -> None:
    cli.run(main)


if __name__ == "__main__":
    console()
