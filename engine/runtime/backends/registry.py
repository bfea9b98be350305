"""The backends: what each runs, where it is, which options it takes. csrc/src/backends/registry.cpp is the same table.

A backend's module is imported when it is asked for. A new backend is a module with `open_session` and a
row here.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.runtime.backends import Session
    from engine.runtime.manifest import Manifest

GENERATOR = "generator"  # what torch runs: a generator's folder, not an engine folder


@dataclass(frozen=True)
class Backend:
    """One way to run a model.

    Attributes:
        name: as users write it, and as a manifest names what its folder was built for.
        module: where its `open_session` is.
        runs: what folders may be built for, or GENERATOR.
        options: keyword arguments that its `open_session` takes:
            threads: number of CPU threads; 0 lets the backend choose.
            precision: "fp32" or "bf16", of the computation; otherwise it is the folder's.
            compiled: torch.compile, for one size of tile.
            trust_plan: load a plan, which is executable code, that this user did not build.
            whole_batches: hand a batch to the graph in one piece on a CPU too, to check the graph.
        is_plan: its graphs are executable code, made for one GPU.
        in_cpp: the C++ path runs it too.
    """

    name: str
    module: str
    runs: tuple[str, ...]
    options: frozenset[str]
    is_plan: bool = False
    in_cpp: bool = False

    def open(
        self, folder: Path, manifest: Manifest | None, device: str | None = None, **options: Any
    ) -> tuple[Manifest, dict[str, Session]]:
        """All graphs of a folder.

        Args:
            folder: an engine folder, or a generator's folder for torch.
            manifest: of the folder; None for torch, which makes one.
            device: "cpu", "cuda" or "cuda:N"; None lets the backend choose.
            options: of those in `self.options`.

        Raises:
            FolderError: the files do not fit the manifest, are stale or are not trusted.
            RuntimeError: the backend is not installed or cannot run here; the message names the remedy.
            ValueError: a device that it does not run on.
        """
        if manifest is None:
            try:
                module = import_module(self.module)
            except ImportError as error:
                raise RuntimeError(
                    f"backend {self.name} is not installed here ({error}); pip install 'gdpo-sr[export]'"
                ) from error
            made, session = module.open_generator(folder, device, **options)
            return made, {"generator": session}
        opener = import_module(self.module).open_session
        return manifest, {name: opener(manifest, folder, name, device, **options) for name in manifest.graphs}


_ROWS = (
    Backend(
        "onnx",  # as exported, run by ONNX Runtime
        "engine.runtime.backends.onnxruntime",
        runs=("onnx",),
        options=frozenset({"threads", "whole_batches"}),
        in_cpp=True,
    ),
    Backend(
        "onnxruntime",
        "engine.runtime.backends.onnxruntime",
        runs=("onnxruntime", "onnx"),
        options=frozenset({"threads", "whole_batches"}),
        in_cpp=True,
    ),
    Backend(
        "openvino",
        "engine.runtime.backends.openvino",
        runs=("onnx",),
        options=frozenset({"threads", "precision"}),
    ),
    Backend(
        "tensorrt",
        "engine.runtime.backends.tensorrt",
        runs=("tensorrt",),
        options=frozenset({"trust_plan"}),
        is_plan=True,
    ),
    Backend(
        "tensorrt-rtx",
        "engine.runtime.backends.tensorrt",
        runs=("tensorrt-rtx",),
        options=frozenset({"trust_plan"}),
        is_plan=True,
    ),
    Backend(
        "torch",
        "engine.export.torch_backend",
        runs=(GENERATOR,),
        options=frozenset({"threads", "precision", "compiled"}),
    ),
)
BACKENDS = {backend.name: backend for backend in _ROWS}
FOLDERS = tuple(name for name, backend in BACKENDS.items() if name in backend.runs)  # what folders are built for
PLANS = tuple(name for name, backend in BACKENDS.items() if backend.is_plan)
IN_CPP = tuple(name for name, backend in BACKENDS.items() if backend.in_cpp)
