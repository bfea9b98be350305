"""Nothing unhashed reaches a backend: mutants, foreign files, links, untrusted plans."""

import contextlib
import errno
import hashlib
import importlib.util
import io
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine import Upscaler, info
from engine.io import cli
from engine.runtime import manifest as manifests
from engine.runtime.backends import onnxruntime as ort_backend
from engine.runtime.backends import tensorrt as trt_backend
from engine.runtime.manifest import FolderError
from engine.runtime.trust import remember_plan
from tests.support.folders import model, write_folder


@pytest.fixture
def folder(tiny_engine, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_engine, tmp_path / "engine"))


def rewrite(folder: Path, change) -> None:
    """Change the manifest and hash it again, as an attacker would."""
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    data = json.dumps(content).encode()
    (folder / "manifest.json").write_bytes(data)
    (folder / "manifest.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  manifest.json\n")


def test_a_folder_round_trips_and_describes_itself(folder, capsys):
    manifest = manifests.load(folder)
    manifest.save(folder)
    assert manifests.load(folder) == manifest
    text = info.describe(folder, manifest)
    for part in ("onnx opset 23, fp32", "t_noise: 60", "max_abs", "as in the manifest", "image_to_image.onnx"):
        assert part in text
    (folder / "generator.onnx").write_bytes(b"x")
    assert "NOT USABLE" in info.describe(folder, manifest)


def mutants(folder: Path, name: str, count: int, seed: int):
    """Put `count` mutants of a file in its place, one after another."""
    original, rng = (folder / name).read_bytes(), random.Random(seed)
    for _ in range(count):
        data = bytearray(original)
        kind = rng.randrange(4)
        at = rng.randrange(len(data))
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
        else:
            data[at : at + 8] = rng.randbytes(8)
        if bytes(data) != original:
            (folder / name).write_bytes(data)
            yield data
    (folder / name).write_bytes(original)


