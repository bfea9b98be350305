"""The Upscaler: the same as torch, whole or in tiles, by seed; and what it refuses."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine import Upscaler
from engine.export import torch_backend as backend_torch
from engine.export.generator import export_generator
from engine.runtime import manifest as manifests
from engine.runtime import restore
from engine.runtime import upscaler as module
from engine.runtime.backends import Waiting
from engine.runtime.backends import openvino as openvino_backend
from engine.runtime.backends import tensorrt as trt_backend
from engine.runtime.backends.registry import BACKENDS
from engine.runtime.manifest import FolderError, Profile
from engine.runtime.upscaler import default_model, model_folder
from engine.serve.batches import SharedUpscaler
from engine.settings import Settings
from gdpo.generator import OneStepGenerator


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-12))


@pytest.mark.parametrize("name, tile", [("tiny", None), ("mini", 16)])
@pytest.mark.parametrize("shape", [(37, 50), (64, 64), (1, 1)])
def test_torch_and_the_engine_give_the_same_picture(name, tile, shape, request, photo):
    engine = request.getfixturevalue(f"{name}_engine")
    model = request.getfixturevalue(f"{name}_model")
    rgb = np.ascontiguousarray(photo[100 : 100 + shape[0], 200 : 200 + shape[1]])
    ours = Upscaler.load(engine).upscale(rgb, seed=11, tile=tile)
    theirs = Upscaler.load(model, backend="torch").upscale(rgb, seed=11, tile=tile)
    assert ours.shape == (4 * shape[0], 4 * shape[1], 3) and ours.dtype == np.uint8
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 1 and (difference == 0).mean() >= 0.99


def test_the_torch_backend_is_the_generators_own_method(tiny_model, photo):
    """Against the method written out here: resample, encode, noise, one step, decode, round."""
    from engine.runtime.noise import noise_field

    rgb = np.ascontiguousarray(photo[:64, :64])
    generator = OneStepGenerator.from_pretrained(tiny_model)
    lr = torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 255
    up = torch.nn.functional.interpolate(lr, (256, 256), mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1
    noise = torch.from_numpy(noise_field(4, 48, (0, 64), (0, 64)).copy())[None]
    with torch.no_grad():
        x0 = generator.predict(generator.encode(up), noise).x0
        expected = ((generator.decode(x0)[0] + 1) * 127.5).round().permute(1, 2, 0).numpy()
    ours = Upscaler.load(tiny_model, backend="torch").upscale(rgb, seed=4, color="none")
    assert np.abs(ours - expected).max() <= 1 and (ours == expected).mean() > 0.99
    assert psnr(ours, ((up[0] + 1) * 127.5).permute(1, 2, 0).numpy()) < 40  # the step does something


def test_a_seed_names_a_picture(tiny_engine, photo):
    up, rgb = Upscaler.load(tiny_engine), photo[:40, :40]
    first = up.upscale(rgb, seed=3)
    assert np.array_equal(first, up.upscale(rgb, seed=3)) and np.array_equal(
        first, Upscaler.load(tiny_engine).upscale(rgb, 3)
    )
    assert not np.array_equal(first, up.upscale(rgb, seed=4))


def smooth_seams(whole, tiled, lines, axis):
    """The difference along tile borders against the difference elsewhere, as mean absolute jumps."""
    jump = np.abs(np.diff((tiled.astype(float) - whole), axis=axis)).mean(axis=(1 - axis, 2))
    at = np.zeros(len(jump), bool)
    at[[line - 1 for line in lines]] = True
    return jump[at].max(), jump[~at].max()


@pytest.mark.parametrize("engine", ["tiny_engine", "tiny_split_engine"])
@pytest.mark.parametrize("color", ["adain", "wavelet", "none"])
def test_tiles_leave_no_seam(engine, color, request, photo):
    up = Upscaler.load(request.getfixturevalue(engine))
    rgb = np.ascontiguousarray(photo[:150, 100:290])
    whole = up.upscale(rgb, seed=2, color=color)
    tiled = up.upscale(rgb, seed=2, tile=64, color=color, batch=3)
    assert psnr(whole, tiled) > 45
    run = restore.Restorer(up.manifest, up.sessions, rgb, 2, 256, 3)
    assert len(run.rows.starts) > 2 and len(run.columns.starts) > 2
    for axis, line in ((0, run.rows), (1, run.columns)):
        borders = [s * 4 for s in line.starts[1:]] + [(s + line.tile) * 4 for s in line.starts[:-1]]
        at, elsewhere = smooth_seams(whole, tiled, borders, axis)
        assert at <= elsewhere + 1e-9


def test_tiles_without_a_common_noise_field_would_show(tiny_engine, photo, monkeypatch):
    """The planted fault of the test above: every tile draws its own noise."""
    up, rgb = Upscaler.load(tiny_engine, core=False), np.ascontiguousarray(photo[:150, 100:290])
    whole = up.upscale(rgb, seed=2)
    field = restore.noise_field
    monkeypatch.setattr(restore, "noise_field", lambda s, c, r, k: field(s, c, (0, r[1] - r[0]), (0, k[1] - k[0])))
    assert psnr(whole, up.upscale(rgb, seed=2, tile=64)) < 45


def test_three_graphs_are_one_graph(tiny_engine, tiny_split_engine, photo):
    one, three = (Upscaler.load(f).upscale(photo[:70, :90], seed=1) for f in (tiny_engine, tiny_split_engine))
    assert np.abs(one.astype(int) - three).max() <= 1 and (one == three).mean() > 0.99


def test_sixteen_bit_is_eight_bit_with_more_digits(tiny_engine, photo):
    up, rgb = Upscaler.load(tiny_engine), np.ascontiguousarray(photo[:40, :40])
    deep = up.upscale(rgb.astype(np.uint16) * 257, seed=1)
    assert deep.dtype == np.uint16
    assert np.abs(np.rint(deep / 257) - up.upscale(rgb, seed=1)).max() <= 1


@pytest.mark.parametrize("scale", [0.5, 1, 2.5, 3, 6])
def test_other_factors_resize_the_x4(tiny_engine, photo, scale):
    from engine.runtime.resample import resize

    up, rgb = Upscaler.load(tiny_engine), np.ascontiguousarray(photo[:40, :52])
    result = up.upscale(rgb, seed=1, scale=scale)
    size = (round(40 * scale), round(52 * scale))
    assert result.shape[:2] == size
    assert psnr(result, resize(up.upscale(rgb, seed=1), size)) > 45


def test_colours_are_aligned(tiny_engine, photo):
    up, rgb = Upscaler.load(tiny_engine), np.ascontiguousarray(photo[:64, :64])
    from engine.runtime.resample import resize

    target = resize(rgb, (256, 256)).astype(float)
    adain = up.upscale(rgb, color="adain").astype(float)
    assert np.abs(adain.mean((0, 1)) - target.mean((0, 1))).max() < 0.6
    plain = up.upscale(rgb, color="none").astype(float)
    assert np.abs(plain.mean((0, 1)) - target.mean((0, 1))).max() > 0.6


def bad(value):
    return pytest.param(value, id=str(value)[:40])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rgb": np.zeros((4, 4), np.uint8)}, r"rgb must be a numpy array \[H,W,3\]; got \(4, 4\)"),
        ({"rgb": np.zeros((0, 4, 3), np.uint8)}, "rgb must be"),
        ({"rgb": np.zeros((4, 4, 3), np.float32)}, "rgb must be uint8 or uint16; got float32"),
        ({"seed": -1}, "seed must be in"),
        ({"scale": 0}, "scale must be between"),
        ({"scale": float("nan")}, "scale must be between"),
        ({"scale": 64, "rgb": np.zeros((1000, 1000, 3), np.uint8)}, "megapixels"),
        ({"color": "sepia"}, "color must be one of adain, wavelet, none"),
        ({"tile": 8}, "tile must be 16 to 256 input pixels"),
        ({"tile": 1000}, "tile must be 16 to 256 input pixels"),
        ({"batch": 9}, "batch must be 1 to 8"),
    ],
)
def test_bad_arguments_are_named(tiny_engine, arguments, message):
    with pytest.raises(ValueError, match=message):
        Upscaler.load(tiny_engine).upscale(**{"rgb": np.zeros((8, 8, 3), np.uint8)} | arguments)


def test_a_value_that_is_not_finite_names_its_tile(tiny_engine, photo):
    up = Upscaler.load(tiny_engine, core=False)
    session, calls = up.sessions["generator"], []

    class Faulty(Waiting):
        def __call__(self, inputs):
            result = session(inputs).copy()
            calls.append(1)
            if len(calls) == 3:
                result[0, 1, 5, 5] = np.inf
            return result

    up.sessions["generator"] = Faulty()
    with pytest.raises(
        FloatingPointError, match=r"generator gave a value that is not finite in the tile at row 0, column"
    ):
        up.upscale(photo[:64, :150], tile=48)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_a_model_overflows_to_is_never_clipped_to_a_black_or_white_tile(tiny_model, photo, tmp_path, value):
    """Straight through a real export: OpenVINO's Clip makes -1 of a NaN, every Clip makes 1 of an infinity."""
    generator = OneStepGenerator.from_pretrained(tiny_model)
    with torch.no_grad():
        list(generator.unet.parameters())[-1][0] = value
    static = Profile((1, 1, 1), (64, 64, 64))
    export_generator(generator, tmp_path / "onnx", profile=static, check=False)
    for options in ({"core": False}, {"core": None}, {"backend": "openvino"}):
        with pytest.raises((FloatingPointError, RuntimeError), match=r"not finite in the tile at row 0, column 0"):
            Upscaler.load(tmp_path / "onnx", **options).upscale(photo[:8, :8])


