"""The C++ upscaler (csrc/), built by setup.py where a compiler is."""

from collections.abc import Callable
from typing import Any

import numpy as np

__version__: str

class Upscaler:
    """A loaded engine folder. Any number of threads may call `upscale` on one object; the GIL is released.

    Raises:
        FolderError, ValueError, RuntimeError: as engine.Upscaler.load.
    """

    def __init__(
        self,
        folder: str,
        *,
        backend: str = "auto",
        device: str | None = None,
        threads: int = 0,
        trust_plan: bool = False,
        library: str | None = None,
        concurrency: int = 0,
    ) -> None: ...
    def upscale(
        self,
        image: Any,
        out: Any = None,
        *,
        seed: int = 0,
        tile: int = 0,
        scale: float = 4.0,
        color: str = "wavelet",
        batch: int = 0,
        progress: Callable[[int, int], object] | None = None,
        timing: dict[str, float] | None = None,
        sink: Callable[[int, np.ndarray], object] | None = None,
        max_pixels: int = 1_000_000_000,
    ) -> Any:
        """Upscale one picture without copying it in or out.

        Args:
            image: [H,W,3] uint8 or uint16 in the CPU's memory, of any strides that are not negative: a buffer (numpy)
                or an object with `__dlpack__` (torch).
            out: written and returned where given: like `image`, of the result's size; else a numpy array is made.
            seed, tile, scale, color, batch, progress: as engine.Upscaler.upscale; 0 stands for None.
            timing: gets the seconds "total" and "backend".
            sink: called with (first row, finished rows [n,W,3]) from the top to the bottom, on the calling thread; the
                result is then never in memory whole and None is returned. What it raises ends the picture.
            max_pixels: of the result and of the model's x4; more is refused.
        """
    @property
    def backend(self) -> str: ...
    @property
    def backend_version(self) -> str: ...

def philox(counter: tuple[int, int, int, int], seed: int) -> list[int]: ...
def noise_field(seed: int, channels: int, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray: ...
def resize_window(
    pixels: Any, size: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int]
) -> np.ndarray: ...
def cover(
    size: int, tile: int, overlap: int, multiple: int, *, fixed: bool = False, resolution: int = 1
) -> tuple[list[int], int, np.ndarray]:
    """(starts, tile, weights) of engine.runtime.tiles.cover and Axis.weights."""

def sha256(data: bytes) -> tuple[str, str]:
    """By the CPU's instructions, and in plain C++."""
