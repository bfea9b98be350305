"""A generator as a folder of ONNX graphs.

LoRA merged, timestep and prompt folded (engine.export.graphs), noise an input. The folder runs on ONNX Runtime as it
is; engine.build makes optimised models and plans of it. Every export is compared with torch before it is kept.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.export import graphs
from engine.export.descriptors import descriptors, dynamic_shapes, example_inputs, geometry_of, profile_of
from engine.export.parity import measure_parity, parity_cases
from engine.export.weights import STORED, round_to, store_as
from engine.io.files import sha256
from engine.io.folders import staged_folder
from engine.runtime.manifest import Geometry, Graph, Manifest, Profile, check_target
from engine.runtime.noise import noise_field
from gdpo.generator import OneStepGenerator
from gdpo.model.architectures import architecture_of
from gdpo.model.layers import split_phases

PRECISIONS = tuple(graphs.DTYPES)
_SINGLE_FILE = 1 << 30  # larger weights go into a file beside


def export_generator(
    generator: OneStepGenerator,
    out: Path,
    *,
    precision: str = "fp32",
    weights: str = "fp32",
    on_cpu: str = "fp32",
    opset: int = 23,
    split: bool = False,
    profile: Profile | None = None,
    image_to_image: bool = False,
    seed: int = 0,
    check: bool = True,
    model: dict[str, Any] | None = None,
) -> Manifest:
    """Export a generator, whole or not at all. The generator is folded and cast in place: load another for more.

    Args:
        generator: on the CPU.
        out: the folder to write; an old one is replaced only when the new one is complete.
        precision: "fp32", "fp16" or "bf16" inside the graphs; their inputs and outputs are fp32.
        weights: how an fp32 graph's weights are stored: "fp16" takes half the bytes, "int8" a quarter; see
            engine.export.weights.
        on_cpu: "bf16" has engine.Upscaler compute an fp32 graph in bf16 where OpenVINO and the CPU can.
        opset: of ONNX, 18 to 23.
        split: three graphs (encoder, unet, decoder) instead of one.
        profile: batch and tile sides; static where the least is the largest.
        image_to_image: also write image_to_image.onnx (see graphs.ImageToImage), with the noise of `seed`.
        check: compare with torch; the figures go into the manifest.
        model: what the manifest says about the model besides what the generator knows.

    Raises:
        ValueError: an unknown precision, weights or opset, or a seed out of range.
        RuntimeError: the exported model differs from torch by more than TOLERANCE.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    narrow = weights != "fp32"
    if weights not in STORED or (narrow and precision != "fp32"):
        raise ValueError(
            f"weights must be fp32, or fp16 or int8 in a graph of precision fp32; got {weights!r} in {precision}"
        )
    if on_cpu not in ("fp32", "bf16") or (on_cpu == "bf16" and precision != "fp32"):
        raise ValueError(f"on_cpu must be fp32, or bf16 of a graph of precision fp32; got {on_cpu!r} in {precision}")
    if not 18 <= opset <= 23:
        raise ValueError(f"opset must be 18 to 23; got {opset}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2^64); got {seed}")
    if narrow and sum(p.numel() * 4 for p in generator.parameters()) > _SINGLE_FILE:
        raise ValueError(f"weights {weights} is for models of less than 1 GiB; export a larger one with precision fp16")
    check_target(out)
    generator = generator.eval().requires_grad_(False)
    geometry = geometry_of(generator)
    profile = profile or profile_of(geometry, batch=1, max_batch=8, tile=512, max_tile=1024, static=False)
    generator.merge_lora()
    if narrow:
        round_to(weights, generator)
    about = {
        "parametrization": generator.parametrization,
        "t_noise": generator.t_noise,
        "t_diffusion": generator.t_diffusion,
        "prompt": generator.prompt if generator.uses_text else None,
        "parameters": sum(p.numel() for p in generator.parameters()),
        "weights_sha256": _weights_hash(generator),
    }
    cases = list(parity_cases(generator, geometry, profile)) if check else []
    split_phases(graphs.cast(graphs.fold(generator), precision))
    if precision == "fp32":  # what a CPU runs
        architecture_of(generator.unet).for_cpu(generator.unet)
    with staged_folder(out) as folder:
        entries: dict[str, Graph] = {}
        for name, (module, entry) in descriptors(generator, precision, split).items():
            _export(module, entry, folder / entry.file, geometry, profile, opset)
            if narrow:
                store_as(weights, folder / entry.file)
            data = folder / f"{entry.file}.data"
            hashes = {data.name: sha256(data)} if data.is_file() else {}
            entries[name] = replace(entry, sha256=sha256(folder / entry.file), data=hashes)
        extras = {}
        if image_to_image:
            extras["image_to_image.onnx"] = _export_image_to_image(generator, folder, precision, opset, seed, geometry)
        manifest = Manifest(
            backend="onnx",
            backend_version=f"opset {opset}",
            precision=precision,
            geometry=geometry,
            profile=profile,
            graphs=entries,
            model=about | (model or {}),
            options={
                "opset": opset,
                "weights": weights,
                "on_cpu": on_cpu,
                "torch": torch.__version__,
                "seed": seed if image_to_image else None,
            },
            extras=extras,
        )
        if check:
            manifest = replace(manifest, parity=measure_parity(generator, manifest, folder, cases))
        manifest.save(folder)
    return manifest


