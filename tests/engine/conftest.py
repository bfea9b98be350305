"""Models and pictures of the engine's tests. Exports are made once for all workers of a run."""

import fcntl
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


def shared(tmp_path_factory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first worker makes and the others wait for."""
    root = tmp_path_factory.getbasetemp()
    if root.name.startswith("popen-"):  # a worker of pytest-xdist: its parent is the run's own folder
        root = root.parent
    folder, done = root / f"engine-{name}", root / f"engine-{name}.done"
    with open(root / f"engine-{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A generator's folder of the tiny preset whose step is not the identity."""

    def make(folder: Path) -> None:
        import torch

        from gdpo.generator import OneStepGenerator
        from gdpo.model.tiny import TinyUNetConfig

        config = TinyUNetConfig(block_out_channels=(16, 24, 32), head_channels=(16, 8))
        generator = OneStepGenerator.tiny(config, seed=1)
        random = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in generator.parameters():
                p.add_(torch.randn(p.shape, generator=random) * 0.055)
        generator.save_pretrained(folder)

    return shared(tmp_path_factory, "tiny-model", make)


def export(model: Path, out: Path, **options) -> None:
    from engine.export.generator import export_generator
    from gdpo.generator import OneStepGenerator

    export_generator(OneStepGenerator.from_pretrained(model), out, **options)


@pytest.fixture(scope="session")
def tiny_engine(tmp_path_factory, tiny_model) -> Path:
    """The tiny model exported as one dynamic graph, with the image-to-image graph."""
    return shared(tmp_path_factory, "tiny", lambda out: export(tiny_model, out, image_to_image=True))


@pytest.fixture(scope="session")
def tiny_split_engine(tmp_path_factory, tiny_model) -> Path:
    """The tiny model exported as encoder, UNet and decoder."""
    return shared(tmp_path_factory, "tiny-split", lambda out: export(tiny_model, out, split=True))


@pytest.fixture(scope="session")
def mini_model(tmp_path_factory) -> Path:
    """The miniature Stable Diffusion, one for all workers."""
    from gdpo.model.random_folder import build_folder

    return shared(tmp_path_factory, "mini-model", lambda out: build_folder(out))


@pytest.fixture(scope="session")
def mini_engine(tmp_path_factory, mini_model) -> Path:
    """The miniature Stable Diffusion exported as three dynamic graphs."""
    return shared(tmp_path_factory, "mini", lambda out: export(mini_model, out, split=True))


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """A real photo, [512,512,3] uint8."""
    from skimage import data

    return data.astronaut()


@pytest.fixture(autouse=True)
def own_plans(tmp_path, monkeypatch):
    """Plans that tests build are not written into the user's list."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def run(tiny_engine, monkeypatch, capsys):
    """Run the command in this process: (exit code, stdout, stderr)."""

    from engine import upscale

    def call(*arguments, model=True):
        extra = ["--model", str(tiny_engine), "--no-progress"] if model else []
        monkeypatch.setattr(sys, "argv", ["upscale", *map(str, arguments), *extra])
        previous = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as end:
                upscale.console()
        finally:
            signal.signal(signal.SIGTERM, previous)
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call
