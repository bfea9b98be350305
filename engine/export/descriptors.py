"""Descriptors of exported graphs: names, axes, geometry and profile, in one place."""

from __future__ import annotations

import torch
from torch import nn

from engine.export import graphs
from engine.runtime.manifest import Geometry, Graph, Profile, Tensor
from gdpo.generator import OneStepGenerator


def descriptors(generator: OneStepGenerator, precision: str, split: bool) -> dict[str, tuple[nn.Module, Graph]]:
    """The graphs to export, by name: the module, and its tensors' names, types and dynamic axes."""
    channels = generator.codec.channels
    picture = ("batch", 3, "height", "width")
    field = ("batch", channels, "latent_height", "latent_width")
    image, output = Tensor("image", picture), Tensor("output", picture)
    latent, noise, x0 = (Tensor(name, field) for name in ("latent", "noise", "x0"))
    if not split:
        return {"generator": (graphs.Whole(generator, precision), Graph("generator.onnx", "", (image, noise), output))}
    return {
        "encoder": (graphs.Encoder(generator, precision), Graph("encoder.onnx", "", (image,), latent)),
        "unet": (graphs.step_of(generator, precision), Graph("unet.onnx", "", (latent, noise), x0)),
        "decoder": (graphs.Decoder(generator, precision), Graph("decoder.onnx", "", (x0,), output)),
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


def example_inputs(entry: Graph, geometry: Geometry, batch: int, rows: int, columns: int) -> list[torch.Tensor]:
    """Inputs of a graph for a tile of rows x columns multiples."""
    units = {"height": geometry.multiple, "width": geometry.multiple}
    units |= {f"latent_{side}": geometry.multiple // geometry.factor for side in ("height", "width")}
    counts = {"height": rows, "width": columns, "latent_height": rows, "latent_width": columns}
    generator = torch.Generator().manual_seed(batch * 100 + rows * 10 + columns)
    shapes = [(batch, int(t.shape[1]), *(units[str(d)] * counts[str(d)] for d in t.shape[2:])) for t in entry.inputs]
    return [torch.randn(shape, generator=generator).mul(0.5).clamp(-1, 1) for shape in shapes]


def dynamic_shapes(entry: Graph, geometry: Geometry, profile: Profile) -> tuple[dict, ...] | None:
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
