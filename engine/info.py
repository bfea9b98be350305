"""What is in an engine folder: `python -m engine.info FOLDER`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from engine.io import cli
from engine.runtime import manifest as manifests
from engine.runtime.backends.registry import PLANS
from engine.runtime.manifest import FolderError, Manifest
from engine.runtime.trust import built_here

_BAD = "NOT USABLE"


def describe(folder: Path, manifest: Manifest) -> str:
    """The manifest as text, with the size and the state of every file."""
    g, p = manifest.geometry, manifest.profile
    lines = [
        f"{folder}",
        f"  backend      {manifest.backend} {manifest.backend_version}, {manifest.precision}"
        + (f", for {manifest.architecture}" if manifest.architecture else ""),
        f"  picture      x{g.scale}, tiles of {_span(p.tile)} output pixels",
        f"  geometry     tile sides are multiples of {g.multiple}, neighbours overlap by {g.overlap}",
        f"  batch        {_span(p.batch)}",
        f"  latent       {g.channels} channels at 1/{g.factor}; noise {manifest.noise['generator']}",
    ]
    for section in ("model", "parity", "options", "source"):
        for key, value in getattr(manifest, section).items():
            text = f"{str(value)[:16]}..." if key.endswith("sha256") or section == "source" else value
            lines.append(f"  {section:<12} {key}: {text}")
    for name, graph in manifest.graphs.items():
        ins = ", ".join(f"{t.name} [{','.join(map(str, t.shape))}]" for t in graph.inputs)
        out = f"{graph.output.name} [{','.join(map(str, graph.output.shape))}]"
        lines.append(f"  {name:<12} {graph.file}: {ins} -> {out}")
        for file, sha in {graph.file: graph.sha256, **graph.data}.items():
            lines.append(f"  {'file':<12} {file}: {_state(folder / file, sha, manifest)}")
    for file, sha in manifest.extras.items():
        lines.append(f"  {'extra':<12} {file}: {_state(folder / file, sha, manifest)}")
    return "\n".join(lines)


def _span(values: tuple[int, int, int]) -> str:
    return str(values[0]) if values[0] == values[2] else f"{values[0]} to {values[2]} (usually {values[1]})"


def _state(file: Path, sha256: str, manifest: Manifest) -> str:
    try:
        size = len(manifests.read_file(file.parent, file.name, sha256))
    except FolderError as error:
        return f"{_BAD}: {error}"
    trust = ""
    if manifest.backend in PLANS:
        trust = ", built here" if built_here(sha256) else ", not built here (needs --trust-plan)"
    return f"{size / 2**20:.1f} MiB, sha256 {sha256[:16]}... as in the manifest{trust}"


def main() -> int:
    parser = cli.Parser(prog="python -m engine.info", description="Show what is in an engine folder.")
    parser.add_argument("folder", help="an engine folder, as engine.export or engine.build writes it")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    options = parser.parse_args()
    manifest = manifests.load(options.folder)
    text = describe(Path(options.folder), manifest)
    print(json.dumps(asdict(manifest), indent=1) if options.json else text)
    return 1 if _BAD in text else 0


def console() -> None:
    cli.run(main)


if __name__ == "__main__":
    console()
