"""The backends: what each runs, where it is, which options it takes. csrc/src/backends/registry.cpp has those of C++.

A backend's module is imported when it is asked for. A new backend is a module with `open_session` and a
row here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.runtime.backends import Session
    from engine.runtime.manifest import Manifest

# What two backends run that is not an engine folder: torch a generator's folder, triton a model on a server.
GENERATOR, SERVER = "generator", "server"


@dataclass(frozen=True)
class Backend:
    """One way to run a model.

    Attributes:
        name: as users write it, and as a manifest names what its folder was built for.
        module: where its `open_session` is.
        runs: what folders may be built for, or GENERATOR, or SERVER.
        options: keyword arguments that its `open_session` takes:
            threads: number of CPU threads; 0 lets the backend choose.
            precision: "fp32" or "bf16", of the computation; otherwise it is the folder's.
            compiled: torch.compile, for one size of tile.
            trust_plan: load a plan, which is executable code, that this user did not build.
            url, timeout: of the server, and seconds for the answer to a batch.
            whole_batches: hand a batch to the graph in one piece on a CPU too, to check the graph.
        is_plan: its graphs are executable code, made for one GPU.
        in_cpp: the C++ path runs it too.
        extra: of the package, that brings what its module imports.
    """

    name: str
    module: str
    runs: tuple[str, ...]
    options: frozenset[str]
    is_plan: bool = False
    in_cpp: bool = False
    extra: str | None = None

    @property
    def runs_folders(self) -> bool:
        """Whether it runs engine folders."""
        return not {GENERATOR, SERVER} & set(self.runs)

    def open(
        self, model: str | os.PathLike[str], manifest: Manifest | None, device: str | None = None, **options: Any
    ) -> tuple[Manifest, dict[str, Session]]:
        """All graphs of a model.

        Args:
            model: an engine folder; a generator's folder for torch; a model's name on its server for triton.
            manifest: of the folder; None for torch, which makes one, and for triton, whose server has it.
            device: "cpu", "cuda" or "cuda:N"; None lets the backend choose.
            options: of those in `self.options`.

        Raises:
            FolderError: the files do not fit the manifest, are stale or are not trusted.
            RuntimeError: the backend is not installed or cannot run here; the message names the remedy.
            ValueError: a device that it does not run on.
        """
        module = self._import()
        if SERVER in self.runs:
            return module.open_server(str(model), device, **options)
        folder = Path(model)
        if manifest is None:
            made, session = module.open_generator(folder, device, **options)
            return made, {"generator": session}
        opener = module.open_session
        return manifest, {name: opener(manifest, folder, name, device, **options) for name in manifest.graphs}

    def _import(self) -> ModuleType:
        try:
            return import_module(self.module)
        except ImportError as error:
            if self.extra is None:
                raise
            raise RuntimeError(
                f"backend {self.name} is not installed here ({error}); pip install 'gdpo-sr[{self.extra}]'"
            ) from error


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
        extra="export",
    ),
    Backend(
        "triton",  # Triton Inference Server
        "engine.runtime.backends.triton",
        runs=(SERVER,),
        options=frozenset({"url", "timeout"}),
        extra="tritonclient",
    ),
)
BACKENDS = {backend.name: backend for backend in _ROWS}
FOLDERS = tuple(name for name, backend in BACKENDS.items() if name in backend.runs)  # what folders are built for
PLANS = tuple(name for name, backend in BACKENDS.items() if backend.is_plan)
IN_CPP = tuple(name for name, backend in BACKENDS.items() if backend.in_cpp)
