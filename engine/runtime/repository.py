"""How an engine folder lies in a model repository of Triton Inference Server.

A model for each graph: engine.build.triton writes them, engine.runtime.backends.triton asks the server for them.
"""

from __future__ import annotations

from engine.runtime.manifest import Geometry, Profile, Tensor

NAME = "gdpo_sr"  # of the model, unless another is given
MANIFEST = "gdpo_manifest"  # the parameter in config.pbtxt that holds the folder's manifest


def model_name(name: str, graph: str) -> str:
    """What the server calls a graph of the model `name`."""
    return name if graph == "generator" else f"{name}_{graph}"


def batched(profile: Profile) -> bool:
    """Whether the server may join batches: they have no fixed size."""
    return profile.batch[0] < profile.batch[2]


def dims(tensor: Tensor, geometry: Geometry, profile: Profile) -> list[int]:
    """A tensor's shape in config.pbtxt, for the usual tile; where the server joins batches, without the batch."""
    side, batch = profile.tile[1], profile.batch[1]
    latent = side // geometry.factor
    sizes = {"batch": batch, "height": side, "width": side, "latent_height": latent, "latent_width": latent}
    shape = [sizes[d] if isinstance(d, str) else d for d in tensor.shape]
    return shape[1:] if batched(profile) else shape
