"""The manifest of an engine folder: what is in it, what it was made from, and whether it may be loaded.

A folder holds one file per graph, `manifest.json`, and `manifest.sha256` (the hash of the manifest's bytes, in the
format of sha256sum). Nothing reaches a backend whose bytes do not have the hash that the manifest names, and files are
read once: what was hashed is what is loaded. A TensorRT plan is executable code, so besides its hash it must be in this
user's list of plans built here, or be trusted explicitly.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.io.files import atomic_write
from engine.runtime import noise, resample

FORMAT = 1
BACKENDS = ("onnx", "onnxruntime", "tensorrt", "tensorrt-rtx")  # "onnx": as exported, run by ONNX Runtime
PLANS = ("tensorrt", "tensorrt-rtx")
_MAX_BYTES = 1 << 20  # of a manifest
_MAX_MODEL_BYTES = 1 << 36
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_DTYPES = ("float32", "float16")


class FolderError(ValueError):
    """An engine folder that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Tensor:
    """An input or output of a graph. A dimension is a number or one of batch, height, width (of the picture),
    latent_height, latent_width."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Graph:
    """One model file with its inputs and its output; `data` are files with weights beside it: name -> SHA-256."""

    file: str
    sha256: str
    inputs: tuple[Tensor, ...]
    output: Tensor
    data: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """Least, usual and largest batch and tile side (in output pixels) that the graphs accept."""

    batch: tuple[int, int, int] = (1, 1, 8)
    tile: tuple[int, int, int] = (64, 512, 1024)

    @property
    def static(self) -> bool:
        """Whether the tile side is one number."""
        return self.tile[0] == self.tile[2]


@dataclass(frozen=True)
class Geometry:
    """How pictures relate to latents.

    Attributes:
        scale: output pixels for each input pixel.
        factor: output pixels for each latent pixel.
        channels: of a latent, and of the noise.
        multiple: sides of a tile are multiples of this, in output pixels.
        overlap: of neighbouring tiles, in output pixels.
    """

    scale: int
    factor: int
    channels: int
    multiple: int
    overlap: int


@dataclass(frozen=True)
class Manifest:
    """Everything a run time needs to know about a folder; see the fields' own types.

    Attributes:
        graphs: "generator" (image, noise -> output), or "encoder" (image -> latent), "unet" (latent, noise -> x0) and
            "decoder" (x0 -> output); images in [-1,1].
        model: of what it was made: name, parametrization, t_noise, t_diffusion, parameters, weights_sha256.
        source: for a built folder, the hashes of the ONNX files that it was built from.
        parity: figures of the check against torch.
        options: of the export and the build.
        extras: other files in the folder, name -> SHA-256, which the run time does not load.
        architecture: of the GPU a plan is for ("sm_90"), else None.
    """

    backend: str
    backend_version: str
    precision: str
    geometry: Geometry
    profile: Profile
    graphs: Mapping[str, Graph]
    model: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, str] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, str] = field(default_factory=dict)
    architecture: str | None = None
    resampler: str = resample.NAME
    noise: Mapping[str, str] = field(
        default_factory=lambda: {"generator": noise.GENERATOR, "table": noise.TABLE_SHA256}
    )
    format: int = FORMAT

    def save(self, folder: Path) -> None:
        """Write manifest.json and manifest.sha256 (the graphs must be there already)."""
        content = (json.dumps(asdict(self), indent=1) + "\n").encode()
        atomic_write(folder / "manifest.json", content)
        atomic_write(folder / "manifest.sha256", _checksum(content))

    def read(self, folder: Path, graph: str) -> tuple[bytes, dict[str, bytes]]:
        """The bytes of a graph's file and of its data files, checked against their hashes."""
        entry = self.graphs[graph]
        return read_file(folder, entry.file, entry.sha256), {n: read_file(folder, n, h) for n, h in entry.data.items()}