@pytest.mark.parametrize("count", [120, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["generator.onnx", "manifest.json", "manifest.sha256", "generator.plan"])
def test_no_mutant_reaches_a_backend(folder, name, count, monkeypatch):
    """Each file's mutants, a third of the count; a plan stands in for ONNX where a plan is meant."""
    if name == "generator.plan":
        (folder / name).write_bytes(random.Random(0).randbytes(10_000))

        def to_plan(content):
            graph = content["graphs"]["generator"]
            graph |= {"file": name, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
            content["backend"] = "tensorrt-rtx"

        rewrite(folder, to_plan)
    reached = []
    monkeypatch.setattr(ort_backend, "OnnxRuntimeSession", lambda *a, **k: reached.append(a))
    monkeypatch.setattr(trt_backend, "load_module", lambda *a: reached.append(a))
    tried = 0
    for _ in mutants(folder, name, count // 3, seed=1):
        tried += 1
        with pytest.raises((FolderError, ValueError)):
            Upscaler.load(folder, trust_plan=True, core=False)  # the C++ path: tests/csrc
        assert not reached
    assert tried > count // 4
    if name != "generator.plan":  # the untouched folder does reach it: the watch works
        with contextlib.suppress(AttributeError):  # there is no session to try
            Upscaler.load(folder, core=False)
        assert reached


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(format=2), "its format is 2"),
        (lambda m: m.pop("geometry"), "not a manifest"),
        (lambda m: m.update(backend="tflite"), "backend must be one of"),
        (lambda m: m.update(resampler="nearest"), "made for another resampler"),
        (lambda m: m["noise"].update(table="0" * 64), "made for another noise"),
        (lambda m: m["graphs"].update(x=m["graphs"]["generator"]), "graphs must be generator, or"),
        (lambda m: m["graphs"]["generator"].update(file="../../etc/passwd"), "not a plain file name"),
        (lambda m: m["graphs"]["generator"].update(file="/etc/passwd"), "not a plain file name"),
        (lambda m: m["graphs"]["generator"].update(file=".hidden"), "not a plain file name"),
        (lambda m: m["graphs"]["generator"].update(data={"../x": "0" * 64}), "not a plain file name"),
        (lambda m: m["graphs"]["generator"].update(sha256="0"), "not a SHA-256"),
        (lambda m: m.update(extras={"../../etc/passwd": "0" * 64}), "not a plain file name"),
        (lambda m: m.update(extras={"x.onnx": 5}), "not a SHA-256"),
        (lambda m: m["geometry"].update(factor=0), "geometry.factor must be 1 to 64; got 0"),
        (lambda m: m["geometry"].update(scale=10**9), "geometry.scale must be 1 to 16; got 1000000000"),
        (lambda m: m["geometry"].update(channels=True), "geometry.channels must be 1 to 4096; got true"),
        (lambda m: m["geometry"].update(overlap=1e400), "Infinity is not a number in JSON"),
        (lambda m: m["geometry"].update(factor=7), "must be a multiple of factor"),
        (lambda m: m["geometry"].update(depth=7), 'geometry has an unknown "depth"'),
        (lambda m: m.update(geometry=[1, 2]), "geometry must be an object"),
        (lambda m: m["profile"].update(tile=[512, 64, 1024]), "must rise"),
        (lambda m: m["profile"].update(tile=[64, 100, 1024]), "must be multiples of"),
        (lambda m: m["profile"].update(tile=[64, 64, 1 << 17]), "profile.tile must be 1 to 65536; got 131072"),
        (lambda m: m["profile"].update(batch=[1, 1]), "profile.batch must be three numbers"),
        (lambda m: m["profile"].update(batch=[1, 1, 10**6]), "profile.batch must be 1 to 1024"),
        (lambda m: m.update(surprise=1), "not a manifest"),
        (lambda m: m.update(options=[]), "options must be an object"),
        (
            lambda m: m.update(model={"a": [[[[[[[[[]]]]]]]]]} | {"b": eval("[" * 40 + "]" * 40)}),
            "nested deeper than 32",
        ),
        (lambda m: m.update(precision="fp8"), "precision must be one of fp32, fp16, bf16"),
        (lambda m: m.update(precision=None), "precision must be one of"),
        (lambda m: m.update(backend_version=3), "backend_version must be a line of text"),
        (lambda m: m.update(architecture="sm\n90"), "architecture must be a line of text"),
        (lambda m: m.update(source={"generator": "x"}), "not a SHA-256"),
        (lambda m: m["graphs"].update(generator=3), "graphs.generator must be an object"),
        (lambda m: m["graphs"]["generator"].update(inputs={}), "inputs must be a list"),
        (lambda m: m["graphs"]["generator"]["inputs"].pop(), "must be image and noise; got 1 inputs"),
        (
            lambda m: m["graphs"]["generator"]["inputs"].reverse(),
            r"input of generator must be image \[batch,3,height,width",
        ),
        (
            lambda m: m["graphs"]["generator"]["inputs"][1]["shape"].pop(),
            r"input of generator must be noise \[batch,48",
        ),
        (lambda m: m["graphs"]["generator"]["inputs"][1]["shape"].__setitem__(1, 4), r"must be noise \[batch,48"),
        (lambda m: m["graphs"]["generator"]["output"].update(shape="abcd"), "shape must be a list"),
        (lambda m: m["graphs"]["generator"]["output"].update(shape=[1, 3, 64, 64]), r"must be output \[batch,3,height"),
        (lambda m: m["graphs"]["generator"]["output"].update(dtype=["float32"]), "dtype must be one of"),
        (lambda m: m["graphs"]["generator"].update(file="manifest.json"), "files of their own"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused_with_the_reason(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(FolderError, match=message):
        Upscaler.load(folder)


def values(content, path=()):
    """Every place in a manifest."""
    yield path
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        if isinstance(value, (dict, list)):
            yield from values(value, (*path, key))
        else:
            yield (*path, key)


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_manifest_changed_together_with_its_hash_fails_in_load_or_describes_the_same_graph(folder, count):
    """Whatever well-formed JSON is put anywhere: one line, or a manifest whose numbers still fit."""
    original, rng = (folder / "manifest.json").read_text(), random.Random(5)
    whole = json.loads(original)
    places = [p for p in values(whole) if p]
    strange = (
        None,
        True,
        False,
        0,
        -1,
        10**30,
        0.5,
        1e308,
        "",
        "x",
        "a\nb",
        "\ud800",
        [],
        {},
        [[]],
        {"": None},
        [1, 2, 3],
    )
    refused = 0
    for _ in range(count):
        content, place, value = json.loads(original), rng.choice(places), rng.choice(strange)
        inside = content
        for key in place[:-1]:
            inside = inside[key]
        if rng.random() < 0.2:
            del inside[place[-1]]
        else:
            inside[place[-1]] = value
        rewrite(folder, lambda m, content=content: (m.clear(), m.update(content)))
        try:
            manifest = manifests.load(folder)
        except FolderError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 600
        else:
            assert place[0] in ("model", "parity", "options", "extras", "source", "backend_version", "architecture",
                                "profile", "geometry", "graphs"), place  # fmt: skip
            assert 1 <= manifest.geometry.scale <= 16 and manifest.profile.tile[2] % manifest.geometry.multiple == 0
            info.describe(folder, manifest)
        rewrite(folder, lambda m: (m.clear(), m.update(whole)))
    assert refused > count // 4
    manifests.load(folder)


def test_deep_and_large_manifests_are_refused(folder):
    for content in (b"[" * 100_000, b"{}" + b" " * (1 << 21), b'{"format": NaN}', b"\xff\xfe"):
        (folder / "manifest.json").write_bytes(content)
        (folder / "manifest.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  manifest.json\n")
        with pytest.raises(FolderError):
            manifests.load(folder)


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path):
    os.replace(folder / "generator.onnx", tmp_path / "elsewhere.onnx")
    os.symlink(tmp_path / "elsewhere.onnx", folder / "generator.onnx")
    with pytest.raises(FolderError, match="not a regular file"):
        Upscaler.load(folder)


def test_the_onnx_of_another_model_is_refused(folder, tiny_split_engine):
    shutil.copy(tiny_split_engine / "unet.onnx", folder / "generator.onnx")
    with pytest.raises(FolderError, match=r"generator\.onnx: its SHA-256 .* stale, damaged or of another model"):
        Upscaler.load(folder)
    # Even hashed again, its inputs are not what the manifest says.
    digest = hashlib.sha256((folder / "generator.onnx").read_bytes()).hexdigest()
    rewrite(folder, lambda m: m["graphs"]["generator"].update(sha256=digest))
    with pytest.raises(FolderError, match="inputs are latent, noise"):
        Upscaler.load(folder)


@pytest.mark.parametrize("core", [False, True])
def test_a_graph_whose_output_is_fixed_where_the_manifest_says_it_is_free_is_refused(tmp_path, core):
    import onnx

    if core and importlib.util.find_spec("engine._core") is None:
        pytest.skip("the compiled core is not built")
    made = onnx.load_model_from_string(model())
    made.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    with pytest.raises(FolderError, match=r"inputs are image, noise, outputs output, not what the manifest says"):
        Upscaler.load(write_folder(tmp_path / "fixed", made.SerializeToString()), core=core)
    assert Upscaler.load(write_folder(tmp_path / "free", model()), core=core)


def test_onnx_that_reads_files_outside_is_refused(folder, tmp_path):
    """A hostile model, hashed correctly, whose weights are 'in' a file outside the folder."""
    import onnx
    from onnx import TensorProto, helper

    (tmp_path / "secret").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="../secret")
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in ("image", "noise", "output")]
    nodes = [helper.make_node("Add", ["image", "noise"], ["x"]), helper.make_node("Add", ["x", "w"], ["output"])]
    graph = helper.make_graph(nodes, "g", value[:2], value[2:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, folder / "generator.onnx")
    digest = hashlib.sha256((folder / "generator.onnx").read_bytes()).hexdigest()
    rewrite(folder, lambda m: m["graphs"]["generator"].update(sha256=digest))
    with pytest.raises(FolderError, match="ONNX Runtime refuses it"):
        Upscaler.load(folder)


def test_a_folder_that_is_none_says_what_it_is(tmp_path, tiny_model):
    with pytest.raises(FolderError, match="no such folder"):
        Upscaler.load(tmp_path / "none")
    with pytest.raises(FolderError, match="this folder is empty"):
        Upscaler.load(tmp_path)
    with pytest.raises(FolderError, match=r"a generator.s folder, .*: python -m engine\.export"):
        Upscaler.load(tiny_model)


def plan_folder(folder: Path, **changes) -> bytes:
    plan = b"not a plan, but hashed"
    (folder / "generator.plan").write_bytes(plan)

    def change(content):
        entry = content["graphs"]["generator"]
        entry |= {"file": "generator.plan", "sha256": hashlib.sha256(plan).hexdigest()}
        content.update({"backend": "tensorrt-rtx", "backend_version": "1.7.1.116"} | changes)

    rewrite(folder, change)
    return plan


def test_a_plan_that_this_user_did_not_build_is_refused_before_tensorrt(folder, monkeypatch):
    plan = plan_folder(folder)
    monkeypatch.setattr(trt_backend, "load_module", lambda backend: pytest.fail("TensorRT was asked"))
    with pytest.raises(FolderError, match="--trust-plan"):
        Upscaler.load(folder)
    remember_plan(hashlib.sha256(plan).hexdigest())
    ledger = Path(os.environ["XDG_DATA_HOME"]) / "gdpo-sr" / "plans.txt"
    assert ledger.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(trt_backend, "load_module", lambda backend: (_ for _ in ()).throw(RuntimeError("asked")))
    with pytest.raises(RuntimeError, match="asked"):
        Upscaler.load(folder)


class FakeModule:
    __version__ = "1.7.1.116"


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"backend_version": "1.6.0"},
            r"built by tensorrt-rtx 1\.6\.0, here is 1\.7\.1\.116; build it again: python -m",
        ),
        ({"architecture": "sm_80"}, "built for sm_80, this GPU is sm_90; build it again"),
    ],
)
def test_a_plan_of_another_version_or_gpu_is_refused_with_the_command(folder, monkeypatch, changes, message):
    class Sm90:
        def __init__(self, index):
            pass

        def architecture(self):
            return "sm_90"

    plan_folder(folder, **changes)
    monkeypatch.setattr(trt_backend, "load_module", lambda backend: FakeModule)
    monkeypatch.setattr(trt_backend, "Driver", Sm90)
    with pytest.raises(FolderError, match=message):
        Upscaler.load(folder, trust_plan=True)


