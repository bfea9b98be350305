"""Builds: ONNX Runtime's optimised model, and real TensorRT-RTX plans without a GPU."""

import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from engine import Upscaler
from engine.build import __main__ as command
from engine.build import builder as build
from engine.build import tensorrt as plans
from engine.build.tensorrt import BuildOptions
from engine.export.generator import export_generator
from engine.io import cli
from engine.runtime import manifest as manifests
from engine.runtime.backends import tensorrt as trt_backend
from engine.runtime.manifest import FolderError, Profile
from engine.runtime.trust import built_here
from gdpo.generator import OneStepGenerator

SMALL = Profile((1, 1, 1), (64, 64, 64))
rtx = pytest.mark.skipif(
    not any(__import__("importlib.util").util.find_spec(n) for n in ("tensorrt_rtx", "tensorrt_rtx_bindings")),
    reason="the extra tensorrt-rtx is not installed",
)


def test_the_optimised_model_gives_the_same_picture(tiny_engine, photo, tmp_path):
    manifest, built = build.build(tiny_engine, tmp_path / "ort", "onnxruntime")
    assert built and manifest.backend == "onnxruntime" and manifest.source["generator"]
    rgb = np.ascontiguousarray(photo[:33, :60])
    ours, exported = (Upscaler.load(f).upscale(rgb, seed=2) for f in (tmp_path / "ort", tiny_engine))
    assert np.abs(ours.astype(int) - exported).max() <= 1


def test_stale_means_another_hash_option_or_version_not_a_file_that_exists(tiny_engine, tmp_path, monkeypatch):
    out = tmp_path / "ort"
    assert build.build(tiny_engine, out, "onnxruntime")[1]
    assert not build.build(tiny_engine, out, "onnxruntime")[1]
    assert build.build(tiny_engine, out, "onnxruntime", force=True)[1]
    (out / "generator.onnx").write_bytes(b"damaged")
    assert build.build(tiny_engine, out, "onnxruntime")[1]
    monkeypatch.setattr(build, "_version", lambda backend: "9.9.9")
    assert build.build(tiny_engine, out, "onnxruntime")[1]
    narrower = replace(manifests.load(tiny_engine).profile, tile=(64, 256, 512))
    assert build.build(tiny_engine, out, "onnxruntime", profile=narrower)[1]


@rtx
@pytest.mark.parametrize(
    ("precision", "static"),
    [
        ("fp32", False),
        ("fp16", True),
        pytest.param("fp32", True, marks=pytest.mark.slow),
        pytest.param("fp16", False, marks=pytest.mark.slow),
    ],
)
def test_a_tensorrt_rtx_plan_of_the_tiny_model(tiny_model, tiny_engine, tmp_path, precision, static):
    source = tiny_engine
    if static or precision != "fp32":
        source = tmp_path / "onnx"
        profile = SMALL if static else None
        export_generator(OneStepGenerator.from_pretrained(tiny_model), source, precision=precision, profile=profile)
    check_plan(source, tmp_path / "plan")


@rtx
@pytest.mark.slow
def test_a_tensorrt_rtx_plan_of_stable_diffusions_shape_fp32_dynamic(mini_dynamic_engine, tmp_path):
    """Its Attention layers have no fp32 kernel: they are decomposed."""
    check_plan(mini_dynamic_engine, tmp_path / "plan")


@rtx
@pytest.mark.slow
def test_a_tensorrt_rtx_plan_of_stable_diffusions_shape_fp16_static(mini_model, tmp_path):
    generator = OneStepGenerator.from_pretrained(mini_model)
    export_generator(generator, tmp_path / "onnx", precision="fp16", profile=SMALL)
    check_plan(tmp_path / "onnx", tmp_path / "plan")


@rtx
@pytest.mark.slow
@pytest.mark.parametrize("precision, static", [("fp32", True), ("fp16", False), ("bf16", False), ("bf16", True)])
def test_the_other_tensorrt_rtx_plans_of_stable_diffusions_shape(mini_model, tmp_path, precision, static):
    generator = OneStepGenerator.from_pretrained(mini_model)
    export_generator(generator, tmp_path / "onnx", precision=precision, profile=SMALL if static else None)
    check_plan(tmp_path / "onnx", tmp_path / "plan")


