"""engine.Upscaler on its two paths: C++ (csrc/, engine._core) and Python give the same bytes."""

import numpy as np
import pytest

from engine import Upscaler
from engine.runtime import core

pytest.importorskip("engine._core", reason="engine._core was not built (GDPO_BUILD_CSRC=1 shows why)")


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    """Real photos, not of the model's multiples; the last one is gray."""
    from skimage import data

    gray = np.repeat(data.camera()[100:170, 200:280, None], 3, axis=2)
    return [data.astronaut()[60:151, 120:241], data.coffee()[90:187, 200:333], data.chelsea()[40:160, 80:180], gray]


@pytest.mark.parametrize("engine", ["tiny_engine", "tiny_split_engine"])
@pytest.mark.parametrize(
    "options", [{}, {"tile": 48, "batch": 3}, {"tile": 48, "color": "adain"}, {"scale": 3, "color": "none"}], ids=str
)
def test_pictures_have_the_same_bytes(engine, options, request, photos):
    folder = request.getfixturevalue(engine)
    cpp, python = Upscaler.load(folder, core=True), Upscaler.load(folder, core=False)
    assert (cpp.path, python.path) == ("C++", "Python")
    for seed, rgb in enumerate(photos):
        assert np.array_equal(cpp.upscale(rgb, seed, **options), python.upscale(rgb, seed, **options))


@pytest.mark.parametrize("options", [{}, {"tile": 32}, {"scale": 2.5}, {"scale": 7, "color": "adain"}], ids=str)
def test_charts_have_the_same_bytes(tiny_engine, options):
    """What is flat is limited: at its borders, at the picture's and with samples that differ by one and two levels."""
    y, x = np.mgrid[0:61, 0:83]
    chart = np.stack([(x // 20) * 60 + (x % 20 == 9), 255 - (y // 15) * 80, (x + y) // 9 % 2 * 255], 2).astype(np.uint8)
    cpp, python = Upscaler.load(tiny_engine, core=True), Upscaler.load(tiny_engine, core=False)
    for rgb in (chart, chart.astype(np.uint16) * 257, chart[:1], chart[:, :1], chart[::2, ::-1]):
        assert np.array_equal(cpp.upscale(rgb, 1, **options), python.upscale(rgb, 1, **options))


@pytest.mark.parametrize("split", [False, True])
def test_a_static_batch_is_filled_up_with_the_same_bytes(tiny_model, photos, tmp_path, split):
    from engine.export.generator import export_generator
    from engine.runtime.manifest import Profile
    from gdpo.generator import OneStepGenerator

    static, generator = Profile((3, 3, 3), (128, 128, 128)), OneStepGenerator.from_pretrained(tiny_model)
    export_generator(generator, tmp_path, profile=static, split=split, check=False)
    cpp, python = Upscaler.load(tmp_path, core=True), Upscaler.load(tmp_path, core=False)
    for rgb in (photos[0], photos[1][:50, :110], photos[2][:1, :1]):  # rows of 4 tiles, of 5 and of one
        assert np.array_equal(cpp.upscale(rgb, 3), python.upscale(rgb, 3))


def test_the_cpp_path_is_taken_where_it_can_run_the_folder(tiny_engine, tiny_model, monkeypatch):
    assert Upscaler.load(tiny_engine).path == "C++"
    assert Upscaler.load(tiny_engine, backend="openvino").path == "Python"
    with pytest.raises(RuntimeError, match="it runs onnx and onnxruntime, not openvino"):
        Upscaler.load(tiny_engine, backend="openvino", core=True)
    with pytest.raises(RuntimeError, match="not torch"):
        Upscaler.load(tiny_model, backend="torch", core=True)
    monkeypatch.setattr(core, "library", lambda: None)
    assert Upscaler.load(tiny_engine).path == "Python"
    with pytest.raises(RuntimeError, match="no libonnxruntime"):
        Upscaler.load(tiny_engine, core=True)
