"""ONNX Runtime's optimised model of an exported graph."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from engine.io.files import sha256
from engine.runtime.manifest import Graph, Manifest


@contextmanager
def _disk_errors(file: Path) -> Iterator[None]:
    """Inside, a file that ONNX Runtime cannot write is an OSError that names it.

    Itself it says "SystemError : 28" where it cannot begin, and that it cannot serialize where it cannot end.
    """
    try:
        yield
    except Exception as error:
        if number := re.search(r"SystemError : (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from None
        if "serialization failed" in str(error):
            raise OSError(errno.EIO, "cannot be written whole; is the disk full?", str(file)) from None
        raise


def optimise(exported: Manifest, source: Path, name: str, folder: Path) -> Graph:
    """ONNX Runtime's optimised model. Layouts that depend on the CPU are left to the machine that loads it."""
    import onnxruntime

    from engine.runtime.backends.onnxruntime import check_precision, refused, session_options

    entry = exported.graphs[name]
    check_precision(exported, source)
    model, data = exported.read(source, name)
    settings = session_options(0)
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    settings.optimized_model_filepath = str(folder / entry.file)
    hashes = {}
    if data:
        names = list(data)
        settings.add_external_initializers_from_files_in_memory(
            names, list(data.values()), [len(data[n]) for n in names]
        )
        side = f"{entry.file}.data"
        settings.add_session_config_entry("session.optimized_model_external_initializers_file_name", side)
    with _disk_errors(folder / entry.file), refused(source / entry.file):
        onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    if data:
        hashes = {side: sha256(folder / side)}
    return replace(entry, sha256=sha256(folder / entry.file), data=hashes)
