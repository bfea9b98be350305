"""Fixtures that several folders of tests share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def mini_sd(tmp_path_factory) -> Path:
    """A miniature of Stable Diffusion 2.1-base, with random weights. Read only: copy it to change it."""
    from benchmarks.random_folder import build_folder

    return build_folder(tmp_path_factory.mktemp("models") / "mini-sd")


@pytest.fixture(scope="session")
def mini_sd_taesd(tmp_path_factory) -> Path:
    """The same with an AutoencoderTiny in place of the AutoencoderKL."""
    from benchmarks.random_folder import build_folder

    return build_folder(tmp_path_factory.mktemp("models") / "mini-sd-taesd", vae="taesd")
