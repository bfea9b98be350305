"""Crops of real photos, and a model trained on them for a few steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gdpo.generator import OneStepGenerator
from gdpo.randomness import normal
from tests.support.training import NAOSD, train


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
    """A NAOSD model of the miniature preset, trained for a few steps: what GDPO starts from.

    Its head is stirred, so that the samples of a group differ by more than rounding, as a trained generator's do:
    rewards are compared within the group, and a comparison of equals turns rounding into a direction.
    """
    out = tmp_path_factory.mktemp("naosd") / "run"
    train(*NAOSD, f"--data.folder={crops}", f"--output_dir={out}", "--max_train_steps=6", "--train_batch_size=4")
    generator = OneStepGenerator.from_pretrained(out / "model")
    for i, parameter in enumerate(generator.unet.parameters()):
        parameter.data += 0.05 * normal(parameter.shape, 0, "stir", i)
    generator.save_pretrained(out / "model")
    return out / "model"
