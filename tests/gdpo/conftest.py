"""Crops of real photos, and a model trained on them for a few steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training import NAOSD, train


@pytest.fixture(scope="session")
def crops(tmp_path_factory) -> Path:
    """Sixteen 96x96 crops of real photos."""
    from skimage import data

    folder = tmp_path_factory.mktemp("crops")
    photos = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    rng = np.random.default_rng(0)
    for i in range(16):
        photo = photos[i % 4]
        y, x = rng.integers(0, photo.shape[0] - 96), rng.integers(0, photo.shape[1] - 96)
        Image.fromarray(photo[y : y + 96, x : x + 96]).save(folder / f"crop{i:02d}.png")
    return folder


@pytest.fixture(scope="session")
def trained(crops, tmp_path_factory) -> Path:
    """A NAOSD model of the miniature preset, trained for a few steps: what GDPO starts from."""
    out = tmp_path_factory.mktemp("naosd") / "run"
    train(*NAOSD, f"--data.folder={crops}", f"--output_dir={out}", "--max_train_steps=6", "--train_batch_size=4")
    return out / "model"
