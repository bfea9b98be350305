"""The manifest of an engine folder: what is in it, what it was made from, and whether it may be loaded.

A folder holds one file per graph, `manifest.json`, and `manifest.sha256` (the hash of the manifest's bytes, in the
format of sha256sum). Nothing reaches a backend whose bytes do not have the hash that the manifest names, and files are
read once: what was hashed is what is loaded. A TensorRT plan is executable code, which needs more trust than a hash
(trust.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from engine.io.files import atomic_write, naming
from engine.runtime import noise, resample
from engine.runtime.backends.registry import FOLDERS
from engine.runtime.foreign import explain, is_engine

FORMAT = 1
_MAX_BYTES = 1 << 20  # of a manifest
_MAX_MODEL_BYTES = 1 << 36
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_DTYPES = ("float32", "float16")
PRECISIONS = ("fp32", "fp16", "bf16")
_GEOMETRY = {"scale": (1, 16), "factor": (1, 64), "channels": (1, 4096), "multiple": (1, 4096), "overlap": (1, 4096)}
_BATCH, _TILE = (1, 1024), (1, 1 << 16)
_DEEPEST = 32  # objects and lists inside each other


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

    @property
    def usual(self) -> Profile:
        """The usual batch and tile alone."""
        return Profile((self.batch[1],) * 3, (self.tile[1],) * 3)


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

    def content(self) -> bytes:
        """The bytes of manifest.json; `parse` reads them."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    def save(self, folder: Path) -> None:
        """Write manifest.json and manifest.sha256 (the graphs must be there already)."""
        content = self.content()
        atomic_write(folder / "manifest.json", content)
        atomic_write(folder / "manifest.sha256", _checksum(content))

    def fixed_side(self, dimension: str) -> int:
        """The only length that the profile has for a named dimension; 0 where it has several."""
        low, _, high = self.profile.batch if dimension == "batch" else self.profile.tile
        return 0 if low != high else low // self.geometry.factor if dimension.startswith("latent_") else low

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
    if not is_engine(folder):
        raise FolderError(explain(folder))
    content = _regular(folder / "manifest.json", _MAX_BYTES)
    if _regular(folder / "manifest.sha256", _MAX_BYTES) != _checksum(content):
        raise FolderError(f"{folder / 'manifest.json'}: damaged or edited (manifest.sha256 differs); build it again")
    try:
        return parse(content)
    except FolderError as error:
        raise FolderError(f"{folder / 'manifest.json'}: {error}") from None


def check_target(out: Path) -> None:
    """Refuse to replace what is not an engine folder.

    Raises:
        FolderError: `out` exists, is not empty and is not an engine folder.
    """
    if out.exists() and not is_engine(out) and (not out.is_dir() or any(out.iterdir())):
        raise FolderError(f"{out} exists and is not an engine folder, so it will not be replaced; give another --out")


def _decoded(content: bytes) -> Any:
    """JSON (RFC 8259: no NaN, each name once), not nested deeply."""
    depth = 0
    for character in re.sub(rb'"(?:[^"\\\\]|\\\\.)*"', b"", content):
        depth += (character in b"[{") - (character in b"]}")
        if depth > _DEEPEST:
            raise FolderError(f"its JSON is nested deeper than {_DEEPEST}")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise FolderError("its JSON has a name twice")
        return found

    def refuse(name: str) -> None:
        raise FolderError(f"{name} is not a number in JSON")

    return json.loads(content.decode(), object_pairs_hook=once, parse_constant=refuse)


def parse(content: bytes) -> Manifest:
    """A manifest of its bytes.

    Raises:
        FolderError: as `load`.
    """
    try:
        return _checked(_decoded(content))
    except FolderError:
        raise
    except ValueError as error:  # not JSON, not UTF-8, a number of too many digits
        raise FolderError(f"not a manifest of an engine folder ({error})") from None


