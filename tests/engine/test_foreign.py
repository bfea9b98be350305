"""A path that is not an engine folder: one line says what it is and how to get one; Python and C++ say the same."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from engine import Upscaler
from engine.runtime import manifest as manifests
from engine.runtime.manifest import FolderError, check_target


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")


@pytest.fixture
def paths(tmp_path) -> Path:
    for run in ("run", "finished"):
        put(tmp_path, f"{run}/metrics.jsonl", f"{run}/config.json")
        put(
            tmp_path,
            *(f"{run}/checkpoint-0000020/{n}" for n in ("manifest.json", "state.json", "trainable.safetensors")),
        )
    put(tmp_path, "finished/model/unet/config.json")
    put(tmp_path, "generator/model_index.json", "generator/unet/config.json")
    put(tmp_path, "engine/manifest.json", "engine/manifest.sha256", "engine/generator.onnx")
    put(tmp_path, "x4.pth", "x4.SAFETENSORS", "model.onnx", "other/manifest.json")
    (tmp_path / "empty").mkdir()
    return tmp_path


MERGE = r"python -m gdpo\.merge {}/run/checkpoint-0000020 --out MODEL; .*python -m engine\.export MODEL --out DIR$"
SAID = {
    "run/checkpoint-0000020": "this is a checkpoint of a training run.*" + MERGE,
    "run/checkpoint-0000020/trainable.safetensors": "this is a checkpoint of a training run.*" + MERGE,
    "run": r"a training run.*gdpo\.merge {}/run/checkpoint-N --out MODEL; then python -m engine\.export MODEL",
    "finished": r"folder of a training run.*: python -m engine\.export {}/finished/model --out DIR$",
    "generator": r"a generator's folder.*: python -m engine\.export {}/generator --out DIR; .*engine\.build DIR",
    "x4.pth": r"this is a file.*python -m gdpo\.convert {}/x4\.pth --out MODEL; .*python -m engine\.export MODEL",
    "x4.SAFETENSORS": r"this is a file.*python -m gdpo\.convert {}/x4\.SAFETENSORS --out MODEL",
    "model.onnx": r"this is a file, not an engine folder; one is made by python -m engine\.export$",
    "engine/generator.onnx": r"this is a file of an engine folder; name the folder: {}/engine$",
    "other": r"no manifest\.json with its manifest\.sha256 in it, so it is not an engine folder",
    "empty": "this folder is empty; an engine folder is made by",
    "none": "no such folder; an engine folder is made by",
}


@pytest.mark.parametrize("name", SAID)
def test_each_kind_of_path_says_what_it_is(paths, name):
    with pytest.raises(FolderError, match=SAID[name].format(paths)) as python:
        manifests.load(paths / name)
    assert str(python.value).startswith(str(paths)) and "\n" not in str(python.value)
    if importlib.util.find_spec("engine._core") is None:
        pytest.skip("the compiled core is not built")
    from engine._core import Upscaler as Core

    with pytest.raises(FolderError) as cpp:
        Core(str(paths / name))
    assert str(cpp.value) == str(python.value)


@pytest.mark.parametrize("name", ["hub:org/name", ""])
def test_a_name_on_the_hub_and_an_empty_one(name):
    expected = {
        "hub:org/name": r"a model on the Hub .* python -m engine\.export hub:org/name --out DIR",
        "": "the model's name is empty",
    }
    with pytest.raises(FolderError, match=expected[name]) as python:
        Upscaler.load(name, core=False)
    if importlib.util.find_spec("engine._core"):
        from engine._core import Upscaler as Core

        with pytest.raises(FolderError) as cpp:
            Core(name)
        assert str(cpp.value) == str(python.value)


def test_a_word_that_names_no_bundled_model_lists_those(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FolderError, match=r"tinny: no such folder, and no bundled model .* \(there are tiny, quality, faithful\)"
    ):
        Upscaler.load("tinny")
    (tmp_path / "photos").mkdir()
    with pytest.raises(FolderError, match="photos: this folder is empty"):
        Upscaler.load("photos")


def test_the_command_says_so_in_one_line(paths):
    checkpoint, picture = paths / "run" / "checkpoint-0000020", paths / "in.png"
    picture.write_bytes(b"not read")
    command = [sys.executable, "-m", "engine.upscale", picture, paths / "out.png", "--model", checkpoint]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not (paths / "out.png").exists()
    assert done.stderr.startswith(f"error: {checkpoint}: this is a checkpoint") and done.stderr.count("\n") == 1


def test_a_checkpoint_is_never_replaced_by_an_engine_folder(paths):
    with pytest.raises(FolderError, match="exists and is not an engine folder, so it will not be replaced"):
        check_target(paths / "run" / "checkpoint-0000020")
    check_target(paths / "engine")
    check_target(paths / "empty")
