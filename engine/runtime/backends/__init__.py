"""Sessions: one graph on one backend; see `registry` for the backends."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from engine.runtime.manifest import Geometry, Graph, Manifest


class Session(Protocol):
    """One loaded graph. One thread uses it at a time.

    Attributes:
        at_once: how many batches may be under way; 1 where the work is done by whoever waits for it.
    """

    at_once: int

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run it. The result may be overwritten by the next call."""
        ...

    def start(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], np.ndarray]:
        """Begin a batch and return what waits for its result."""
        ...


class Waiting(ABC):
    """Base of sessions without a background: a batch that was started runs when its result is asked for."""

    at_once = 1

    @abstractmethod
    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray: ...

    def start(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], np.ndarray]:
        return functools.partial(self, inputs)


def check_inputs(entry: Graph, manifest: Manifest, inputs: Mapping[str, np.ndarray]) -> None:
    """Refuse what a graph was not made for, before a backend fails deep inside.

    Raises:
        ValueError: a wrong name, type, rank, channel count, batch or tile side.
    """
    expected = {t.name: t for t in entry.inputs}
    if inputs.keys() != expected.keys():
        raise ValueError(f"inputs must be {', '.join(expected)}; got {', '.join(inputs)}")
    geometry, profile = manifest.geometry, manifest.profile
    for name, array in inputs.items():
        tensor = expected[name]
        if array.dtype != np.float32 or array.ndim != len(tensor.shape) or array.shape[1] != tensor.shape[1]:
            shape = ",".join(map(str, tensor.shape))
            raise ValueError(f"{name} must be float32 [{shape}]; got {array.dtype} {array.shape}")
        if not profile.batch[0] <= len(array) <= profile.batch[2]:
            low, _, high = profile.batch
            raise ValueError(
                f"a batch of {len(array)} is beyond the profile ({low} to {high}); build it with --max-batch"
            )
        unit = 1 if tensor.shape[2] == "height" else geometry.factor
        for side in array.shape[2:]:
            if not profile.tile[0] <= side * unit <= profile.tile[2] or side * unit % geometry.multiple:
                low, _, high = profile.tile
                raise ValueError(
                    f"{name} has a side of {side * unit} output pixels; the profile takes multiples of "
                    f"{geometry.multiple} from {low} to {high}"
                )


def output_shape(entry: Graph, geometry: Geometry, inputs: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    """The shape of a graph's output for inputs that `check_inputs` let pass."""
    first = entry.inputs[0]
    batch, _, height, width = inputs[first.name].shape
    unit = geometry.factor
    if first.shape[2] == "height":
        height, width = height // unit, width // unit
    sizes = {"batch": batch, "latent_height": height, "latent_width": width}
    sizes |= {"height": height * unit, "width": width * unit}
    return tuple(sizes[d] if isinstance(d, str) else d for d in entry.output.shape)
