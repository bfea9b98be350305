"""A model repository of Triton Inference Server, and the client: the command line's bytes from a server's model."""

import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from skimage import data

pytest.importorskip("tritonclient.grpc", reason="the extra tritonclient is not installed")

from engine import Upscaler
from engine.build import __main__ as build
from engine.build import builder
from engine.build.triton import config, write_repository
from engine.io import cli
from engine.runtime import manifest as manifests
from engine.runtime.backends.registry import BACKENDS
from engine.runtime.manifest import FolderError, Profile
from engine.runtime.repository import MANIFEST
from tests.support.folders import model, write_folder
from tests.support.service import ROOT
from tests.support.triton_server import TritonStandIn, read_config

TILE = Profile((1, 2, 8), (128, 128, 128))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("triton") / "onnx", model())


@pytest.fixture(scope="module")
def same(tmp_path_factory) -> Path:
    """The same model with the repository's tile, for the command line."""
    return write_folder(tmp_path_factory.mktemp("triton") / "fixed", model(), profile=TILE)


@pytest.fixture
def repository(folder, tmp_path) -> Path:
    write_repository(folder, tmp_path / "models", "gdpo_sr", TILE)
    return tmp_path / "models"


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.fromarray(data.astronaut()[90:160, 150:250]).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def upscale(*arguments: object) -> tuple[int, str]:
    command = [sys.executable, "-m", "engine.upscale", "--no-progress", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def test_the_command_line_gives_the_same_bytes_through_a_server(repository, same, photo, tmp_path):
    options = ("--seed", 7, "--scale", 3)
    assert upscale(photo, tmp_path / "here.png", "--model", same, *options) == (0, "")
    with TritonStandIn(repository) as server:
        there = (photo, tmp_path / "there.png", "--backend", "triton", "--url", server.url, *options)
        server.delay = 0.3
        assert upscale(*there) == (0, "")
        assert server.most > 1 and max(server.batches) == 2  # tiles were under way together
        made = server.batches.copy()
        code, stderr = upscale(*there)  # known from its manifest: finished
        assert code == 0 and "1 skipped" in stderr and server.batches == made
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()


@pytest.mark.parametrize("batch", [(1, 1, 8), (3, 3, 3)])
def test_a_split_folder_is_three_models_of_the_same_picture(tiny_model, tiny_split_engine, photo, tmp_path, batch):
    from engine.export.generator import export_generator
    from gdpo.generator import OneStepGenerator

    profile, source = Profile(batch, (128, 128, 128)), tiny_split_engine
    if batch[0] == batch[2]:  # an export of one shape
        source = tmp_path / "onnx"
        generator = OneStepGenerator.from_pretrained(tiny_model)
        export_generator(generator, source, split=True, profile=profile, check=False)
    models = write_repository(source, tmp_path / "models", "sr", profile)
    assert [path.name for path in models] == ["sr_encoder", "sr_unet", "sr_decoder"]
    rgb = np.asarray(Image.open(photo))
    with TritonStandIn(tmp_path / "models") as server:
        ours = Upscaler.load("sr", "triton", url=server.url).upscale(rgb, seed=3)
    manifest = replace(manifests.load(source), profile=profile)
    here = Upscaler(*BACKENDS["onnx"].open(source, manifest), "onnx").upscale(rgb, seed=3)
    # Its kernels may differ between batches of one and of three.
    assert np.abs(ours.astype(int) - here).max() <= (0 if batch == (1, 1, 8) else 1)


def test_the_configuration_is_what_the_server_reads(repository, folder):
    found = read_config(repository / "gdpo_sr")
    assert (found.name, found.backend, found.max_batch_size) == ("gdpo_sr", "onnxruntime", 8)
    assert {t.name: list(t.dims) for t in found.input} == {"image": [3, 128, 128], "noise": [48, 32, 32]}
    assert {t.name: list(t.dims) for t in found.output} == {"output": [3, 128, 128]}
    assert found.HasField("dynamic_batching") and [g.count for g in found.instance_group] == [1]
    shown = manifests.parse(found.parameters[MANIFEST].string_value.encode())
    assert shown == replace(manifests.load(folder), profile=TILE)
    session = onnxruntime.InferenceSession(repository / "gdpo_sr" / "1" / "model.onnx")
    assert {i.name for i in session.get_inputs()} == {"image", "noise"}


def test_a_plan_is_a_model_of_the_tensorrt_backend(folder):
    manifest = replace(manifests.load(folder), backend="tensorrt", profile=Profile((4, 4, 4), (64, 64, 64)))
    text = config("sr", manifest, manifest.graphs["generator"])
    assert 'backend: "tensorrt"' in text and "KIND_GPU" in text
    assert "max_batch_size: 0" in text and "dims: [4, 3, 64, 64]" in text and "dynamic_batching {" not in text


def test_the_build_command(folder, tmp_path, monkeypatch, capsys):
    built = []

    def plan(source, out, backend, *, profile, **options):  # a plan needs a GPU
        built.append((backend, profile))
        write_folder(out, b"plan", profile=profile)
        manifest = manifests.load(out)
        replace(manifest, backend="tensorrt").save(out)

    monkeypatch.setattr(build, "build", plan)

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["build", str(folder), *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.run(build.main)
        return end.value.code, capsys.readouterr().err

    models = tmp_path / "models"
    assert run("--triton-repository", models, "--backend", "onnxruntime", "--opt-shapes", "image:2x3x256x256")[0] == 0
    assert list(read_config(models / "gdpo_sr").input[0].dims) == [3, 256, 256]
    assert (models / "gdpo_sr" / "1" / "model.onnx").read_bytes() == (folder / "generator.onnx").read_bytes()
    named = ("--triton-repository", models, "--triton-name", "trt", "--backend", "tensorrt")
    assert run(*named)[0] == 0
    assert built == [("tensorrt", Profile((1, 1, 8), (512, 512, 512)))]
    assert (models / "trt" / "1" / "model.plan").read_bytes() == b"plan"
    assert read_config(models / "trt").backend == "tensorrt"
    assert sorted(path.name for path in models.iterdir()) == ["gdpo_sr", "trt"]

    (models / "other").mkdir()
    (models / "other" / "config.pbtxt").write_text('name: "other"')
    for arguments, message in (
        (("--backend", "onnxruntime"), "give a folder to write"),
        (("--triton-repository", models, "--backend", "tensorrt-rtx"), "not of tensorrt-rtx"),
        (("--triton-repository", models, "--backend", "onnxruntime", "--triton-name", "a/b"), "got 'a/b'"),
        (("--triton-repository", models, "--backend", "onnxruntime", "--triton-name", "other"), "will not be replaced"),
    ):
        code, stderr = run(*arguments)
        assert code == 2 and message in stderr and stderr.count("\n") == 1, stderr
    assert (models / "other" / "config.pbtxt").read_text() == 'name: "other"'


def test_a_model_that_is_written_again_leaves_nothing_of_the_old_one(folder, tiny_split_engine, tmp_path):
    write_repository(tiny_split_engine, tmp_path, "sr", Profile((1, 1, 8), (128, 128, 128)))
    write_repository(folder, tmp_path, "sr", TILE)
    assert [path.name for path in tmp_path.iterdir()] == ["sr"]


def test_only_what_was_exported_is_written(folder, tmp_path):
    with pytest.raises(ValueError, match="beyond what was exported"):
        write_repository(folder, tmp_path, "sr", Profile((1, 1, 8), (2048, 2048, 2048)))
    builder.build(folder, tmp_path / "ort", "onnxruntime")
    with pytest.raises(FolderError, match="is built for onnxruntime"):
        write_repository(tmp_path / "ort", tmp_path / "models", "sr", TILE)


def failure(photo: Path, url: str, *options: object) -> str:
    code, stderr = upscale(photo, photo.with_name("out.png"), "--backend", "triton", "--url", url, *options)
    assert code == 2 and stderr.count("\n") == 1 and stderr.startswith("error: "), stderr
    return stderr


def test_bad_input_is_one_line(repository, photo):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert "no Triton Inference Server answers" in failure(photo, f"127.0.0.1:{port}")
    assert "url must be HOST:PORT" in failure(photo, "http://localhost:8001")
    code, stderr = upscale(photo, photo.with_name("out.png"), "--backend", "triton")
    assert code == 2 and "--url HOST:PORT" in stderr
    code, stderr = upscale(photo, photo.with_name("out.png"), "--url", "localhost:8001")
    assert code == 2 and "backend triton goes with url" in stderr
    with TritonStandIn(repository) as server:
        assert "no model other is ready there; ready: gdpo_sr" in failure(photo, server.url, "--model", "other")
        assert "the server's choice" in failure(photo, server.url, "--device", "cuda")
        assert "timeout must be more than 0" in failure(photo, server.url, "--timeout", 0)
        server.configs["gdpo_sr"].input[0].dims[1] = 64
        assert "image [3,64,128] and noise [48,32,32], its manifest says image [3,128,128]" in failure(
            photo, server.url
        )
        server.configs["gdpo_sr"].max_batch_size = 0
        assert "has max_batch_size 0" in failure(photo, server.url)
        del server.configs["gdpo_sr"].parameters[MANIFEST]
        assert "was not written by engine.build" in failure(photo, server.url)


def test_what_goes_wrong_with_a_picture_is_named_and_leaves_no_file(repository, photo):
    def reason(*options: object) -> str:
        out = photo.with_name("out.png")
        code, stderr = upscale(photo, out, "--backend", "triton", "--url", server.url, *options)
        assert code == 1 and not out.exists()
        return stderr.splitlines()[-1]

    with TritonStandIn(repository) as server:
        server.crop = 1
        assert "photo.png: " in reason() and "must answer output float32 (2, 3, 128, 128)" in reason()
        server.crop, server.delay = 0, 3.0
        assert "no answer within 0.5 seconds" in reason("--timeout", 0.5)


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "engine.runtime.backends.triton", raising=False)
    monkeypatch.setitem(sys.modules, "tritonclient", None)
    with pytest.raises(RuntimeError, match=r"pip install 'gdpo-sr\[tritonclient\]'"):
        Upscaler.load(backend="triton", url="localhost:8001")


def test_a_smaller_max_batch_size_is_kept(repository, photo):
    with TritonStandIn(repository) as server:
        server.configs["gdpo_sr"].max_batch_size = 1
        up = Upscaler.load(backend="triton", url=server.url)
        up.upscale(np.asarray(Image.open(photo)))
        assert set(server.batches) == {1} and up.manifest.profile.batch == (1, 1, 1)
