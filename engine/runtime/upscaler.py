"""Upscaler: any picture, in bounded memory, the same by seed on every backend, in C++ where that was built.

LR -> resampled x4, mirrored beyond its edges -> tiles -> encode -> one step with noise from (seed, position) -> decode
-> blended (engine.runtime.restore) -> colours aligned, resized (engine.runtime.align). Between tiles and colours rows
are held at 16 bit.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from engine.runtime import color as colors
from engine.runtime import manifest as manifests
from engine.runtime.align import finish
from engine.runtime.backends import Session
from engine.runtime.backends.registry import BACKENDS, FOLDERS, GENERATOR, PLANS, SERVER, Backend
from engine.runtime.core import open_core
from engine.runtime.foreign import is_engine
from engine.runtime.manifest import FolderError, Manifest
from engine.runtime.restore import Progress, Restorer

if TYPE_CHECKING:
    from engine._core import Upscaler as Core

Sink = Callable[[int, np.ndarray], object]
BUNDLED = Path(__file__).parents[1] / "data"
BUNDLED_MODELS = ("tiny", "quality", "faithful")  # the first is the default
SHIPPED = BUNDLED / BUNDLED_MODELS[0]
SCALES = (0.05, 64)  # least and largest
MAX_OUTPUT_PIXELS = 1_000_000_000
PRECISIONS = ("auto", "fp32", "fp16", "bf16")


def _is_for_bf16(manifest: Manifest, device: str | None) -> bool:
    """Whether a folder is to be run in bf16 here."""
    in_one_file = not any(graph.data for graph in manifest.graphs.values())  # which alone OpenVINO is given
    if manifest.options.get("on_cpu") != "bf16" or device not in (None, "cpu") or not in_one_file:
        return False
    from engine.runtime.backends.openvino import computes_bf16

    return computes_bf16()


def default_model() -> Path:
    """The folder of the bundled model.

    Raises:
        FolderError: this installation lacks it.
    """
    if not is_engine(SHIPPED):
        raise FolderError(f"no model: {SHIPPED} is missing from this installation; name one (--model)")
    return SHIPPED


def model_folder(model: str | os.PathLike[str] | None) -> Path:
    """A model's folder: itself, or the bundled model of that name where no such engine folder is; None is the default.

    Raises:
        FolderError: an empty name, or a word that is neither; and see default_model.
    """
    if model is None:
        return default_model()
    folder, name = Path(model), os.fspath(model)
    if not name:
        raise FolderError("the model's name is empty; an unset variable?")
    if folder.name != name or is_engine(folder):
        return folder
    if is_engine(BUNDLED / folder):
        return BUNDLED / folder
    if not folder.exists() and not name.startswith("hub:"):
        raise FolderError(
            f"{name}: no such folder, and no bundled model has this name (there are {', '.join(BUNDLED_MODELS)}); "
            "an engine folder is made by python -m engine.export"
        )
    return folder


class Upscaler:
    """A loaded engine folder. Any number of threads may use it; the Python path takes one picture after another.

    Attributes:
        manifest: of the folder.
        backend: that runs it.
        precision: of the computation.
        path: "C++" or "Python", whichever `upscale` takes; both give the same bytes on the same backend.
        sessions: the graphs by name, as the Python path runs them.
    """

    def __init__(
        self,
        manifest: Manifest,
        sessions: dict[str, Session] | Callable[[], dict[str, Session]],
        backend: str,
        core: Core | None = None,
        precision: str | None = None,
    ):
        self.manifest, self.backend, self._core = manifest, backend, core
        self.precision = precision or manifest.precision
        self.path = "Python" if core is None else "C++"
        self._lock, self._user = threading.Lock(), 0  # of the sessions, and the thread that holds it
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
        precision: str = "auto",
        bf16: bool = False,
        compiled: bool = False,
        url: str | None = None,
        timeout: float = 60,
        core: bool | None = None,
    ) -> Upscaler:
        """Load an engine folder.

        Args:
            model: a folder that engine.export or engine.build wrote, or "tiny", "quality" or "faithful", which are
                bundled; None is "tiny". With backend "torch": a generator's folder. With "triton": a model's name on
                the server.
            backend: "auto" is the one that the folder was built for; of a folder exported with --on-cpu bf16 it is
                "openvino" in bf16, where that is installed and the CPU computes in it. An exported folder also runs on
                "openvino" when asked to.
            device: "cpu", "cuda", "cuda:N"; None lets the backend choose.
            threads: of a CPU backend; 0 lets it choose.
            trust_plan: load a TensorRT plan that this user did not build. A plan is executable code.
            precision: "auto" is the folder's own, chosen at export; "bf16" also by backend openvino or torch.
            bf16: the older spelling of precision="bf16".
            compiled: torch.compile, of torch only: all tiles have one size, and the first waits for the compiler.
            url: of triton: HOST:PORT of the server's gRPC port.
            timeout: of triton: seconds that a batch of tiles may take.
            core: True takes the C++ path, False Python's; None the C++ path where it can run the folder.

        Raises:
            FolderError: the folder is missing, stale, damaged, foreign or not trusted.
            RuntimeError: the backend, or the C++ path asked for, is not installed or cannot run here.
            ValueError: an unknown backend or device, or an option that the backend does not have.
        """
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}; got {backend!r}")
        precision = "bf16" if bf16 and precision == "auto" else precision
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
        if threads < 0:
            raise ValueError(f"threads must be 0 (the backend's choice) or more; got {threads}")
        entry = BACKENDS.get(backend)
        if compiled and (entry is None or "compiled" not in entry.options):
            raise ValueError(
                f"compiled (--compile) needs backend torch and a generator's folder as model; got backend {backend}"
            )
        if (url is None) == (entry is not None and SERVER in entry.runs):
            raise ValueError(f"backend triton goes with url (--url HOST:PORT); got backend {backend}, url {url}")
        manifest: Manifest | None = None
        if entry is not None and not entry.runs_folders:
            if model is None and GENERATOR in entry.runs:
                raise ValueError(f"backend {backend} needs a generator's folder; name it")
            if core:
                raise RuntimeError(f"the C++ path cannot run here: it runs engine folders, not {backend}")
            folder = Path(model or "")
        else:
            folder = model_folder(model)
            manifest = manifests.load(folder)
            entry = entry or BACKENDS[manifest.backend]
            _check_fit(folder, manifest, entry)
            if backend == "auto" and precision in ("auto", "bf16") and not core and _is_for_bf16(manifest, device):
                entry, precision = BACKENDS["openvino"], "bf16"
        own = "fp32" if manifest is None else manifest.precision
        if precision not in ("auto", own) and not (precision == "bf16" and "precision" in entry.options):
            raise ValueError(
                f"precision {precision}: this folder is {own}; precision is chosen at export (python -m engine.export "
                "--precision), and bf16 also by --backend openvino or torch"
            )
        wanted = {
            "threads": threads,
            "trust_plan": trust_plan,
            "precision": "bf16" if precision == "bf16" else "fp32",
            "compiled": compiled,
            "url": url,
            "timeout": timeout,
        }
        options: dict[str, Any] = {name: value for name, value in wanted.items() if name in entry.options}
        if manifest is None:
            manifest, sessions = entry.open(model or "", None, device, **options)
            return cls(manifest, sessions, entry.name)
        opened, chosen = manifest, entry

        def open_sessions() -> dict[str, Session]:
            return chosen.open(folder, opened, device, **options)[1]

        in_cpp = None
        if core is not False:
            in_cpp = open_core(manifest, folder, entry.name, device, threads, required=bool(core))
        if in_cpp is not None:
            return cls(manifest, open_sessions, entry.name, in_cpp)
        up = cls(manifest, open_sessions(), entry.name, precision="bf16" if precision == "bf16" else None)
        if not entry.is_plan:  # a plan knows its own sizes, which its session compares with the manifest's
            up._try_out(folder)
        return up

    def _try_out(self, folder: Path) -> None:
        """One least tile: a graph of any size that does not fit the manifest fails now and not within a picture."""
        try:
            self.upscale(np.zeros((1, 1, 3), np.uint8), scale=1)
        except FloatingPointError:  # a matter of this picture and of the precision
            pass
        except (RuntimeError, ValueError) as error:
            raise FolderError(f"{folder}: its graphs do not fit its manifest ({error})") from None

    # fmt: off
    @overload
    def upscale(
        self, rgb: np.ndarray, seed: int = ..., tile: int | None = ..., *, scale: float = ..., color: str = ...,
        batch: int | None = ..., progress: Progress | None = ..., sink: None = ..., max_pixels: int = ...,
    ) -> np.ndarray: ...
    @overload
    def upscale(
        self, rgb: np.ndarray, seed: int = ..., tile: int | None = ..., *, scale: float = ..., color: str = ...,
        batch: int | None = ..., progress: Progress | None = ..., sink: Sink, max_pixels: int = ...,
    ) -> None: ...
    # fmt: on
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
        sink: Sink | None = None,
        max_pixels: int = MAX_OUTPUT_PIXELS,
    ) -> np.ndarray | None:
        """Upscale one picture.

        Args:
            rgb: [H,W,3] uint8 or uint16.
            seed: of the noise, 0 <= seed < 2^64. The same seed, picture and tile give the same result.
            tile: longest side of a tile in INPUT pixels; None or 0 lets the model's profile choose.
            scale: of the result. The model makes x4; other factors resize that.
            color: alignment to the input: "wavelet", "adain" (the paper's) or "none".
            batch: tiles handed to the backend at once; None takes the profile's usual batch.
            progress: called with (tiles done, tiles in all); what it raises cancels.
            sink: takes (first row, rows [n,W,3]) from the top to the bottom, dtype as rgb, instead of a result; then
                nothing is in memory whole (but with "adain"). What it raises cancels.
            max_pixels: limit of the result and of the x4 that is made first.

        Returns:
            [round(H*scale), round(W*scale), 3], dtype as rgb; None with a sink. R = G = B in every pixel if it is so
            in rgb.

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
        size = output_size(rgb.shape[0], rgb.shape[1], scale, max_pixels)
        if self._core is not None:
            given: dict[str, Any] = {"seed": seed, "tile": tile or 0, "scale": scale, "color": color, "batch": batch}
            readable = rgb if min(rgb.strides) >= 0 else rgb.copy()
            return self._core.upscale(readable, progress=progress, max_pixels=max_pixels, sink=sink, **given)
        with self._alone():
            restorer = Restorer(self.manifest, self.sessions, rgb, seed, longest, batch, progress)
            bands = finish(restorer.bands(), rgb, restorer.size, size, color)
            if sink is not None:
                for first, rows in bands:
                    sink(first, rows)
                return None
            result = np.empty((*size, 3), rgb.dtype)
            for first, rows in bands:
                result[first : first + len(rows)] = rows
            return result

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One picture at a time: sessions keep buffers."""
        if self._user == threading.get_ident():
            raise RuntimeError("upscale was called from progress or sink of the same Upscaler; load another one")
        with self._lock:
            self._user = threading.get_ident()
            try:
                yield
            finally:
                self._user = 0

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


def _check_fit(folder: Path, manifest: Manifest, backend: Backend) -> None:
    """Refuse a folder that the backend does not run, with the command that makes one.

    Raises:
        RuntimeError: the backend is not installed at all.
        FolderError: it is.
    """
    if manifest.backend in backend.runs:
        return
    if backend.name in PLANS:
        from engine.runtime.backends.tensorrt import load_module

        load_module(backend.name)  # first things first
    if backend.name not in FOLDERS:
        raise FolderError(
            f"{folder} is for {manifest.backend}; {backend.name} runs folders as python -m engine.export writes them"
        )
    source = folder if manifest.backend == "onnx" else "ONNX_FOLDER"
    raise FolderError(
        f"{folder} is for {manifest.backend}, not {backend.name}; "
        f"build it: python -m engine.build {source} --backend {backend.name} --out DIR"
    )


def output_size(height: int, width: int, scale: float, max_pixels: int = MAX_OUTPUT_PIXELS) -> tuple[int, int]:
    """The size of a result.

    Raises:
        ValueError: a scale that is no positive number, or a result or an x4 of more than `max_pixels`.
    """
    if not SCALES[0] <= scale <= SCALES[1]:
        raise ValueError(f"scale must be between {SCALES[0]} and {SCALES[1]}; got {scale}")
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    largest = max(size[0] * size[1], 16 * height * width)
    if largest > max_pixels:
        raise ValueError(
            f"{width}x{height} upscaled is {largest / 1e6:.0f} megapixels; at most {max_pixels / 1e6:.0f} fit"
        )
    return size
