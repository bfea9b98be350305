"""A model repository of Triton Inference Server, of an engine folder.

Not to be confused with Triton, the language of kernels/.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.build.builder import within
from engine.io.folders import staged_folder
from engine.runtime.manifest import FolderError, Graph, Manifest, Profile, Tensor, load
from engine.runtime.repository import MANIFEST, batched, dims, model_name

_MODELS = {"onnx": ("onnxruntime", "model.onnx", "KIND_AUTO"), "tensorrt": ("tensorrt", "model.plan", "KIND_GPU")}
_GRAPHS = ("generator", "encoder", "unet", "decoder")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


def fixed_tile(profile: Profile) -> Profile:
    """The same with one tile, the usual one: a server joins tiles of one size."""
    return replace(profile, tile=(profile.tile[1],) * 3)


def write_repository(folder: Path, repository: Path, name: str, profile: Profile) -> list[Path]:
    """Write a model for each graph, each whole or not at all; other models in the repository are left alone.

    Args:
        folder: an engine folder that was exported (ONNX), or built for tensorrt.
        repository: what the server is given as --model-repository; made when missing.
        name: of the model on the server; the graphs of a split folder get NAME_encoder, NAME_unet and NAME_decoder.
        profile: of one tile side.

    Returns:
        The models' folders.

    Raises:
        FolderError: a folder that the server cannot run, or another model of that name.
        ValueError: a name that is none.
    """
    manifest = load(folder)
    if manifest.backend not in _MODELS:
        raise FolderError(
            f"{folder} is built for {manifest.backend}; Triton Inference Server is given the folder of engine.export, "
            "or plans of tensorrt"
        )
    if not _NAME.fullmatch(name):
        raise ValueError(f"the model's name on the server must be letters, digits, _, - and .; got {name!r}")
    model = _MODELS[manifest.backend][1]
    contents = {graph: manifest.read(folder, graph) for graph in manifest.graphs}
    shown = replace(manifest, profile=within(profile, manifest))
    targets = {graph: repository / model_name(name, graph) for graph in _GRAPHS}
    for target in targets.values():
        if target.exists() and not _ours(target):
            raise FolderError(
                f"{target} exists and was not written by engine.build, so it will not be replaced; "
                "give another --triton-name"
            )
    for graph, (content, data) in contents.items():
        with staged_folder(targets[graph]) as staged:
            (staged / "1").mkdir()
            (staged / "1" / model).write_bytes(content)
            for file, weights in data.items():
                (staged / "1" / file).write_bytes(weights)
            (staged / "config.pbtxt").write_text(config(model_name(name, graph), shown, shown.graphs[graph]))
    for graph in targets.keys() - contents.keys():  # of an earlier model with other graphs
        shutil.rmtree(targets[graph], ignore_errors=True)
    return [targets[graph] for graph in contents]


def config(name: str, manifest: Manifest, graph: Graph) -> str:
    """A model's config.pbtxt."""
    backend, _, kind = _MODELS[manifest.backend]
    joined = batched(manifest.profile)

    def tensors(found: Sequence[Tensor]) -> str:
        rows = [
            f'  {{ name: "{t.name}" data_type: TYPE_FP32 dims: {dims(t, manifest.geometry, manifest.profile)} }}'
            for t in found
        ]
        return ",\n".join(rows)

    lines = [
        "# Written by engine.build --triton-repository. max_batch_size may be made smaller; instance_group and",
        f"# dynamic_batching are yours to tune. engine.upscale --backend triton reads {MANIFEST}.",
        f'name: "{name}"',
        f'backend: "{backend}"',
        f"max_batch_size: {manifest.profile.batch[2] if joined else 0}",
        f"input [\n{tensors(graph.inputs)}\n]",
        f"output [\n{tensors([graph.output])}\n]",
        *(["dynamic_batching { }"] if joined else []),
        f"instance_group [ {{ count: 1 kind: {kind} }} ]",
        f'parameters {{ key: "{MANIFEST}" value {{ string_value: {json.dumps(manifest.content().decode())} }} }}',
    ]
    return "\n".join(lines) + "\n"


def _ours(target: Path) -> bool:
    file = target / "config.pbtxt"
    return file.is_file() and MANIFEST in file.read_text(errors="replace")