def _checked(content: Any) -> Manifest:
    """Every field checked: its type, its range and that it fits the others. What passes here fails in no run time."""
    content = _object("manifest", content, {f.name for f in fields(Manifest)})
    if content["format"] != FORMAT or isinstance(content["format"], bool):
        raise FolderError(f"its format is {_short(content['format'])}, this version reads {FORMAT}; build it again")
    if content["backend"] not in FOLDERS:
        raise FolderError(f"backend must be one of {', '.join(FOLDERS)}; got {_short(content['backend'])}")
    for key, ours in (
        ("resampler", resample.NAME),
        ("noise", {"generator": noise.GENERATOR, "table": noise.TABLE_SHA256}),
    ):
        if content[key] != ours:
            raise FolderError(f"made for another {key} ({_short(content[key])}); export it again with this version")
    if content["precision"] not in PRECISIONS:
        raise FolderError(f"precision must be one of {', '.join(PRECISIONS)}; got {_short(content['precision'])}")
    geometry, profile = _geometry(content["geometry"]), _object("profile", content["profile"], {"batch", "tile"})
    spans = Profile(_span("profile.batch", profile["batch"], _BATCH), _span("profile.tile", profile["tile"], _TILE))
    if any(side % geometry.multiple for side in spans.tile):
        raise FolderError(f"profile.tile {list(spans.tile)} must be multiples of {geometry.multiple}")
    graphs = {
        name: _graph(f"graphs.{_text('graphs', name)}", entry)
        for name, entry in _object("graphs", content["graphs"]).items()
    }
    _check_roles(graphs, geometry, spans)
    files = [name for graph in graphs.values() for name in (graph.file, *graph.data)]
    if len(set(files)) != len(files) or {"manifest.json", "manifest.sha256"} & set(files):
        raise FolderError(f"graphs must have files of their own; got {', '.join(files)}")
    for key in ("model", "parity", "options"):
        _object(key, content[key])
    return Manifest(
        backend=content["backend"],
        backend_version=_text("backend_version", content["backend_version"]),
        precision=content["precision"],
        geometry=geometry,
        profile=spans,
        graphs=graphs,
        model=content["model"],
        source={_text("source", k): _sha(v) for k, v in _object("source", content["source"]).items()},
        parity=content["parity"],
        options=content["options"],
        extras={_name(k): _sha(v) for k, v in _object("extras", content["extras"]).items()},
        architecture=None if content["architecture"] is None else _text("architecture", content["architecture"]),
        resampler=content["resampler"],
        noise=content["noise"],
    )


def _geometry(content: Any) -> Geometry:
    content = _object("geometry", content, set(_GEOMETRY))
    geometry = Geometry(**{k: _count(f"geometry.{k}", content[k], *limits) for k, limits in _GEOMETRY.items()})
    if geometry.multiple % geometry.factor:
        raise FolderError(f"multiple {geometry.multiple} must be a multiple of factor {geometry.factor}")
    return geometry


def _graph(where: str, content: Any) -> Graph:
    content = _object(where, content, {f.name for f in fields(Graph)})
    if not isinstance(content["inputs"], list):
        raise FolderError(f"{where}.inputs must be a list; got {_short(content['inputs'])}")
    return Graph(
        file=_name(content["file"]),
        sha256=_sha(content["sha256"]),
        inputs=tuple(_tensor(f"{where}.inputs", t) for t in content["inputs"]),
        output=_tensor(f"{where}.output", content["output"]),
        data={_name(n): _sha(h) for n, h in _object(f"{where}.data", content["data"]).items()},
    )


