"""Pictures as files."""

from pathlib import Path

import numpy as np

from engine.io.images import Picture, write_image


def save(path: Path, pixels: np.ndarray, **more) -> Path:
    """Write [H,W,3] pixels, with what else a Picture has, and make the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, Picture(np.ascontiguousarray(pixels), **more))
    return path
