"""Models and pictures of the engine's tests."""

import signal
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def tiny_model(shared) -> Path:
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

    return shared("tiny-model", make)


def export(model: Path, out: Path, **options) -> None:
    from engine.export.generator import export_generator
    from gdpo.generator import OneStepGenerator

    export_generator(OneStepGenerator.from_pretrained(model), out, **options)


@pytest.fixture(scope="session")
def tiny_engine(shared, tiny_model) -> Path:
    """The tiny model exported as one dynamic graph, with the image-to-image graph."""
    return shared("tiny", lambda out: export(tiny_model, out, image_to_image=True))


@pytest.fixture(scope="session")
def tiny_split_engine(shared, tiny_model) -> Path:
    """The tiny model exported as encoder, UNet and decoder."""
    return shared("tiny-split", lambda out: export(tiny_model, out, split=True))


@pytest.fixture(scope="session")
def mini_model(mini_sd) -> Path:
    """The miniature Stable Diffusion."""
    return mini_sd


@pytest.fixture(scope="session")
def mini_engine(shared, mini_model) -> Path:
    """The miniature Stable Diffusion exported as three graphs of one shape: a third of the time of dynamic ones."""
    from engine.runtime.manifest import Profile

    return shared("mini", lambda out: export(mini_model, out, split=True, profile=Profile((1, 1, 1), (64, 64, 64))))


@pytest.fixture(scope="session")
def mini_dynamic_engine(shared, mini_model) -> Path:
    """The same as three dynamic graphs; for slow tests."""
    return shared("mini-dynamic", lambda out: export(mini_model, out, split=True))


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