def _check_roles(graphs: Mapping[str, Graph], geometry: Geometry, profile: Profile) -> None:
    """The names, channels and sides that the run time feeds and reads."""
    if set(graphs) not in ({"generator"}, {"encoder", "unet", "decoder"}):
        raise FolderError(f"graphs must be generator, or encoder, unet and decoder; got {_short(list(graphs))}")
    picture, latent = (3, "height", "width"), (geometry.channels, "latent_height", "latent_width")
    roles = {
        "generator": ([("image", picture), ("noise", latent)], ("output", picture)),
        "encoder": ([("image", picture)], ("latent", latent)),
        "unet": ([("latent", latent), ("noise", latent)], ("x0", latent)),
        "decoder": ([("x0", latent)], ("output", picture)),
    }
    batch, tile = profile.batch, profile.tile
    for name, graph in graphs.items():
        inputs, output = roles[name]
        if len(graph.inputs) != len(inputs):
            wanted = " and ".join(role for role, _ in inputs)
            raise FolderError(f"graphs.{name}.inputs must be {wanted}; got {len(graph.inputs)} inputs")
        wanted_tensors = [*(("input", t, r) for t, r in zip(graph.inputs, inputs)), ("output", graph.output, output)]
        for kind, tensor, (role, dims) in wanted_tensors:
            unit = 1 if dims is picture else geometry.factor
            # A number in place of a name must be the only value that the profile has.
            numbers = (batch[0] if batch[0] == batch[2] else None, dims[0])
            sides = (tile[0] // unit if profile.static else None,) * 2
            names = ("batch", None, *dims[1:])
            allowed = [(n, v) for n, v in zip(names, (*numbers, *sides))]
            fits = len(tensor.shape) == 4 and all(d is not None and d in a for d, a in zip(tensor.shape, allowed))
            if tensor.name != role or not fits:
                shape = ",".join(map(str, ("batch", *dims)))
                got = f"{tensor.name[:40]} {_short(tensor.shape)}"
                raise FolderError(f"{kind} of {name} must be {role} [{shape}]; got {got}")


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


def _count(where: str, value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise FolderError(f"{where} must be {low} to {high}; got {_short(value)}")
    return value


def _span(where: str, value: Any, limits: tuple[int, int]) -> tuple[int, int, int]:
    if not isinstance(value, list) or len(value) != 3:
        raise FolderError(f"{where} must be three numbers; got {_short(value)}")
    low, usual, high = (_count(where, v, *limits) for v in value)
    if not low <= usual <= high:
        raise FolderError(f"{where}: least, usual and largest must rise; got {value}")
    return low, usual, high


def _tensor(where: str, content: Any) -> Tensor:
    content = _object(where, content, {f.name for f in fields(Tensor)})
    shape = content["shape"]
    if content["dtype"] not in _DTYPES:
        raise FolderError(f"{where}: dtype must be one of {', '.join(_DTYPES)}; got {_short(content['dtype'])}")
    if not isinstance(shape, list) or not all(type(d) in (int, str) for d in shape):
        raise FolderError(f"{where}: shape must be a list of numbers and names; got {_short(shape)}")
    return Tensor(_text(where, content["name"]), tuple(shape), content["dtype"])


def _object(where: str, value: Any, keys: set[str] | None = None) -> dict[str, Any]:
    """A JSON object, with exactly these keys where they are given."""
    if not isinstance(value, dict):
        raise FolderError(f"{where} must be an object; got {_short(value)}")
    if keys is not None and value.keys() != keys:
        missing, unknown = sorted(keys - value.keys()), sorted(value.keys() - keys)
        what = f"lacks {', '.join(missing)}" if missing else f"has an unknown {_short(unknown[0])}"
        raise FolderError(f"not a manifest of an engine folder: {where} {what}")
    return value


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > 1000 or not value.isascii() or not value.isprintable():
        raise FolderError(f"{where} must be a line of text; got {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _is_file(path: Path) -> bool:
    """A regular file, and no link that could lead out of the folder."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _regular(path: Path, limit: int) -> bytes:
    if not _is_file(path):
        raise FolderError(f"{path}: missing, or not a regular file; build the folder again")
    with naming(path), open(path, "rb") as f:
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
