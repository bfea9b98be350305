"""What a path is that is not an engine folder, and the commands that make one of it.

csrc/src/folder/foreign.cpp says the same in C++.
"""

from __future__ import annotations

from pathlib import Path

_EXPORT = "python -m engine.export {} --out DIR"
_WEIGHTS = (".pth", ".safetensors", ".param", ".pkl")  # of files that gdpo.convert takes


def is_engine(path: Path) -> bool:
    """Whether an engine folder was written there; it may be damaged."""
    return (path / "manifest.json").is_file() and (path / "manifest.sha256").is_file()


def is_checkpoint(path: Path) -> bool:
    """Whether it is a checkpoint of a run of gdpo.train, which is no model."""
    return (path / "state.json").is_file() and (path / "trainable.safetensors").is_file()


def is_run(path: Path) -> bool:
    """Whether it is the folder of a run of gdpo.train."""
    return (path / "metrics.jsonl").is_file() and not is_generator(path)


def is_generator(path: Path) -> bool:
    """Whether it is a model as gdpo.train, gdpo.convert and diffusers write it."""
    return (path / "unet").is_dir()


def explain(path: Path) -> str:
    """One line about a path that is not an engine folder: what it is, and how to get an engine folder."""
    if str(path).startswith("hub:"):
        return f"{path}: a model on the Hub is not an engine folder; make one of it: {_EXPORT.format(path)}"
    if not path.exists():
        return f"{path}: no such folder; an engine folder is made by python -m engine.export"
    if not path.is_dir():
        return _explain_file(path)
    if is_checkpoint(path):
        return (
            f"{path}: this is a checkpoint of a training run, not an engine folder; make a model of it: "
            f"python -m gdpo.merge {path} --out MODEL; then an engine folder of that: {_EXPORT.format('MODEL')}"
        )
    if is_run(path):
        what = f"{path}: this is the folder of a training run, not an engine folder; make one of its model: "
        if is_generator(path / "model"):
            return what + _EXPORT.format(path / "model")
        return what + f"python -m gdpo.merge {path}/checkpoint-N --out MODEL; then {_EXPORT.format('MODEL')}"
    if is_generator(path):
        return (
            f"{path}: this is a generator's folder, not an engine folder; make one of it: "
            f"{_EXPORT.format(path)}; then, for speed, python -m engine.build DIR --out ENGINE"
        )
    if not any(path.iterdir()):
        return f"{path}: this folder is empty; an engine folder is made by python -m engine.export"
    return (
        f"{path}: no manifest.json with its manifest.sha256 in it, so it is not an engine folder; "
        "one is made by python -m engine.export"
    )


def _explain_file(path: Path) -> str:
    parent = path.parent
    if is_engine(parent):
        return f"{path}: this is a file of an engine folder; name the folder: {parent}"
    if is_checkpoint(parent):
        return explain(parent)
    what = f"{path}: this is a file, not an engine folder; "
    if path.suffix.lower() in _WEIGHTS:
        return (
            f"{what}if it holds a network's weights, make a model of it: python -m gdpo.convert {path} --out MODEL; "
            f"then an engine folder of that: {_EXPORT.format('MODEL')}"
        )
    return f"{what}one is made by python -m engine.export"
