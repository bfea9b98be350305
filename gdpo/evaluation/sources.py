"""Where pictures come from: folders paired by file name, and what upscales an LR picture."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from engine.io.images import READABLE, read_srgb
from engine.runtime.foreign import is_engine
from engine.runtime.resample import resize
from gdpo.model.parts import refuse_checkpoint


def read_rgb(path: Path) -> np.ndarray:
    """[H,W,3] uint8, sRGB; transparency is dropped. ValueError for 16 bit, which the papers' metrics do not define."""
    pixels = read_srgb(path)
    if pixels.dtype != np.uint8:
        raise ValueError(f"{path}: metrics are defined on 8-bit pictures; this one has 16 bit")
    return pixels


def read_pair(lr: Path, hr: Path) -> tuple[np.ndarray, np.ndarray]:
    """LR and HR of one scene. ValueError where the HR is not the LR magnified by one factor."""
    small, large = read_rgb(lr), read_rgb(hr)
    if small.shape[0] * large.shape[1] != small.shape[1] * large.shape[0] or small.shape[0] >= large.shape[0]:
        raise ValueError(f"{hr} ({_size(large)}) is not {lr} ({_size(small)}) magnified")
    return small, large


def list_pictures(folder: Path, template: str = "{name}") -> dict[str, Path]:
    """Pictures of a folder by name without suffix; hidden files are left out.

    Args:
        template: how the folder names them, such as "{name}_LR4"; others are of no concern.

    Raises:
        ValueError: there are none, two share a name, or the template is none.
    """
    if template.count("{name}") != 1 or "/" in template:
        raise ValueError(f"a template must hold {{name}} once, such as {{name}}_LR4; got {template!r}")
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    before, _, after = template.partition("{name}")
    out: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        stem = path.stem
        hidden = path.name.startswith(".")  # as macOS leaves ._x.png beside x.png
        if hidden or path.suffix.lower() not in READABLE or not path.is_file():
            continue
        if len(stem) <= len(before) + len(after):
            continue
        if not (stem.startswith(before) and stem.endswith(after)):
            continue
        name = stem[len(before) : len(stem) - len(after)]
        if name in out:
            raise ValueError(f"{folder} holds {out[name].name} and {path.name}: pictures are paired by name")
        out[name] = path
    if not out:
        which = "" if template == "{name}" else f" called {template}"
        raise ValueError(f"{folder} holds no picture{which} ({', '.join(sorted(READABLE))})")
    return out


def check_pairs(names: list[str], folder: Path, pictures: dict[str, Path]) -> None:
    """The folder must hold exactly these names."""
    missing, surplus = [n for n in names if n not in pictures], [n for n in pictures if n not in names]
    for what, which in (("lacks", missing), ("holds, beyond the HR folder,", surplus)):
        if which:
            more = f" and {len(which) - 3} more" if len(which) > 3 else ""
            raise ValueError(
                f"{folder} {what} {', '.join(sorted(which)[:3])}{more}; LR, SR and HR are paired by file name "
                "(see --lr-name, --hr-name, --sr-name)"
            )


class Source(Protocol):
    """A row of the table: gives a picture for each name."""

    name: str
    seeded: bool
    seconds: list[float]

    def picture(self, name: str, lr: np.ndarray, size: tuple[int, int], seed: int) -> np.ndarray:
        """The picture of this name, [H,W,3] uint8 of this (H, W)."""
        ...


@dataclass
class Bicubic:
    """The resampler of the engine: bicubic a=-0.5."""

    name: str = "bicubic"
    seeded: bool = False
    seconds: list[float] = field(default_factory=list)

    def picture(self, name: str, lr: np.ndarray, size: tuple[int, int], seed: int) -> np.ndarray:
        start = time.perf_counter()
        out = resize(lr, size)
        self.seconds.append(time.perf_counter() - start)
        return out


@dataclass
class Folder:
    """Finished pictures, of anybody's."""

    name: str
    pictures: dict[str, Path]
    seeded: bool = False
    seconds: list[float] = field(default_factory=list)

    def picture(self, name: str, lr: np.ndarray, size: tuple[int, int], seed: int) -> np.ndarray:
        pixels = read_rgb(self.pictures[name])
        if pixels.shape[:2] != size:
            raise ValueError(f"{self.pictures[name]} must be {size[1]}x{size[0]} as its HR; got {_size(pixels)}")
        return pixels


class Model:
    """A built engine folder, or a generator's folder (run by torch)."""

    seeded = True

    def __init__(self, name: str, folder: Path, device: str | None, color: str) -> None:
        from engine import Upscaler

        refuse_checkpoint(folder)
        built = is_engine(folder)
        self.name, self.color = name, color
        self.seconds: list[float] = []
        self.up = Upscaler.load(folder, backend="auto" if built else "torch", device=device)

    def picture(self, name: str, lr: np.ndarray, size: tuple[int, int], seed: int) -> np.ndarray:
        scale = size[0] / lr.shape[0]
        start = time.perf_counter()
        out = self.up.upscale(lr, seed=seed, scale=scale, color=self.color)
        self.seconds.append(time.perf_counter() - start)
        if out.shape[:2] != size:
            raise ValueError(f"{self.name} made {_size(out)} of {name} where its HR is {size[1]}x{size[0]}")
        return out


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


def parse_source(text: str) -> tuple[str, Path]:
    """`NAME=FOLDER` or `FOLDER`, which is then called by its last part. A folder that is there may hold a =."""
    name, equals, folder = ("", "", text) if Path(text).is_dir() or "=" not in text else text.partition("=")
    path = Path(folder)
    return (name if equals else path.resolve().name), path


def build_sources(
    sr: list[str], models: list[str], names: list[str], device: str | None, color: str, sr_name: str = "{name}"
) -> list[Source]:
    """Bicubic, then the folders of finished pictures, then the models. ValueError for a repeated name."""
    sources: list[Source] = [Bicubic()]
    for text in sr:
        name, folder = parse_source(text)
        pictures = list_pictures(folder, sr_name)
        check_pairs(names, folder, pictures)
        sources.append(Folder(name, pictures))
    for text in models:
        name, folder = parse_source(text)
        sources.append(Model(name, folder, device, color))
    seen = {"hr"}
    for source in sources:
        if source.name in seen or not source.name or "/" in source.name:
            raise ValueError(f"row {source.name!r} is taken or no name; give another: --sr NAME=DIR, --model NAME=DIR")
        seen.add(source.name)
    return sources