def _weights_hash(generator: OneStepGenerator) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(generator.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy() if tensor.ndim else tensor.numpy().tobytes())
    return digest.hexdigest()


def _export(module: nn.Module, entry: Graph, file: Path, geometry: Geometry, profile: Profile, opset: int) -> None:
    """Write one graph and check that its dynamic axes are what the descriptor says."""
    import onnx

    if profile.static:
        count = profile.tile[0] // geometry.multiple
        example = example_inputs(entry, geometry, profile.batch[0], count, count)
    else:
        example = example_inputs(entry, geometry, 2, 2, 3)
    names = [t.name for t in entry.inputs]
    save_graph(module, tuple(example), file, names, entry.output.name, dynamic_shapes(entry, geometry, profile), opset)
    graph = onnx.load(file, load_external_data=False)
    for value, tensor in zip([*graph.graph.input, *graph.graph.output], [*entry.inputs, entry.output]):
        for dim, meaning in zip(value.type.tensor_type.shape.dim, tensor.shape):
            if profile.static or isinstance(meaning, int):
                continue
            if dim.HasField("dim_value"):
                raise RuntimeError(f"{file.name}: {tensor.name} has a fixed {meaning} of {dim.dim_value} after export")
            dim.dim_param = meaning
    onnx.save(graph, file)


def save_graph(
    module: nn.Module, example: tuple, file: Path, names: list[str], output: str, shapes: Any, opset: int
) -> None:
    """Write one module as ONNX, with its weights in a file beside it when they are large."""
    # The exporter reports torchvision's absence and its own deprecations; its errors are exceptions.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            example,
            dynamo=True,
            opset_version=opset,
            input_names=names,
            output_names=[output],
            dynamic_shapes=shapes,
            optimize=True,
            verbose=False,
        )
    assert program is not None  # dynamo=True returns one
    _strip(program.model.graph)
    size = sum(p.numel() * p.element_size() for p in module.state_dict().values())
    program.save(file, external_data=size > _SINGLE_FILE)


def _strip(graph: Any) -> None:
    """Take out the exporter's notes on where nodes come from: megabytes, and paths of this machine."""
    graph.metadata_props.clear()
    values = [*graph.inputs, *graph.initializers.values()]
    for node in graph.all_nodes():
        node.metadata_props.clear()
        values += node.outputs
    for value in values:
        value.metadata_props.clear()


def _export_image_to_image(
    generator: OneStepGenerator, folder: Path, precision: str, opset: int, seed: int, geometry: Geometry
) -> str:
    side = 256 // geometry.factor
    noise = torch.from_numpy(noise_field(seed, geometry.channels, (0, side), (0, side))[None].copy())
    module = graphs.ImageToImage(generator, precision, noise, geometry.scale)
    height, width = (torch.export.Dim(name, min=2, max=1 << 13) for name in ("height", "width"))
    file = folder / "image_to_image.onnx"
    save_graph(module, (torch.rand(1, 3, 37, 50),), file, ["input"], "output", ({2: height, 3: width},), opset)
    return sha256(file)
