"""Fixtures that several folders of tests share."""

import os
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
def mini_sd(tmp_path_factory) -> Path:
    """A miniature of Stable Diffusion 2.1-base, with random weights. Read only: copy it to change it."""
    from gdpo.model.random_folder import build_folder

    return build_folder(tmp_path_factory.mktemp("models") / "mini-sd")


@pytest.fixture(scope="session")
def mini_sd_taesd(tmp_path_factory) -> Path:
    """The same with an AutoencoderTiny in place of the AutoencoderKL."""
    from gdpo.model.random_folder import build_folder

    return build_folder(tmp_path_factory.mktemp("models") / "mini-sd-taesd", vae="taesd")
