"""Check that an exported folder computes what torch computes, before the export is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.export import graphs
from engine.export.descriptors import descriptors, example_inputs
from engine.runtime.backends.registry import BACKENDS
from engine.runtime.manifest import Geometry, Manifest, Profile
from engine.runtime.pipeline import Pipeline
from gdpo.generator import OneStepGenerator

# The greatest difference from torch in fp32, of values in [-1,1], that an export may show.
TOLERANCE = {"fp32": 2e-4, "fp16": 0.1, "bf16": 0.5}
_PARITY_SHAPES = ((1, 1, 1), (2, 1, 2), (3, 2, 1), (4, 1, 1), (1, 2, 3), (2, 3, 2))  # batch, rows, columns of the least


def parity_cases(
    generator: OneStepGenerator, geometry: Geometry, profile: Profile
) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    """Inputs and what the generator, not folded yet and in its own precision, makes of them, not clamped."""
    least = -(-profile.tile[0] // geometry.multiple)
    (_, entry), *_ = descriptors(generator, "fp32", split=False).values()
    for batch, rows, columns in _PARITY_SHAPES if not profile.static else ((profile.batch[0], 1, 1),):
        image, noise = example_inputs(entry, geometry, batch, rows * least, columns * least)
        with torch.no_grad():
            yield [image, noise], generator.codec.decode(generator.predict(generator.encode(image), noise).x0)


def measure_parity(generator: OneStepGenerator, manifest: Manifest, folder: Path, cases: list) -> dict[str, Any]:
    """Compare the exported graphs with torch; bf16 compares torch's bf16, because ONNX Runtime has no bf16 Conv."""
    run: Callable[[np.ndarray, np.ndarray], np.ndarray]
    if manifest.precision == "bf16":
        against = "torch bf16 (ONNX Runtime's CPU has no bf16 convolution)"
        whole = graphs.Whole(generator, "bf16")

        def run(image: np.ndarray, noise: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return whole(torch.from_numpy(image), torch.from_numpy(noise)).numpy()
    else:
        import onnxruntime

        against = f"ONNX Runtime {onnxruntime.__version__}"
        run = Pipeline(BACKENDS["onnx"].open(folder, manifest, whole_batches=True)[1])

    worst, total, count = 0.0, 0.0, 0
    shapes = []
    for (image, noise), expected in cases:
        difference = np.abs(run(image.numpy(), noise.numpy()) - expected.float().numpy())
        if not np.isfinite(difference).all():
            whose = "the export" if expected.isfinite().all() else "the model itself"
            raise RuntimeError(f"{whose} gives values that are not finite (NaN or too large for {manifest.precision})")
        worst = max(worst, float(difference.max()))
        total, count = total + float(difference.sum(dtype=np.float64)), count + difference.size
        shapes.append(list(image.shape))
    limit = TOLERANCE[manifest.precision]
    if not worst <= limit:
        raise RuntimeError(
            f"the export differs from torch by {worst:.2g} (at most {limit} is accepted): a fault, not kept"
        )
    return {"max_abs": worst, "mean_abs": total / count, "limit": limit, "shapes": shapes, "against": against}