def check_plan(source, out):
    said = []
    profile = manifests.load(source).profile
    manifest, built = build.build(
        source,
        out,
        "tensorrt-rtx",
        profile=profile,
        options=BuildOptions(workspace_mib=8192, optimization_level=0),
        log=said.append,
    )
    assert built and manifest.backend_version == trt_backend.version("tensorrt-rtx")
    assert any("Building engine" in line for line in said)  # the phases are reported
    for name in manifest.graphs:
        plan, _ = manifest.read(out, name)
        assert len(plan) > 100_000 and built_here(manifest.graphs[name].sha256)
    assert not build.build(source, out, "tensorrt-rtx", profile=profile, options=BuildOptions(8192, 0))[1]
    assert build._up_to_date(out, manifest)
    assert not build._up_to_date(out, replace(manifest, backend_version="0"))
    with pytest.raises(RuntimeError, match="NVIDIA"):  # no GPU here, or none that the plan fits
        Upscaler.load(out)


@rtx
def test_a_plan_of_a_dynamic_export_is_for_its_usual_shape_alone(tiny_engine, tmp_path):
    manifest, _ = build.build(tiny_engine, tmp_path, "tensorrt-rtx", options=BuildOptions(8192, 0))
    assert manifest.profile == Profile((1, 1, 1), (512, 512, 512)) and (tmp_path / "generator.plan").is_file()


@pytest.mark.parametrize(
    "shapes, batch, tile",
    [
        ({}, (1, 1, 1), (512, 512, 512)),
        ({"opt": "image:4x3x256x256"}, (4, 4, 4), (256, 256, 256)),
        ({"max": "image:4x3x768x768"}, (1, 1, 4), (64, 512, 768)),
        ({"min": "image:1x3x128x128", "opt": "image:2x3x256x256"}, (1, 2, 8), (128, 256, 1024)),
    ],
)
def test_a_plan_is_for_a_range_where_its_ends_are_named(tiny_engine, shapes, batch, tile):
    options = SimpleNamespace(**{f"{end}_shapes": shapes.get(end) for end in ("min", "opt", "max")})
    exported = manifests.load(tiny_engine)
    assert command.profile_from(options, exported, "tensorrt") == Profile(batch, tile)
    if not shapes:
        assert command.profile_from(options, exported, "onnxruntime") == exported.profile


def broken_copy(folder, out):
    """The folder with an operator that nobody knows, hashed again."""
    import onnx

    from engine.io.files import sha256

    shutil.copytree(folder, out)
    model = onnx.load(out / "generator.onnx")
    model.graph.node[-1].op_type = "NoSuchOperator"
    onnx.save(model, out / "generator.onnx")
    manifest = manifests.load(out)
    graph = replace(manifest.graphs["generator"], sha256=sha256(out / "generator.onnx"))
    replace(manifest, graphs={"generator": graph}).save(out)
    return out


@rtx
def test_parse_errors_are_shown_whole(tiny_engine, tmp_path):
    broken = broken_copy(tiny_engine, tmp_path / "onnx")
    with pytest.raises(
        FolderError,
        match=r"cannot parse it: In node \d+ with name: \S+ and operator: NoSuchOperator .*Plugin not found",
    ):
        build.build(broken, tmp_path / "plan", "tensorrt-rtx")
    assert not (tmp_path / "plan").exists()


