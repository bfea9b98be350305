"""Build an exported folder for one backend, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.build import int8
from engine.build.onnxruntime import optimise
from engine.build.tensorrt import BuildOptions, build_plan
from engine.io.files import sha256
from engine.io.folders import staged_folder  # imports no torch
from engine.runtime import manifest as manifests
from engine.runtime.backends.registry import PLANS
from engine.runtime.backends.tensorrt import load_module
from engine.runtime.manifest import FolderError, Graph, Manifest, Profile
from engine.runtime.trust import remember_plan

TARGETS = ("onnxruntime", *PLANS)
PRECISIONS = ("as exported", "int8")


def build(
    source: Path,
    out: Path,
    backend: str,
    *,
    profile: Profile | None = None,
    options: BuildOptions | None = None,
    timing_cache: Path | None = None,
    log: Callable[[str], None] | None = None,
    force: bool = False,
    precision: str = "as exported",
    calibration: Sequence[np.ndarray] = (),
) -> tuple[Manifest, bool]:
    """Build a folder, whole or not at all.

    Args:
        source: a folder that engine.export wrote.
        out: the folder to write. It is left alone when it is up to date: made of the same files, by the same version,
            with the same options.
        backend: "onnxruntime", "tensorrt" or "tensorrt-rtx".
        profile: batch and tile sides; None takes the exported folder's, and for a plan its usual ones alone (a plan
            for a range is slower and needs more memory). A static export has only its own.
        options: of a plan.
        timing_cache: of tensorrt: a file that remembers measurements between builds; made when missing.
        log: gets TensorRT's messages.
        force: build even when up to date.
        precision: "as exported", or "int8" of an fp32 folder for onnxruntime (and OpenVINO; see engine.build.int8).
        calibration: for int8, at least four pictures [H,W,3] uint8 of the kind that will be upscaled.

    Returns:
        The manifest, and whether anything was built.

    Raises:
        FolderError, ValueError: a source that is no export, or a profile beyond it.
        RuntimeError: the backend is not installed, or refuses the model (with everything it said).
    """
    exported = manifests.load(source)
    if exported.backend != "onnx":
        raise FolderError(f"{source} is built for {exported.backend} already; build from the folder of engine.export")
    if backend not in TARGETS:
        raise ValueError(f"backend must be one of {', '.join(TARGETS)}; got {backend!r}")
    if out.resolve() == source.resolve():
        raise ValueError(f"out must be another folder than {source}")
    manifests.check_target(out)
    if timing_cache is not None and backend != "tensorrt":
        raise ValueError(f"timing_cache is for tensorrt; {backend} measures nothing while it builds")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    if precision == "int8" and backend != "onnxruntime":
        raise ValueError(f"precision int8 is for backend onnxruntime (and OpenVINO); got {backend}")
    options = options or BuildOptions()
    options.check(backend)
    default = exported.profile.usual if backend in PLANS else exported.profile
    profile = within(profile or default, exported)
    built = replace(
        exported,
        backend=backend,
        backend_version=_version(backend),
        profile=profile,
        source={name: graph.sha256 for name, graph in exported.graphs.items()},
        options={"export": dict(exported.options)} | (options.record() if backend in PLANS else {}),
        architecture=architecture_of(backend),
        extras={},
    )
    pictures = list(calibration)
    if precision == "int8":  # QDQ nodes are ONNX: the folder stays one that several backends run
        built = replace(
            built,
            backend="onnx",
            backend_version=exported.backend_version,
            options=dict(built.options) | {"precision": precision, "calibration_sha256": int8.fingerprint(pictures)},
        )
    if not force and _up_to_date(out, built):
        return manifests.load(out), False
    with staged_folder(out) as folder:
        graphs: dict[str, Graph] = {}
        if precision == "int8":
            graphs, figures = int8.quantize(exported, source, folder, pictures, log or (lambda text: None))
            built = replace(built, parity=dict(built.parity) | figures)
        elif backend == "onnxruntime":
            graphs = {name: optimise(exported, source, name, folder) for name in exported.graphs}
        else:
            for name, entry in exported.graphs.items():
                plan = build_plan(
                    exported, source, name, backend, profile, options, timing_cache, log or (lambda text: None)
                )
                file = folder / f"{name}.plan"
                file.write_bytes(plan)
                graphs[name] = replace(entry, file=file.name, sha256=sha256(file), data={})
        built = replace(built, graphs=graphs)
        built.save(folder)
    for graph in graphs.values():
        if backend in PLANS:
            remember_plan(graph.sha256)
    return built, True


def within(profile: Profile, exported: Manifest) -> Profile:
    """The profile, if an exported folder allows it.

    Raises:
        ValueError: naming what was exported.
    """
    allowed = exported.profile
    for name, wanted, (low, _, high) in (
        ("batch", profile.batch, allowed.batch),
        ("tile", profile.tile, allowed.tile),
    ):
        if wanted[0] < low or wanted[2] > high:
            raise ValueError(
                f"{name} {wanted[0]} to {wanted[2]} is beyond what was exported ({low} to {high}); export again"
            )
        if name == "tile" and any(side % exported.geometry.multiple for side in wanted):
            raise ValueError(f"tile sides must be multiples of {exported.geometry.multiple}; got {wanted}")
    return profile


def _version(backend: str) -> str:
    if backend in PLANS:
        return str(load_module(backend).__version__)
    import onnxruntime

    return onnxruntime.__version__


def architecture_of(backend: str) -> str | None:
    """TensorRT builds for the GPU it measures on; TensorRT-RTX compiles for a GPU where the plan is loaded."""
    if backend != "tensorrt":
        return None
    from engine.runtime.backends.cuda import Driver

    return Driver().architecture()


def _up_to_date(out: Path, wanted: Manifest) -> bool:
    try:
        found = manifests.load(out)
        for name in found.graphs:
            found.read(out, name)
    except FolderError:
        return False
    ignored: dict[str, Any] = {"graphs": wanted.graphs, "parity": wanted.parity}
    return replace(found, **ignored) == wanted and found.graphs.keys() == wanted.graphs.keys()
