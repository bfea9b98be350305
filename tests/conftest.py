"""Fixtures that several folders of tests share."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Triton reads this when it decorates a kernel: without a GPU its kernels run in the interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidiactl").exists() else "1")


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """shared(name, make): what make(path) makes, once for all workers of a run. Read only: copy it to change it."""
    root = tmp_path_factory.getbasetemp()
    if root.name.startswith("popen-"):  # a worker of pytest-xdist: its parent is the run's own folder
        root = root.parent

    def get(name: str, make: Callable[[Path], object]) -> Path:
        path, done = root / f"shared-{name}", root / f"shared-{name}.done"
        with open(root / f"shared-{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                make(path)
                done.touch()
        return path

    return get


@pytest.fixture(scope="session")
def mini_sd(shared) -> Path:
    """A miniature of Stable Diffusion 2.1-base, with random weights."""
    from gdpo.model.random_folder import build_folder

    return shared("mini-sd", build_folder)


@pytest.fixture(scope="session")
def mini_sd_taesd(shared) -> Path:
    """The same with an AutoencoderTiny in place of the AutoencoderKL."""
    from gdpo.model.random_folder import build_folder

    return shared("mini-sd-taesd", lambda out: build_folder(out, vae="taesd"))


@pytest.fixture(scope="session")
def crops(tmp_path_factory) -> Path:
    """Sixteen 96x96 crops of real photos."""
    import numpy as np
    from PIL import Image
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
def trained(crops, shared) -> Path:
    """A NAOSD model of the miniature preset, trained for a few steps: what GDPO starts from.

    Its head is stirred, so that the samples of a group differ by more than rounding, as a trained generator's do:
    rewards are compared within the group, and a comparison of equals turns rounding into a direction.
    """

    def make(out: Path) -> None:
        from gdpo.generator import OneStepGenerator
        from gdpo.randomness import normal
        from tests.support.training import NAOSD, train

        train(*NAOSD, f"--data.folder={crops}", f"--output_dir={out}", "--max_train_steps=6", "--train_batch_size=4")
        generator = OneStepGenerator.from_pretrained(out / "model")
        for i, parameter in enumerate(generator.unet.parameters()):
            parameter.data += 0.05 * normal(parameter.shape, 0, "stir", i)
        generator.save_pretrained(out / "model")

    return shared("trained", make) / "model"