@pytest.mark.parametrize("split", [False, True])
def test_a_static_batch_is_filled_up(tiny_model, tiny_engine, photo, tmp_path, split):
    """A row of tiles is seldom a multiple of the batch, and a small picture is one tile."""
    static = Profile((3, 3, 3), (128, 128, 128))
    generator = OneStepGenerator.from_pretrained(tiny_model)
    export_generator(generator, tmp_path / "onnx", profile=static, split=split)
    up, dynamic = Upscaler.load(tmp_path / "onnx", core=False), Upscaler.load(tiny_engine)
    seen = []
    rgb = np.ascontiguousarray(photo[:50, :110])
    ours = up.upscale(rgb, seed=3, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]  # places, not what fills up
    assert psnr(ours, dynamic.upscale(rgb, seed=3)) > 45
    assert up.upscale(rgb[:1, :1]).shape == (4, 4, 3)


def test_progress_counts_tiles_and_can_cancel(tiny_engine, photo):
    up, seen = Upscaler.load(tiny_engine), []
    up.upscale(photo[:100, :100], tile=64, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))] and len(seen) > 1

    def cancel(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        up.upscale(photo[:100, :100], tile=64, progress=cancel)


def test_a_batch_or_tile_beyond_the_profile_is_refused_by_the_session(tiny_engine):
    session = Upscaler.load(tiny_engine).sessions["generator"]
    image, noise = np.zeros((9, 3, 64, 64), np.float32), np.zeros((9, 48, 16, 16), np.float32)
    with pytest.raises(ValueError, match=r"a batch of 9 is beyond the profile \(1 to 8\)"):
        session({"image": image, "noise": noise})
    with pytest.raises(ValueError, match=r"multiples of 16 from 64 to 1024"):
        session({"image": image[:1, :, :40], "noise": noise[:1]})
    with pytest.raises(ValueError, match=r"noise must be float32 \[batch,48"):
        session({"image": image[:1], "noise": noise[:1, :4]})
    with pytest.raises(ValueError, match="inputs must be image, noise"):
        session({"image": image[:1]})


def test_a_batch_is_its_pictures_whole_or_one_at_a_time(tiny_engine):
    manifest, rng = manifests.load(tiny_engine), np.random.default_rng(0)
    inputs = {"image": rng.uniform(-1, 1, (3, 3, 64, 80)), "noise": rng.standard_normal((3, 48, 16, 20))}
    inputs = {name: array.astype(np.float32) for name, array in inputs.items()}
    apart, whole = (
        BACKENDS["onnxruntime"].open(tiny_engine, manifest, whole_batches=w)[1]["generator"] for w in (False, True)
    )
    expected = np.concatenate([whole({k: v[i : i + 1] for k, v in inputs.items()}).copy() for i in range(3)])
    assert np.array_equal(apart(inputs), expected)
    assert np.abs(whole(inputs) - expected).max() < 1e-5


def test_no_model_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHIPPED", tmp_path / "none")
    with pytest.raises(FolderError, match=r"is missing from this installation.*--model"):
        default_model()


def test_bundled_models_go_by_name_and_a_folder_of_that_name_first(tmp_path, monkeypatch, tiny_engine):
    monkeypatch.chdir(tmp_path)
    assert model_folder(None) == model_folder("tiny") == module.SHIPPED
    picture = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    tiny, faithful = (Upscaler.load(name).upscale(picture) for name in ("tiny", "faithful"))
    assert np.array_equal(Upscaler.load().upscale(picture), tiny) and not np.array_equal(tiny, faithful)
    with pytest.raises(FolderError, match="nonsense"):
        Upscaler.load("nonsense")
    (tmp_path / "tiny").mkdir()  # of photos, say
    assert model_folder("tiny") == module.SHIPPED
    (tmp_path / "faithful").symlink_to(tiny_engine)
    assert model_folder("faithful") == Path("faithful")


def test_a_backend_that_is_missing_names_its_extra(tiny_engine, tmp_path, monkeypatch):
    monkeypatch.setitem(trt_backend._NAMES, "tensorrt", ("tensorrt_that_is_not_installed",))
    with pytest.raises(
        RuntimeError, match=r"backend tensorrt is not installed here .*pip install 'gdpo-sr\[tensorrt\]"
    ):
        Upscaler.load(tiny_engine, backend="tensorrt")
    monkeypatch.setitem(trt_backend._NAMES, "tensorrt", ("types",))  # any module: it is installed
    with pytest.raises(
        FolderError, match=r"is for onnx, not tensorrt; build it: python -m engine.build .* --backend tensorrt"
    ):
        Upscaler.load(tiny_engine, backend="tensorrt")
    shutil.copytree(tiny_engine, tmp_path / "built")
    replace(manifests.load(tmp_path / "built"), backend="onnxruntime").save(tmp_path / "built")
    with pytest.raises(
        FolderError, match=r"is for onnxruntime; openvino runs folders as python -m engine.export writes"
    ):
        Upscaler.load(tmp_path / "built", backend="openvino")
    with pytest.raises(ValueError, match="backend must be auto"):
        Upscaler.load(tiny_engine, backend="tflite")
    with pytest.raises(RuntimeError, match="onnxruntime-gpu"):
        Upscaler.load(tiny_engine, device="cuda")
    with pytest.raises(ValueError, match="device must be cpu"):
        Upscaler.load(tiny_engine, device="tpu")


@pytest.mark.parametrize("bf16, limit", [(False, 1), (True, 8)])
def test_openvino_gives_the_same_picture(tiny_engine, photo, bf16, limit):
    pytest.importorskip("openvino")
    rgb = np.ascontiguousarray(photo[:48, :48])
    ours = Upscaler.load(tiny_engine, backend="openvino", precision="bf16" if bf16 else "auto").upscale(rgb, seed=5)
    assert np.abs(ours.astype(int) - Upscaler.load(tiny_engine).upscale(rgb, seed=5)).max() <= limit


@pytest.mark.parametrize(
    "able, options, expected",
    [
        (True, {}, ("openvino", "bf16")),
        (True, {"device": "cpu", "core": False}, ("openvino", "bf16")),
        (True, {"precision": "fp32"}, ("onnx", "fp32")),
        (True, {"backend": "onnx"}, ("onnx", "fp32")),
        (True, {"precision": "bf16"}, ("openvino", "bf16")),
        (False, {}, ("onnx", "fp32")),
    ],
)
def test_a_folder_for_bf16_is_run_in_it_where_the_cpu_can(tiny_engine, tmp_path, monkeypatch, able, options, expected):
    pytest.importorskip("openvino")
    folder = tmp_path / "model"
    shutil.copytree(tiny_engine, folder)
    manifest = manifests.load(folder)
    replace(manifest, options={**manifest.options, "on_cpu": "bf16"}).save(folder)
    monkeypatch.setattr(openvino_backend, "computes_bf16", lambda: able)
    up = Upscaler.load(folder, **options)
    assert (up.backend, up.precision) == expected
    assert Settings().recipe(up, "model")["precision"] == expected[1]
    assert SharedUpscaler(Upscaler.load(folder, **options | {"core": False})).precision == expected[1]
    assert not module._is_for_bf16(manifests.load(folder), "cuda")


@pytest.mark.parametrize("capabilities, able", [(["FP32", "BF16"], True), (["FP32"], False), (None, False)])
def test_whether_openvino_computes_in_bf16_is_asked_of_it(monkeypatch, capabilities, able):
    def asked(device, name):
        if capabilities is None:
            raise RuntimeError('Device with "CPU" name is not registered')
        return {("CPU", "OPTIMIZATION_CAPABILITIES"): capabilities}[device, name]

    fake = SimpleNamespace(Core=lambda: SimpleNamespace(get_property=asked))
    monkeypatch.setitem(sys.modules, "openvino", fake)
    assert openvino_backend.computes_bf16.__wrapped__() is able
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert openvino_backend.computes_bf16.__wrapped__() is False


def test_openvino_has_the_property_that_it_is_asked_for():
    openvino = pytest.importorskip("openvino")
    assert "FP32" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_openvino_leaves_the_cores_to_the_system(tiny_engine):
    """Pinned, the processes of engine.bulk would share one."""
    pytest.importorskip("openvino")
    up = Upscaler.load(tiny_engine, backend="openvino", threads=1)
    assert not up.sessions["generator"].compiled.get_property("ENABLE_CPU_PINNING")


def test_a_generator_in_memory_runs(tiny_model, photo):
    manifest, session = backend_torch.from_generator(OneStepGenerator.from_pretrained(tiny_model))
    result = Upscaler(manifest, {"generator": session}, "torch").upscale(photo[:20, :20], seed=1)
    assert np.array_equal(result, Upscaler.load(tiny_model, backend="torch").upscale(photo[:20, :20], seed=1))
