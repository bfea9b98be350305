"""Export a generator to ONNX: `python -m engine.export MODEL --out DIR`.

LoRA merged, timestep and prompt folded (engine.fold), noise an input. The folder that results runs on ONNX Runtime
as it is, and engine.build makes optimised models and plans of it. Every export is compared with torch before it is
kept.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from engine import cli, fold
from engine.files import sha256
from engine.manifest import Geometry, Graph, Manifest, Profile, Tensor, check_target
from engine.noise import noise_field
from gdpo.generator import OneStepGenerator
from gdpo.storage import staged_folder

PRECISIONS = tuple(fold.DTYPES)
# The greatest difference from torch in fp32, of values in [-1,1], that an export may show.
TOLERANCE = {"fp32": 2e-4, "fp16": 0.1, "bf16": 0.5}
_PARITY_SHAPES = ((1, 1, 1), (2, 1, 2), (3, 2, 1), (4, 1, 1), (1, 2, 3), (2, 3, 2))  # batch, rows, columns of the least
_SINGLE_FILE = 1 << 30  # larger weights go into a file beside


def descriptors(generator: OneStepGenerator, precision: str, split: bool) -> dict[str, tuple[nn.Module, Graph]]:
    """The graphs to export, by name: the module, and its tensors' names, types and dynamic axes."""
    channels = generator.codec.channels
    picture = ("batch", 3, "height", "width")
    field = ("batch", channels, "latent_height", "latent_width")
    image, output = Tensor("image", picture), Tensor("output", picture)
    latent, noise, x0 = (Tensor(name, field) for name in ("latent", "noise", "x0"))
    if not split:
        return {"generator": (fold.Whole(generator, precision), Graph("generator.onnx", "", (image, noise), output))}
    return {
        "encoder": (fold.Encoder(generator, precision), Graph("encoder.onnx", "", (image,), latent)),
        "unet": (fold.Step(generator, precision), Graph("unet.onnx", "", (latent, noise), x0)),
        "decoder": (fold.Decoder(generator, precision), Graph("decoder.onnx", "", (x0,), output)),
    }


def geometry_of(generator: OneStepGenerator) -> Geometry:
    """Tiles overlap by 64 output pixels, or by a model's multiple where that is more."""
    return Geometry(
        4, generator.codec.factor, generator.codec.channels, generator.multiple, max(64, generator.multiple)
    )


def profile_of(
    geometry: Geometry, *, batch: int, max_batch: int, tile: int, max_tile: int, static: bool, split: bool = False
) -> Profile:
    """A profile from the user's figures.

    Raises:
        ValueError: a side that is no multiple of what the model needs, or figures that do not rise.
    """
    least = max(geometry.multiple, 64)
    for name, side in (("tile", tile), ("max_tile", max_tile)):
        if side % geometry.multiple or side < least:
            raise ValueError(f"{name} must be a multiple of {geometry.multiple} and at least {least}; got {side}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1; got {batch}")
    if static:
        return Profile((batch, batch, batch), (tile, tile, tile))
    if batch > max_batch or tile > max_tile:
        raise ValueError(f"batch {batch} and tile {tile} must not exceed max_batch {max_batch} and max_tile {max_tile}")
    return Profile((1, batch, max_batch), (least, tile, max_tile))