def test_an_optimised_model_of_another_onnx_runtime_is_stale(folder):
    rewrite(folder, lambda m: m.update(backend="onnxruntime", backend_version="1.2.3"))
    with pytest.raises(
        FolderError, match=r"optimised by ONNX Runtime 1\.2\.3, here is .*build it again: python -m engine"
    ):
        Upscaler.load(folder)


def test_info_prints_json_and_text(folder, capsys, monkeypatch):
    for arguments in ([str(folder)], [str(folder), "--json"]):
        monkeypatch.setattr("sys.argv", ["info", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.run(info.main)
        assert end.value.code == 0
    out = capsys.readouterr().out
    assert json.loads(out[out.index("\n{") :])["format"] == 1


def test_info_of_a_damaged_folder_is_a_failure(folder, capsys, monkeypatch):
    next(folder.glob("*.onnx")).write_bytes(b"x")
    monkeypatch.setattr("sys.argv", ["info", str(folder)])
    with pytest.raises(SystemExit) as end:
        cli.run(info.main)
    assert end.value.code == 1 and "NOT USABLE" in capsys.readouterr().out


def test_a_disk_that_cannot_be_read_names_the_file(folder, monkeypatch):
    class Broken(io.FileIO):
        def read(self, size=-1):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(manifests, "open", Broken, raising=False)
    with pytest.raises(OSError, match="Input/output error") as caught:
        Upscaler.load(folder)
    assert caught.value.filename == str(folder / "manifest.json")
