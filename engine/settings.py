"""How a picture is made: the options of `python -m engine.upscale`, and the one way from a picture to its result."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engine.io.formats import BY_SUFFIX
from engine.io.images import MAX_PIXELS, Picture, Put, image_writer
from engine.io.version import version
from engine.pictures import outcome, parse_background, upscale_picture, upscale_rows
from engine.runtime import color
from engine.runtime.restore import Progress
from engine.runtime.upscaler import MAX_OUTPUT_PIXELS, SCALES, Upscaler, output_size
from engine.wrap import upscale_wrapped

Keep = Callable[[tuple[int, int, int], np.dtype], np.ndarray]


@dataclass(frozen=True)
class Settings:
    """How pictures are made, as `python -m engine.upscale --help` explains it."""

    seed: int = 0
    scale: float = 4.0
    width: int | None = None
    height: int | None = None
    longest: int | None = None
    tile: int = 0
    batch: int | None = None
    color: str = color.DEFAULT
    background: str | None = None
    wrap: Literal["none", "both", "horizontal"] = "none"
    quality: int = 95
    lossless: bool = False
    strip_metadata: bool = False
    max_pixels: int = MAX_PIXELS

    @classmethod
    def of(cls, *, scale: float | None = None, **options: Any) -> Settings:
        """Settings of options that a user gave, each in its range; of `scale` and the sides at most one kind.

        Raises:
            ValueError: an option that is not what it should be; the message names it.
        """
        settings = cls(**options, scale=4.0 if scale is None else scale)
        sides = {name: side for name in ("width", "height", "longest") if (side := getattr(settings, name)) is not None}
        if scale is not None and sides:
            raise ValueError(f"scale and {', '.join(sides)} contradict each other; give one of them")
        if "longest" in sides and len(sides) > 1:
            raise ValueError("longest goes with neither width nor height")
        for name, side in sides.items():
            if side < 1:
                raise ValueError(f"{name} must be at least 1 pixel; got {side}")
            if side > MAX_OUTPUT_PIXELS:
                raise ValueError(f"{name} must be at most {MAX_OUTPUT_PIXELS} pixels")
        if not 1 <= settings.quality <= 100:
            raise ValueError(f"quality must be 1 to 100; got {settings.quality}")
        if not 0 <= settings.seed < 1 << 64:
            raise ValueError(f"seed must be in [0, 2^64); got {settings.seed}")
        if settings.max_pixels < 1:
            raise ValueError(f"max-pixels must be at least 1; got {settings.max_pixels}")
        if settings.color not in color.METHODS:
            raise ValueError(f"color must be one of {', '.join(color.METHODS)}; got {settings.color!r}")
        if settings.background is not None:
            parse_background(settings.background)
        output_size(1, 1, settings.scale)
        return settings

    def factor(self, height: int, width: int) -> float:
        """The scale for a picture of this size: the largest that keeps the result within the sides asked for.

        Raises:
            ValueError: the sides ask for a scale that is not done.
        """
        sides = [(self.width, width), (self.height, height), (self.longest, max(height, width))]
        factors = [wanted / there for wanted, there in sides if wanted]
        if not factors:
            return self.scale
        if not SCALES[0] <= min(factors) <= SCALES[1]:
            least, most = SCALES
            made = f"{width}x{height} would be made {min(factors):.3g} times as large"
            raise ValueError(f"{made}; {least} to {most} times is done")
        return min(factors)

    @property
    def limit(self) -> int:
        """Pixels of the largest x4 and of the largest result."""
        return max(MAX_OUTPUT_PIXELS, 16 * self.max_pixels)

    def recipe(self, up: Upscaler, model: str) -> dict[str, Any]:
        """Every option on which the bytes of a result depend; `model` says which one it is."""
        size = {k: v for k in ("width", "height", "longest") if (v := getattr(self, k))} or {"scale": self.scale}
        kept = ("seed", "color", "background", "wrap", "quality", "lossless", "strip_metadata")
        tile = up.check_tiling(self.tile, self.batch)[0]
        return (
            {"version": version(), "model": model, "backend": up.backend, "precision": up.precision}
            | {"tile": tile, **size}
            | {name: getattr(self, name) for name in kept}
        )

    def make(
        self,
        up: Upscaler,
        picture: Picture,
        target: Path,
        progress: Progress | None = None,
        *,
        keep: Keep | None = None,
        **more: Any,
    ) -> tuple[int, int]:
        """Upscale one picture to a file, row by row: encoded while it is made (see `image_writer`).

        Args:
            up: a loaded model.
            picture: as `read_image` gives it.
            target: the file to write; what its format cannot hold is found before any work.
            progress: called with (tiles done, tiles in all); what it raises cancels.
            keep: given the result's shape and dtype, returns an array that gets the result's colours too.
            more: of `image_writer`: notice, sealed.

        Returns:
            Height and width of the result.

        Raises:
            ImageError: the format cannot hold the result.
            ValueError: the result is larger than `limit`.
            FloatingPointError: the model gave a value that is not finite.
            OSError: the file cannot be written.
        """
        size = self._size(picture)
        like = outcome(picture, size, self.background)
        kept = None if keep is None else keep((*size, 3), like.pixels.dtype)
        like = like.without_metadata() if self.strip_metadata else like
        more |= {"quality": self.quality, "lossless": self._lossless(target)}
        with image_writer(target, like, size, **more) as write:
            done = 0

            def put(rows: np.ndarray, alpha: np.ndarray | None) -> None:
                nonlocal done
                write(rows, alpha)
                if kept is not None:
                    kept[done : done + len(rows)] = rows
                done += len(rows)

            self._upscale(up, picture, size, put, progress)
        return size

    def _size(self, picture: Picture) -> tuple[int, int]:
        height, width = picture.pixels.shape[:2]
        return output_size(height, width, self.factor(height, width), self.limit)

    def _upscale(
        self, up: Upscaler, picture: Picture, size: tuple[int, int], put: Put, progress: Progress | None
    ) -> None:
        options: dict[str, Any] = {"seed": self.seed, "tile": self.tile, "batch": self.batch, "color": self.color}
        options |= {"background": self.background, "max_pixels": self.limit, "progress": progress}
        if self.wrap == "none":
            upscale_rows(up, picture, put, scale=self.factor(*picture.pixels.shape[:2]), **options)
            return
        native = up.manifest.geometry.scale
        whole = functools.partial(upscale_picture, up, scale=native, **options)
        result = upscale_wrapped(picture, whole, native, size, vertical=self.wrap == "both")
        put(result.pixels, result.alpha)

    def _lossless(self, target: Path) -> bool:
        return self.lossless and lossless_of(target) != "always"


def lossless_of(target: Path) -> str:
    """Whether the output's format is lossless: "always", "option" or "never"."""
    row = BY_SUFFIX.get(target.suffix.lower())
    return row.lossless if row else "always"