def load(folder: str | os.PathLike[str]) -> Manifest:
    """Read and check a folder's manifest.

    Raises:
        FolderError: no such folder or manifest; damaged or edited; of an unknown format; made for another noise table
            or resampler.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FolderError(f"{folder}: no such folder; an engine folder is made by python -m engine.export")
    if not (folder / "manifest.json").is_file():
        hint = (
            f"; it holds a generator: python -m engine.export {folder} --out DIR" if (folder / "unet").is_dir() else ""
        )
        raise FolderError(f"{folder}: no manifest.json in it, so it is not an engine folder{hint}")
    content = _regular(folder / "manifest.json", _MAX_BYTES)
    if _regular(folder / "manifest.sha256", _MAX_BYTES) != _checksum(content):
        raise FolderError(f"{folder / 'manifest.json'}: damaged or edited (manifest.sha256 differs); build it again")
    try:
        return _parse(json.loads(content))
    except FolderError as error:
        raise FolderError(f"{folder / 'manifest.json'}: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FolderError(f"{folder / 'manifest.json'}: not a manifest of an engine folder ({error!r})") from None


def check_target(out: Path) -> None:
    """Refuse to replace what is no engine folder.

    Raises:
        FolderError: `out` exists, is not empty and has no manifest.json.
    """
    if out.exists() and not (out / "manifest.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise FolderError(f"{out} exists and is no engine folder, so it will not be replaced; give another --out")


def _parse(content: dict[str, Any]) -> Manifest:
    if content["format"] != FORMAT:
        raise FolderError(f"its format is {content['format']!r}, this version reads {FORMAT}; build the folder again")
    graphs = {
        name: Graph(
            file=_name(entry["file"]),
            sha256=_sha(entry["sha256"]),
            inputs=tuple(_tensor(t) for t in entry["inputs"]),
            output=_tensor(entry["output"]),
            data={_name(n): _sha(h) for n, h in entry["data"].items()},
        )
        for name, entry in content["graphs"].items()
    }
    if set(graphs) not in ({"generator"}, {"encoder", "unet", "decoder"}):
        raise FolderError(f"graphs must be generator, or encoder, unet and decoder; got {', '.join(graphs) or 'none'}")
    geometry = Geometry(**{k: _count(v) for k, v in content["geometry"].items()})
    if geometry.multiple % geometry.factor:
        raise FolderError(f"multiple {geometry.multiple} must be a multiple of factor {geometry.factor}")
    profile = Profile(_span(content["profile"]["batch"]), _span(content["profile"]["tile"]))
    if any(side % geometry.multiple for side in profile.tile):
        raise FolderError(f"tile sides {profile.tile} must be multiples of {geometry.multiple}")
    rest = {k: v for k, v in content.items() if k not in ("graphs", "geometry", "profile")}
    manifest = Manifest(graphs=graphs, geometry=geometry, profile=profile, **rest)
    if manifest.backend not in BACKENDS:
        raise FolderError(f"backend must be one of {', '.join(BACKENDS)}; got {manifest.backend!r}")
    for key, ours in (
        ("resampler", resample.NAME),
        ("noise", {"generator": noise.GENERATOR, "table": noise.TABLE_SHA256}),
    ):
        if content[key] != ours:
            raise FolderError(f"made for another {key} ({content[key]!r}); export it again with this version")
    for key in ("model", "source", "parity", "options", "extras"):
        if not isinstance(content[key], dict):
            raise FolderError(f"{key} must be an object")
    for name, sha in content["extras"].items():
        _name(name), _sha(sha)
    return manifest


def _checksum(content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()}  manifest.json\n".encode()


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _FILE_NAME.fullmatch(value):
        raise FolderError(f"{value!r} is not a plain file name")
    return value


def _sha(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise FolderError(f"{value!r} is not a SHA-256")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= 1 << 16:
        raise FolderError(f"{value!r} is not a count")
    return value


def _span(value: Any) -> tuple[int, int, int]:
    low, usual, high = (_count(v) for v in value)
    if not low <= usual <= high:
        raise FolderError(f"least, usual and largest must rise; got {value}")
    return low, usual, high


def _tensor(value: dict[str, Any]) -> Tensor:
    if value["dtype"] not in _DTYPES or not all(isinstance(d, (int, str)) for d in value["shape"]):
        raise FolderError(f"{value!r} does not describe a tensor")
    return Tensor(str(value["name"]), tuple(value["shape"]), value["dtype"])


def _is_file(path: Path) -> bool:
    """A regular file, and no link that could lead out of the folder."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _regular(path: Path, limit: int) -> bytes:
    if not _is_file(path):
        raise FolderError(f"{path}: missing, or not a regular file; build the folder again")
    with open(path, "rb") as f:
        if os.fstat(f.fileno()).st_size > limit:
            raise FolderError(f"{path}: larger than {limit} bytes")
        return f.read()


def read_file(folder: Path, name: str, expected: str) -> bytes:
    """The bytes of a folder's file, which must have the expected SHA-256."""
    content = _regular(folder / name, _MAX_MODEL_BYTES)
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise FolderError(
            f"{folder / name}: its SHA-256 {found[:12]}... is not the manifest's {expected[:12]}...: "
            "stale, damaged or of another model; build the folder again"
        )
    return content


# ---- trust in plans


def _ledger() -> Path:
    home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(home) / "gdpo-sr" / "plans.txt"


def remember_plan(sha256: str) -> None:
    """Add a plan that this user just built to the list of plans that load without being asked for."""
    path = _ledger()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    known = path.read_text() if path.is_file() else ""
    atomic_write(path, known + f"{sha256}\n")
    path.chmod(0o600)


def built_here(sha256: str) -> bool:
    """Whether this user built the plan of that hash."""
    path = _ledger()
    return path.is_file() and sha256 in path.read_text().split()
