"""INT8 folders: what is quantized, that the gate looks, and that every path runs them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from engine import Upscaler
from engine.build import __main__ as command
from engine.build import builder, int8
from engine.io import cli
from engine.io.images import Picture, write_image
from engine.runtime.upscaler import SHIPPED


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    rng, found = np.random.default_rng(0), []
    for i in range(4):
        y, x = np.mgrid[0:72, 0:80]
        waves = 127 + 90 * np.sin((x * (i + 1) + y * (4 - i)) / 17)[..., None] * [1.0, 0.7, -0.4]
        found.append((waves + rng.normal(0, 6, waves.shape)).clip(0, 255).astype(np.uint8))
    return found


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, pictures):
    out = tmp_path_factory.mktemp("int8") / "model"
    manifest, built = builder.build(SHIPPED, out, "onnxruntime", precision="int8", calibration=pictures)
    assert built
    return out, manifest


def test_the_manifest_says_what_was_quantized_and_how_far_it_is(quantized):
    out, manifest = quantized
    assert manifest.options["precision"] == "int8" and manifest.backend == "onnx"
    assert manifest.parity["int8_mean_db"] >= int8.MEAN_DB
    assert manifest.parity["int8_worst_levels"] <= int8.WORST_LEVELS
    graph = onnx.load(str(out / manifest.graphs["generator"].file)).graph
    made = {node.output[0]: node.op_type for node in graph.node}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    in_int8 = [node for node in convolutions if made.get(node.input[1]) == "DequantizeLinear"]
    assert 0 < len(in_int8) == len(convolutions) - manifest.parity["int8_convolutions_in_float"]


def test_every_path_runs_it_and_the_picture_is_that_of_fp32_within_the_gate(quantized, pictures):
    out, _ = quantized
    rgb = pictures[2][:40, :48]
    wanted = Upscaler.load(SHIPPED).upscale(rgb, seed=3).astype(int)
    in_cpp, in_python = (Upscaler.load(out, core=core).upscale(rgb, seed=3).astype(int) for core in (True, False))
    assert np.abs(in_cpp - in_python).max() <= 1
    assert np.abs(in_cpp - wanted).max() > 0 and np.percentile(np.abs(in_cpp - wanted), 99.9) <= 2 * int8.WORST_LEVELS


def test_it_is_stale_when_the_pictures_are_others(quantized, pictures, tmp_path):
    out, _ = quantized
    assert not builder.build(SHIPPED, out, "onnxruntime", precision="int8", calibration=pictures)[1]
    assert int8.fingerprint(pictures) != int8.fingerprint(pictures[::-1])


def test_a_gate_that_nothing_passes_refuses_with_its_figures(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "MEAN_DB", 98.0)
    few = int8.convolutions(SHIPPED / "generator.onnx")
    monkeypatch.setattr(int8, "convolutions", lambda file: (few[0] + few[1][4:], few[1][:4]))
    with pytest.raises(ValueError, match=r"differ too much from fp32 \(\d+\.\d dB in the mean.*more varied pictures"):
        builder.build(SHIPPED, tmp_path / "out", "onnxruntime", precision="int8", calibration=pictures)
    assert not (tmp_path / "out").exists()


def test_bad_use_is_one_line(pictures, tmp_path, monkeypatch, capsys):
    def line(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["engine.build", str(SHIPPED), "--out", str(tmp_path / "o"), *arguments])
        with pytest.raises(SystemExit) as left:
            cli.run(command.main)
        assert left.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "needs --calibration DIR" in line("--precision=int8")
    assert "--calibration is for --precision int8" in line("--calibration=x")
    (tmp_path / "few").mkdir()
    for i, picture in enumerate(pictures[:3]):
        write_image(tmp_path / "few" / f"{i}.png", Picture(picture))
    assert "at least 4 calibration pictures; got 3" in line("--precision=int8", f"--calibration={tmp_path / 'few'}")
    assert "int8 is for backend onnxruntime" in line(
        "--precision=int8", f"--calibration={tmp_path / 'few'}", "--backend=tensorrt-rtx"
    )