def export_generator(
    generator: OneStepGenerator,
    out: Path,
    *,
    precision: str = "fp32",
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
        opset: of ONNX, 18 to 23.
        split: three graphs (encoder, unet, decoder) instead of one.
        profile: batch and tile sides; static where the least is the largest.
        image_to_image: also write image_to_image.onnx (see fold.ImageToImage), with the noise of `seed`.
        check: compare with torch; the figures go into the manifest.
        model: what the manifest says about the model besides what the generator knows.

    Raises:
        ValueError: an unknown precision or opset, or a seed out of range.
        RuntimeError: the exported model differs from torch by more than TOLERANCE.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    if not 18 <= opset <= 23:
        raise ValueError(f"opset must be 18 to 23; got {opset}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2^64); got {seed}")
    check_target(out)
    generator = generator.eval().requires_grad_(False)
    geometry = geometry_of(generator)
    profile = profile or profile_of(geometry, batch=1, max_batch=8, tile=512, max_tile=1024, static=False)
    generator.merge_lora()
    about = {
        "parametrization": generator.parametrization,
        "t_noise": generator.t_noise,
        "t_diffusion": generator.t_diffusion,
        "prompt": generator.prompt if generator.uses_text else None,
        "parameters": sum(p.numel() for p in generator.parameters()),
        "weights_sha256": _weights_hash(generator),
    }
    cases = list(_cases(generator, geometry, profile)) if check else []
    fold.cast(fold.fold(generator), precision)
    with staged_folder(out) as folder:
        graphs = {}
        for name, (module, entry) in descriptors(generator, precision, split).items():
            _export(module, entry, folder / entry.file, geometry, profile, opset)
            data = folder / f"{entry.file}.data"
            hashes = {data.name: sha256(data)} if data.is_file() else {}
            graphs[name] = replace(entry, sha256=sha256(folder / entry.file), data=hashes)
        extras = {}
        if image_to_image:
            extras["image_to_image.onnx"] = _export_image_to_image(generator, folder, precision, opset, seed, geometry)
        manifest = Manifest(
            backend="onnx",
            backend_version=f"opset {opset}",
            precision=precision,
            geometry=geometry,
            profile=profile,
            graphs=graphs,
            model=about | (model or {}),
            options={"opset": opset, "torch": torch.__version__, "seed": seed if image_to_image else None},
            extras=extras,
        )
        if check:
            manifest = replace(manifest, parity=_parity(generator, manifest, folder, cases))
        manifest.save(folder)
    return manifest


def _weights_hash(generator: OneStepGenerator) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(generator.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy() if tensor.ndim else tensor.numpy().tobytes())
    return digest.hexdigest()


def _example(entry: Graph, geometry: Geometry, batch: int, rows: int, columns: int) -> list[torch.Tensor]:
    """Inputs of a graph for a tile of rows x columns multiples."""
    units = {"height": geometry.multiple, "width": geometry.multiple}
    units |= {f"latent_{side}": geometry.multiple // geometry.factor for side in ("height", "width")}
    counts = {"height": rows, "width": columns, "latent_height": rows, "latent_width": columns}
    generator = torch.Generator().manual_seed(batch * 100 + rows * 10 + columns)
    shapes = [(batch, int(t.shape[1]), *(units[str(d)] * counts[str(d)] for d in t.shape[2:])) for t in entry.inputs]
    return [torch.randn(shape, generator=generator).mul(0.5).clamp(-1, 1) for shape in shapes]


def _dynamic_shapes(entry: Graph, geometry: Geometry, profile: Profile) -> tuple[dict, ...] | None:
    if profile.static:
        return None
    batch = torch.export.Dim("batch", min=1, max=profile.batch[2])
    count = profile.tile[2] // geometry.multiple
    rows, columns = (torch.export.Dim(name, min=1, max=max(count, 2)) for name in ("rows", "columns"))
    pixels, latents = geometry.multiple, geometry.multiple // geometry.factor

    def dims(tensor: Tensor) -> dict:
        unit = pixels if tensor.shape[2] == "height" else latents
        return {0: batch, 2: unit * rows if unit > 1 else rows, 3: unit * columns if unit > 1 else columns}

    return tuple(dims(t) for t in entry.inputs)


def _export(module: nn.Module, entry: Graph, file: Path, geometry: Geometry, profile: Profile, opset: int) -> None:
    """Write one graph and check that its dynamic axes are what the descriptor says."""
    import onnx

    if profile.static:
        count = profile.tile[0] // geometry.multiple
        example = _example(entry, geometry, profile.batch[0], count, count)
    else:
        example = _example(entry, geometry, 2, 2, 3)
    names = [t.name for t in entry.inputs]
    save_graph(module, tuple(example), file, names, entry.output.name, _dynamic_shapes(entry, geometry, profile), opset)
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
    size = sum(p.numel() * p.element_size() for p in module.state_dict().values())
    program.save(file, external_data=size > _SINGLE_FILE)


def _export_image_to_image(
    generator: OneStepGenerator, folder: Path, precision: str, opset: int, seed: int, geometry: Geometry
) -> str:
    side = 256 // geometry.factor
    noise = torch.from_numpy(noise_field(seed, geometry.channels, (0, side), (0, side))[None].copy())
    module = fold.ImageToImage(generator, precision, noise, geometry.scale)
    height, width = (torch.export.Dim(name, min=2, max=1 << 13) for name in ("height", "width"))
    file = folder / "image_to_image.onnx"
    save_graph(module, (torch.rand(1, 3, 37, 50),), file, ["input"], "output", ({2: height, 3: width},), opset)
    return sha256(file)


# ---- parity


def _cases(
    generator: OneStepGenerator, geometry: Geometry, profile: Profile
) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    """Inputs and what the generator, not folded yet and in its own precision, makes of them, not clamped."""
    least = -(-profile.tile[0] // geometry.multiple)
    (_, entry), *_ = descriptors(generator, "fp32", split=False).values()
    for batch, rows, columns in _PARITY_SHAPES if not profile.static else ((profile.batch[0], 1, 1),):
        image, noise = _example(entry, geometry, batch, rows * least, columns * least)
        with torch.no_grad():
            yield [image, noise], generator.codec.decode(generator.predict(generator.encode(image), noise).x0)


def _parity(generator: OneStepGenerator, manifest: Manifest, folder: Path, cases: list) -> dict[str, Any]:
    """Compare the exported graphs with torch; bf16 compares torch's bf16, because ONNX Runtime has no bf16 Conv."""
    from engine.backends import Options
    from engine.backends.onnxruntime import OnnxRuntimeSession

    run: Any
    if manifest.precision == "bf16":
        against = "torch bf16 (ONNX Runtime's CPU has no bf16 convolution)"
        whole = fold.Whole(generator, "bf16")

        def run(image, noise):
            with torch.no_grad():
                return whole(torch.from_numpy(image), torch.from_numpy(noise)).numpy()
    else:
        import onnxruntime

        against = f"ONNX Runtime {onnxruntime.__version__}"
        options = Options(whole_batches=True)
        sessions = {n: OnnxRuntimeSession(manifest, n, *manifest.read(folder, n), options) for n in manifest.graphs}

        def run(image, noise):
            if "generator" in sessions:
                return sessions["generator"]({"image": image, "noise": noise})
            latent = sessions["encoder"]({"image": image})
            return sessions["decoder"]({"x0": sessions["unet"]({"latent": latent, "noise": noise})})

    worst, total, count = 0.0, 0.0, 0
    shapes = []
    for (image, noise), expected in cases:
        difference = np.abs(run(image.numpy(), noise.numpy()) - expected.float().numpy())
        worst = max(worst, float(difference.max()))
        total, count = total + float(difference.sum(dtype=np.float64)), count + difference.size
        shapes.append(list(image.shape))
    limit = TOLERANCE[manifest.precision]
    if not worst <= limit:
        raise RuntimeError(
            f"the export differs from torch by {worst:.2g} (at most {limit} is accepted): a fault, not kept"
        )
    return {"max_abs": worst, "mean_abs": total / count, "limit": limit, "shapes": shapes, "against": against}


def main() -> int:
    parser = cli.Parser(prog="python -m engine.export", description="Export a generator's folder to ONNX.")
    parser.add_argument("model", help="a diffusers folder, or hub:ORG/NAME")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS)
    parser.add_argument("--opset", type=int, default=23)
    parser.add_argument("--split", action="store_true", help="three graphs (encoder, unet, decoder) instead of one")
    parser.add_argument("--static", action="store_true", help="one batch and one tile size: a faster plan")
    parser.add_argument("--batch", type=int, default=1, help="usual batch")
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--tile", type=int, default=512, help="usual tile side, in output pixels")
    parser.add_argument("--max-tile", type=int, default=1024)
    parser.add_argument("--image-to-image", action="store_true", help="also one graph: picture in, picture out")
    parser.add_argument("--seed", type=int, default=0, help="of the noise inside --image-to-image")
    parser.add_argument("--no-check", action="store_true", help="skip the comparison with torch")
    parser.add_argument("--t-noise", type=int, help="override the folder's noise timestep")
    parser.add_argument("--t-diffusion", type=int, help="override the folder's diffusion timestep")
    options = parser.parse_args()
    if (Path(options.model) / "manifest.json").is_file():
        raise ValueError(
            f"{options.model}: this is an engine folder, not a generator; name the generator that it was exported from"
        )
    generator = OneStepGenerator.from_pretrained(options.model, options.t_noise, options.t_diffusion)
    geometry = geometry_of(generator)
    sizes = {k: options[k] for k in ("batch", "max_batch", "tile", "max_tile", "static")}
    manifest = export_generator(
        generator,
        Path(options.out),
        precision=options.precision,
        opset=options.opset,
        split=options.split,
        profile=profile_of(geometry, **sizes),
        image_to_image=options.image_to_image,
        seed=options.seed,
        check=not options.no_check,
        model={"name": Path(options.model).name},
    )
    from engine.info import describe

    print(describe(Path(options.out), manifest))
    return 0


def console() -> None:
    cli.run(main)


if __name__ == "__main__":
    console()
