"""The C++ upscaler (csrc/, built as engine._core) behind engine.Upscaler: where it is and what it can run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from engine.runtime.backends.registry import IN_CPP
from engine.runtime.manifest import Manifest

if TYPE_CHECKING:
    from engine._core import Upscaler


def unusable(manifest: Manifest, backend: str) -> str | None:
    """Why the C++ path cannot run a folder here, or None where it can."""
    if backend not in IN_CPP:
        return f"it runs {' and '.join(IN_CPP)}, not {backend}"
    if manifest.precision == "bf16":
        return "ONNX Runtime has no bf16 convolution on a CPU"
    if importlib.util.find_spec("engine._core") is None:
        return "engine._core was not built (GDPO_BUILD_CSRC=1 pip install ... shows why)"
    if library() is None:
        return "there is no libonnxruntime.so in the installed onnxruntime package"
    return None


def library() -> Path | None:
    """The shared library inside the onnxruntime package: both paths run the same one."""
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted((Path(spec.origin).parent / "capi").glob("libonnxruntime.so*"))), None)


def open_core(
    manifest: Manifest, folder: Path, backend: str, device: str | None, threads: int, *, required: bool
) -> Upscaler | None:
    """The folder on the C++ path, or None where that cannot run it.

    Raises:
        RuntimeError: it cannot and is `required`.
        FolderError: as Python's path.
    """
    reason = unusable(manifest, backend)
    if reason:
        if required:
            raise RuntimeError(f"the C++ path cannot run here: {reason}")
        return None
    from engine._core import Upscaler

    return Upscaler(str(folder), backend=backend, device=device, threads=threads, library=str(library()))
