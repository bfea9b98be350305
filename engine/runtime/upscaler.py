"""Upscaler: any picture, in bounded memory, the same by seed on every backend, in C++ where that was built.

LR -> resampled x4, mirrored beyond its edges -> tiles -> encode -> one step with noise from (seed, position) -> decode
-> blended -> colours aligned -> cropped. Between tiles and colours a picture is held at 16 bit.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.runtime import color as colors
from engine.runtime import manifest as manifests
from engine.runtime.backends import MODULES, Options, Session, open_session
from engine.runtime.core import open_core
from engine.runtime.manifest import FolderError, Manifest
from engine.runtime.noise import noise_field
from engine.runtime.resample import resize, resize_window
from engine.runtime.tiles import Axis, Places, blend, cover

if TYPE_CHECKING:
    from engine._core import Upscaler as Core

Progress = Callable[[int, int], None]
Run = Callable[[Sequence[Places]], Iterator[np.ndarray]]
SHIPPED = Path(__file__).parents[1] / "data" / "tiny"
MAX_OUTPUT_PIXELS = 1_000_000_000
_BAND = 256  # output rows aligned and quantised at a time


def default_model() -> Path:
    """The folder of the model that ships with the project.

    Raises:
        FolderError: this installation lacks it.
    """
    if not (SHIPPED / "manifest.json").is_file():
        raise FolderError(f"no model: {SHIPPED} is missing from this installation; name one (--model)")
    return SHIPPED


class Upscaler:
    """A loaded engine folder. Not thread-safe on the Python path: use one per thread.

    Attributes:
        manifest: of the folder.
        backend: that runs it.
        path: "C++" or "Python", whichever `upscale` takes; both give the same bytes.
        sessions: the graphs by name, as the Python path runs them.
    """

    def __init__(
        self,
        manifest: Manifest,
        sessions: dict[str, Session] | Callable[[], dict[str, Session]],
        backend: str,
        core: Core | None = None,
    ):
        self.manifest, self.backend, self._core = manifest, backend, core
        self.path = "Python" if core is None else "C++"
        if callable(sessions):
            self._open = sessions
        else:
            self.sessions = sessions

    @functools.cached_property
    def sessions(self) -> dict[str, Session]:
        return self._open()

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | None = None,
        backend: str = "auto",
        device: str | None = None,
        *,
        threads: int = 0,
        trust_plan: bool = False,
        bf16: bool = False,
        compiled: bool = False,
        core: bool | None = None,
    ) -> Upscaler:
        """Load an engine folder.

        Args:
            model: a folder that engine.export or engine.build wrote; None takes the shipped tiny model. With backend
                "torch": a generator's folder.
            backend: "auto" is the one that the folder was built for. An exported folder also runs on "openvino".
            device: "cpu", "cuda", "cuda:N"; None lets the backend choose.
            threads: of a CPU backend; 0 lets it choose.
            trust_plan: load a TensorRT plan that this user did not build. A plan is executable code.
            bf16: let OpenVINO and torch compute in bfloat16.
            compiled: torch.compile, of torch only: all tiles have one size, and the first waits for the compiler.
            core: True takes the C++ path, False Python's; None the C++ path where it can run the folder.

        Raises:
            FolderError: the folder is missing, stale, damaged, foreign or not trusted.
            RuntimeError: the backend, or the C++ path asked for, is not installed or cannot run here.
            ValueError: an unknown backend or device, or an option that the backend does not have.
        """
        options = Options(device, threads, trust_plan, bf16, compiled)
        if compiled and backend != "torch":
            raise ValueError(
                f"compiled (--compile) needs backend torch and a generator's folder as model; got backend {backend}"
            )
        if backend == "torch":
            try:
                from engine.export.torch_backend import open_generator
            except ImportError as error:
                raise RuntimeError(
                    f"backend torch is not installed here ({error}); pip install 'gdpo-sr[export]'"
                ) from error
            if model is None:
                raise ValueError("backend torch needs a generator's folder; name it")
            if core:
                raise RuntimeError("the C++ path cannot run here: it runs engine folders, not torch")
            manifest, session = open_generator(Path(model), options)
            return cls(manifest, {"generator": session}, backend)
        folder = Path(model) if model is not None else default_model()
        manifest = manifests.load(folder)
        if backend == "auto":
            backend = manifest.backend
        if backend not in MODULES:
            raise ValueError(f"backend must be auto, torch or one of {', '.join(MODULES)}; got {backend!r}")
        portable = manifest.backend == "onnx" and backend in ("onnx", "onnxruntime", "openvino")
        if backend != manifest.backend and not portable:
            if backend in manifests.PLANS:
                import_module(MODULES[backend]).load_module(backend)  # first things first: is it installed at all
            source = folder if manifest.backend == "onnx" else "ONNX_FOLDER"
            raise FolderError(
                f"{folder} is for {manifest.backend}, not {backend}; "
                f"build it: python -m engine.build {source} --backend {backend} --out DIR"
            )

        def sessions() -> dict[str, Session]:
            return {name: open_session(backend, manifest, folder, name, options) for name in manifest.graphs}

        in_cpp = None if core is False else open_core(manifest, folder, backend, options, required=bool(core))
        return cls(manifest, sessions() if in_cpp is None else sessions, backend, in_cpp)

    def upscale(
        self,
        rgb: np.ndarray,
        seed: int = 0,
        tile: int | None = None,
        *,
        scale: float = 4.0,
        color: str = colors.DEFAULT,
        batch: int | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Upscale one picture.

        Args:
            rgb: [H,W,3] uint8 or uint16.
            seed: of the noise, 0 <= seed < 2^64. The same seed, picture and tile give the same result.
            tile: longest side of a tile in INPUT pixels; None or 0 lets the model's profile choose.
            scale: of the result. The model makes x4; other factors resize that.
            color: alignment to the input: "wavelet", "adain" (the paper's) or "none".
            batch: tiles handed to the backend at once; None takes the profile's usual batch.
            progress: called with (tiles done, tiles in all); what it raises cancels.

        Returns:
            [round(H*scale), round(W*scale), 3], dtype as rgb.

        Raises:
            ValueError: an argument is not what it should be; the message names it.
            FloatingPointError: the model gave a value that is not finite; the message names the tile.
        """
        if not (isinstance(rgb, np.ndarray) and rgb.ndim == 3 and rgb.shape[2] == 3 and rgb.size):
            raise ValueError(f"rgb must be a numpy array [H,W,3]; got {getattr(rgb, 'shape', type(rgb).__name__)}")
        if rgb.dtype not in (np.uint8, np.uint16):
            raise ValueError(f"rgb must be uint8 or uint16; got {rgb.dtype}")
        if color not in colors.METHODS:
            raise ValueError(f"color must be one of {', '.join(colors.METHODS)}; got {color!r}")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed must be in [0, 2^64); got {seed}")
        longest, batch = self.check_tiling(tile, batch)
        if self._core is not None:
            readable = rgb if min(rgb.strides) >= 0 else rgb.copy()
            return self._core.upscale(
                readable, seed=seed, tile=tile or 0, scale=scale, color=color, batch=batch, progress=progress
            )
        target = output_size(rgb.shape[0], rgb.shape[1], scale)
        picture = _Run(self, rgb, seed, longest, batch, progress).restore()
        native = self.manifest.geometry.scale
        resized = target != (rgb.shape[0] * native, rgb.shape[1] * native)
        aligned = align(picture, rgb, color, np.dtype(np.uint16) if resized else rgb.dtype)
        if resized:
            aligned = resize(aligned, target)
        return aligned if aligned.dtype == rgb.dtype else _to_8_bit(aligned)

    def check_tiling(self, tile: int | None = None, batch: int | None = None) -> tuple[int, int]:
        """The longest side of a tile in output pixels and the batch that `upscale` takes for these arguments.

        Raises:
            ValueError: the model's profile has no such tile or batch; the message names what it has.
        """
        profile, geometry = self.manifest.profile, self.manifest.geometry
        low, usual, high = profile.batch
        batch = usual if batch is None else batch
        if not low <= batch <= high:
            raise ValueError(f"batch must be {low} to {high} for this model; got {batch}")
        low, longest, high = profile.tile
        if tile:
            longest = tile * geometry.scale // geometry.multiple * geometry.multiple
            if not low <= longest <= high:
                low, high = (-(-side // geometry.scale) for side in (low, high))
                raise ValueError(f"tile must be {low} to {high} input pixels for this model; got {tile}")
        return longest, batch


def output_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """The size of a result.

    Raises:
        ValueError: a scale that is no positive number, or a result of more than a gigapixel.
    """
    if not 0.05 <= scale <= 64:
        raise ValueError(f"scale must be between 0.05 and 64; got {scale}")
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    largest = max(size[0] * size[1], 16 * height * width)
    if largest > MAX_OUTPUT_PIXELS:
        raise ValueError(
            f"{width}x{height} upscaled is {largest / 1e6:.0f} megapixels; at most {MAX_OUTPUT_PIXELS / 1e6:.0f} fit"
        )
    return size


class _Run:
    """One picture on its way through the model."""

    def __init__(self, up: Upscaler, rgb: np.ndarray, seed: int, longest: int, batch: int, progress: Progress | None):
        self.up, self.rgb, self.seed, self.batch, self.progress = up, rgb, seed, batch, progress
        self.geometry, profile = up.manifest.geometry, up.manifest.profile
        unit = self.geometry.factor
        self.size = (rgb.shape[0] * self.geometry.scale, rgb.shape[1] * self.geometry.scale)
        multiple = self.geometry.multiple // unit
        # A short overlap for short tiles: at most a quarter.
        overlap = min(self.geometry.overlap // unit, longest // unit // 4 // multiple * multiple)

        def axis(side: int) -> Axis:
            # At least the profile's least tile: a smaller picture is mirrored until it fills one.
            padded = max(-(-side // unit), profile.tile[0] // unit)
            return cover(padded, longest // unit, overlap, multiple, fixed=profile.static)

        self.rows, self.columns = axis(self.size[0]), axis(self.size[1])
        stages = len(up.sessions)
        self.done, self.total = 0, len(self.rows.starts) * len(self.columns.starts) * stages

    def restore(self) -> np.ndarray:
        """uint16 [4H,4W,3], colours not aligned yet."""
        if "generator" in self.up.sessions:
            run = self._stage("generator", "image", self._image, noise=self._noise)
        else:
            latent = self._field(self._stage("encoder", "image", self._image))
            noised = self._stage("unet", "latent", self._cut(latent), noise=self._noise)
            run = self._stage("decoder", "x0", self._cut(self._field(noised)))
        height, width = self.size
        out = np.empty((height, width, 3), np.uint16)
        for first, band in blend(self.rows, self.columns, 3, self.geometry.factor, run, self.batch):
            rows = min(band.shape[1], height - first)
            if rows > 0:
                out[first : first + rows] = quantise(band[:, :rows, :width]).transpose(1, 2, 0)
        return out

    def _image(self, top: int, left: int) -> np.ndarray:
        """The upsampled input of a tile, [3,h,w] in [-1,1]."""
        f = self.geometry.factor
        rows, columns = (top * f, (top + self.rows.tile) * f), (left * f, (left + self.columns.tile) * f)
        full = np.float32(np.iinfo(self.rgb.dtype).max)
        window = resize_window(self.rgb, self.size, rows, columns)
        return np.clip(window * (np.float32(2) / full) - np.float32(1), -1, 1)

    def _noise(self, top: int, left: int) -> np.ndarray:
        rows, columns = (top, top + self.rows.tile), (left, left + self.columns.tile)
        return noise_field(self.seed, self.geometry.channels, rows, columns)

    def _stage(self, name: str, key: str, source: Callable[[int, int], np.ndarray], **more: Callable) -> Run:
        """A graph's results for batches of places; where a session can work in the background, one batch ahead."""
        session, least = self.up.sessions[name], self.up.manifest.profile.batch[0]
        start = getattr(session, "start", None)

        def run(batches: Sequence[Places]) -> Iterator[np.ndarray]:
            waiting: deque[tuple[Places, Callable[[], np.ndarray]]] = deque()
            for places in batches:
                inputs = {}
                for part, cut in ({key: source} | more).items():
                    tiles = [cut(*place) for place in places]
                    # A row's last tiles may be fewer than the least batch: the last one fills up.
                    inputs[part] = np.stack(tiles + tiles[-1:] * (least - len(tiles)))
                waiting.append((places, start(inputs) if start else functools.partial(session, inputs)))
                if len(waiting) > int(start is not None):
                    yield self._checked(name, *waiting.popleft())
            while waiting:
                yield self._checked(name, *waiting.popleft())

        return run

    def _field(self, run: Run) -> np.ndarray:
        """Run a stage on every tile and blend the latents into one field, which covers the last tiles' ends too."""
        ends = [axis.starts[-1] + axis.tile for axis in (self.rows, self.columns)]
        rows, columns = (Axis(end, a.tile, a.starts, a.overlap) for end, a in zip(ends, (self.rows, self.columns)))
        field = np.empty((self.geometry.channels, *ends), np.float32)
        for first, band in blend(rows, columns, len(field), 1, run, self.batch):
            field[:, first : first + band.shape[1]] = band
        return field

    def _cut(self, field: np.ndarray) -> Callable[[int, int], np.ndarray]:
        return lambda top, left: field[:, top : top + self.rows.tile, left : left + self.columns.tile]

    def _checked(self, name: str, places: Places, finish: Callable[[], np.ndarray]) -> np.ndarray:
        result = finish()[: len(places)]
        # A sum is finite only if every value is, and costs a tenth of np.isfinite().all(); overflow cannot reach it.
        for tile, (top, left) in zip(result, places):
            if not np.isfinite(np.sum(tile, dtype=np.float64)):
                f = self.geometry.factor
                raise FloatingPointError(
                    f"the {name} gave a value that is not finite in the tile at row {top * f}, column {left * f} "
                    f"({self.rows.tile * f}x{self.columns.tile * f} output pixels); try another precision"
                )
        self.done += len(places)
        if self.progress:
            self.progress(self.done, self.total)
        return result


def quantise(planes: np.ndarray) -> np.ndarray:
    """[-1,1] float32 -> 16 bit, halves rounded up."""
    scaled = (np.clip(planes, -1, 1) + np.float32(1)) * np.float32(colors.FULL / 2) + np.float32(0.5)
    return scaled.astype(np.uint16)


def _upsampled(rgb: np.ndarray, size: tuple[int, int], first: int, last: int) -> np.ndarray:
    """Rows of the upsampled input, uint16 [3, rows, W]: what colours are aligned to."""
    unit = np.float32(colors.FULL / np.iinfo(rgb.dtype).max)
    window = resize_window(rgb, size, (first, last), (0, size[1])) * unit + np.float32(0.5)
    return np.clip(window, 0, colors.FULL).astype(np.uint16)


def align(picture: np.ndarray, rgb: np.ndarray, color: str, dtype: np.dtype) -> np.ndarray:
    """Align the colours of [H,W,3] uint16 to the input's and convert to `dtype`, band by band."""
    height, width = picture.shape[:2]
    out = np.empty(picture.shape, dtype) if color == "wavelet" or dtype != picture.dtype else picture
    bands = [(top, min(top + _BAND, height)) for top in range(0, height, _BAND)]
    tables = None
    if color == "adain":
        result, target = colors.Moments(), colors.Moments()
        for first, last in bands:
            result.add(picture[first:last].transpose(2, 0, 1))
            target.add(_upsampled(rgb, (height, width), first, last))
        tables = colors.adain_tables(result, target)
    for first, last in bands:
        band = picture[first:last]
        if tables is not None:
            band = np.stack([tables[c][band[..., c]] for c in range(3)], axis=2)
        elif color == "wavelet":
            band = colors.wavelet_band(picture, lambda a, b: _upsampled(rgb, (height, width), a, b), (first, last))
        out[first:last] = band if dtype == np.uint16 else _to_8_bit(band)
    return out


def _to_8_bit(samples: np.ndarray) -> np.ndarray:
    return ((samples.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