@rtx
def test_an_unknown_architecture_names_the_known_ones(tiny_engine, tmp_path):
    with pytest.raises(ValueError, match=r"architecture sm_1 is not one of this version's: sm_75"):
        build.build(tiny_engine, tmp_path / "x", "tensorrt-rtx", options=BuildOptions(architectures=("sm_1",)))


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["build", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.run(command.main)
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_the_command_builds_and_says_when_it_need_not(tiny_engine, tmp_path, monkeypatch, capsys):
    shapes = (
        "--min-shapes",
        "image:1x3x64x64",
        "--opt-shapes",
        "noise:2x48x64x64",
        "--max-shapes",
        "image:4x3x512x512",
    )
    arguments = (tiny_engine, "--backend", "onnxruntime", "--out", tmp_path / "out", *shapes)
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert code == 0 and "built" in err and "tiles of 64 to 512 (usually 256)" in out and "1 to 4 (usually 2)" in out
    assert "up to date" in run(monkeypatch, capsys, *arguments)[2]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--backend", "tensorrt"], "pip install 'gdpo-sr[tensorrt]'"),
        (
            ["--backend", "onnxruntime", "--max-shapes", "image:64x3x512x512"],
            "batch 1 to 64 is beyond what was exported",
        ),
        (
            ["--backend", "onnxruntime", "--max-shapes", "image:1x3x4096x4096"],
            "tile 64 to 4096 is beyond what was exported",
        ),
        (["--backend", "onnxruntime", "--opt-shapes", "image:1x3x500x500"], "tile sides must be multiples of 16"),
        (["--backend", "onnxruntime", "--opt-shapes", "picture:1x3x64x64"], "is not a shape such as"),
        (["--backend", "onnxruntime", "--min-shapes", "image:4x3x64x64"], "must rise"),
        (["--backend", "onnxruntime", "--timing-cache", "cache"], "timing_cache is for tensorrt"),
        (["--backend", "onnxruntime", "--workspace", "-5"], "workspace_mib: for tensorrt and tensorrt-rtx only"),
        (["--backend", "onnxruntime", "--refit", "--architecture", "sm_89"], "refit, architectures: for tensorrt and"),
        (["--backend", "tensorrt-rtx", "--workspace", "-5"], "workspace_mib must be at least 1; got -5"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(tiny_engine, tmp_path, monkeypatch, capsys, more, message):
    if "tensorrt" in more:
        monkeypatch.setitem(trt_backend._NAMES, "tensorrt", ("tensorrt_that_is_not_installed",))
    code, _, err = run(monkeypatch, capsys, tiny_engine, "--out", tmp_path / "out", *more)
    assert code == 2 and err.count("\n") == 1 and message in err


def test_bf16_is_refused_where_onnx_runtime_has_no_kernels(tiny_model, tmp_path, monkeypatch, capsys):
    generator, folder = OneStepGenerator.from_pretrained(tiny_model), tmp_path / "onnx"
    export_generator(generator, folder, precision="bf16", profile=SMALL)
    code, _, err = run(monkeypatch, capsys, folder, "--backend", "onnxruntime", "--out", tmp_path / "out")
    assert code == 2 and "no bf16 convolution on a CPU; take --backend openvino" in err and err.count("\n") == 1
    with pytest.raises(FolderError, match="no bf16 convolution on a CPU"):
        Upscaler.load(folder)
    rgb = np.zeros((20, 30, 3), np.uint8)
    assert Upscaler.load(folder, backend="openvino").upscale(rgb).shape == (80, 120, 3)  # the advice holds


def test_a_model_that_onnx_runtime_refuses_is_one_line(tiny_engine, tmp_path, monkeypatch, capsys):
    broken = broken_copy(tiny_engine, tmp_path / "onnx")
    code, _, err = run(monkeypatch, capsys, broken, "--backend", "onnxruntime", "--out", tmp_path / "out")
    assert code == 2 and "generator.onnx: ONNX Runtime refuses it" in err and err.count("\n") == 1


def test_without_a_gpu_the_default_is_onnx_runtime(monkeypatch):
    def no_driver(backend):
        raise RuntimeError("no NVIDIA driver on this machine")

    monkeypatch.setattr(command, "load_module", lambda backend: None)
    monkeypatch.setattr(command, "architecture_of", no_driver)
    assert command._default_backend() == "onnxruntime"
    monkeypatch.setattr(command, "architecture_of", lambda backend: "sm_90")
    assert command._default_backend() == "tensorrt"


@rtx
def test_the_options_reach_the_builder():
    """What cannot be built here (refit needs a GPU, version-compatible plans the lean runtime) is configured."""
    trt = trt_backend.load_module("tensorrt-rtx")
    builder = trt.Builder(trt_backend.logger(trt, []))
    for chosen in (BuildOptions(), BuildOptions(512, 1, refit=True, version_compatible=True)):
        config = builder.create_builder_config()
        plans._configure(trt, config, chosen)
        assert config.get_flag(trt.BuilderFlag.REFIT) == chosen.refit
        assert config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE) == chosen.version_compatible
        assert config.builder_optimization_level == chosen.optimization_level
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 512 << 20


def test_only_exported_folders_are_built(tiny_engine, tiny_model, tmp_path):
    build.build(tiny_engine, tmp_path / "ort", "onnxruntime")
    with pytest.raises(FolderError, match="is built for onnxruntime already"):
        build.build(tmp_path / "ort", tmp_path / "again", "onnxruntime")
    with pytest.raises(FolderError, match="this is a generator's folder"):
        build.build(tiny_model, tmp_path / "x", "onnxruntime")
    with pytest.raises(ValueError, match="out must be another folder"):
        build.build(tiny_engine, tiny_engine, "onnxruntime")
