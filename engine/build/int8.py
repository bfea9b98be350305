"""Static INT8 of an exported folder: its convolutions quantized, if the pictures stay what they were.

The graph keeps its float32 inputs and outputs and stays ONNX (QDQ), so ONNX Runtime and OpenVINO both run it, in Python
and C++. Weights are quantized per channel, activations by what they are on the calibration pictures. The first
convolutions and those that feed the pixel shuffle stay in float32, and more of them from both ends until the gate is
passed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.build.weights import widened
from engine.io.files import sha256
from engine.runtime.backends import Waiting
from engine.runtime.backends.onnxruntime import open_session
from engine.runtime.manifest import Graph, Manifest
from engine.runtime.nodes import is_grouped
from engine.runtime.resample import resize
from engine.runtime.upscaler import Upscaler

MEAN_DB, WORST_LEVELS = 48.0, 4.0  # the gate
_WINDOW, _FEWEST = 96, 4


@dataclass(frozen=True)
class Gate:
    """How far INT8 pictures are from those of float32, over pictures that calibration did not see.

    Attributes:
        mean_db: mean PSNR, in dB.
        worst_levels: the 99.9th percentile of |difference| of the worst picture, of 255 levels.
    """

    mean_db: float
    worst_levels: float

    @property
    def passed(self) -> bool:
        return self.mean_db >= MEAN_DB and self.worst_levels <= WORST_LEVELS

    def __str__(self) -> str:
        return f"{self.mean_db:.1f} dB in the mean, {self.worst_levels:.1f} levels at worst"


class Recorder(Waiting):
    """A session that keeps what it is given."""

    def __init__(self, session: Any):
        self.session = session
        self.feeds: list[dict[str, np.ndarray]] = []

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        self.feeds.append({name: array.copy() for name, array in inputs.items()})
        return self.session(inputs)


def windows(pictures: list[np.ndarray]) -> list[np.ndarray]:
    """Parts of pictures [H,W,3] uint8 that differ in kind: the middle, a corner, and the whole, reduced."""
    found = []
    for picture in pictures:
        height, width = picture.shape[:2]
        y, x = max(0, (height - _WINDOW) // 2), max(0, (width - _WINDOW) // 2)
        found += [picture[y : y + _WINDOW, x : x + _WINDOW], picture[:_WINDOW, :_WINDOW]]
        ratio = min(1.0, _WINDOW / max(height, width))
        found.append(resize(picture, (max(16, round(height * ratio)), max(16, round(width * ratio)))))
    return [np.ascontiguousarray(w) for w in found]


def fingerprint(pictures: list[np.ndarray]) -> str:
    """A hash of pictures, for the manifest: other pictures make another graph."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(str(picture.shape).encode() + picture.tobytes())
    return digest.hexdigest()


def quantize(
    exported: Manifest, source: Path, folder: Path, pictures: list[np.ndarray], log: Callable[[str], None]
) -> tuple[dict[str, Graph], dict[str, Any]]:
    """Write the INT8 graphs of an exported folder.

    Args:
        exported, source: a folder of backend onnx in fp32, with one graph ("generator").
        folder: where the files go.
        pictures: [H,W,3] uint8; every second one is for calibration, the others are for the gate.
        log: told what is tried.

    Returns:
        The manifest's entries of the graphs, and the gate's figures.

    Raises:
        ValueError: a folder of another kind, too few pictures, or a gate that no choice of layers passes.
    """
    if exported.precision != "fp32" or list(exported.graphs) != ["generator"]:
        raise ValueError(
            f"int8 is made of fp32 folders with one graph, generator.onnx; {source} is {exported.precision} and has "
            f"{', '.join(exported.graphs)}"
        )
    if len(pictures) < _FEWEST:
        raise ValueError(f"int8 needs at least {_FEWEST} calibration pictures; got {len(pictures)}")
    session = open_session(exported, source, "generator", "cpu")
    recorder = Recorder(session)
    for picture in windows(pictures[::2]):
        Upscaler(exported, {"generator": recorder}, "onnx").upscale(picture, color="none")
    seen = windows(pictures[1::2])
    reference = Upscaler(exported, {"generator": session}, "onnx")
    wanted = [reference.upscale(picture, color="none") for picture in seen]
    entry, tried = exported.graphs["generator"], []
    outer, inner = convolutions(source / entry.file)
    for more in range(max(1, len(inner) // 2)):
        excluded = outer + inner[:more] + inner[len(inner) - more :]
        made = _write(source / entry.file, folder / entry.file, recorder.feeds, excluded)
        graph = replace(entry, sha256=sha256(made), data={})
        candidate = open_session(replace(exported, graphs={"generator": graph}), folder, "generator", "cpu")
        ours = Upscaler(exported, {"generator": candidate}, "onnx")
        gate = _compare([ours.upscale(picture, color="none") for picture in seen], wanted)
        tried.append(gate)
        log(f"int8: {len(excluded)} convolutions in float32: {gate}")
        if gate.passed:
            return {"generator": graph}, {
                "int8_mean_db": round(gate.mean_db, 2),
                "int8_worst_levels": round(gate.worst_levels, 2),
                "int8_convolutions_in_float": len(excluded),
            }
    best = max(tried, key=lambda g: g.mean_db)
    raise ValueError(
        f"int8 pictures differ too much from fp32 ({best}; allowed: at least {MEAN_DB:.0f} dB and at most "
        f"{WORST_LEVELS:.0f} levels): calibrate with more and more varied pictures, or keep fp32"
    )


def convolutions(file: Path) -> tuple[list[str], list[str]]:
    """Names of a graph's convolutions: those that stay in float32 in any case, and, in order, the others.

    The former are those next to its input or output, and those of each channel by itself, which are no work.
    """
    import onnx

    graph = onnx.load(str(file), load_external_data=False).graph
    every = [node for node in graph.node if node.op_type == "Conv"]
    single = {node.name for node in every if is_grouped(node)}
    nodes = [node for node in every if node.name not in single]
    maker = {out: node for node in graph.node for out in node.output}

    def feeding(name: str) -> Iterator[Any]:
        """The convolutions from which a value comes, with none between."""
        node = maker.get(name)
        if node is None:
            return
        if node.op_type == "Conv" and node.name not in single:
            yield node
            return
        for source in node.input:
            yield from feeding(source)

    outer = {node.name for node in nodes if next(feeding(node.input[0]), None) is None}
    outer |= {node.name for output in graph.output for node in feeding(output.name)}
    outer |= single
    return sorted(outer), [node.name for node in nodes if node.name not in outer]


def _write(file: Path, out: Path, feeds: list[dict[str, np.ndarray]], excluded: list[str]) -> Path:
    """The quantized graph of `file`, in one file."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.left = iter(feeds)

        def get_next(self):
            return next(self.left, None)

    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # advice to pre-process, which the export has done
    try:
        quantize_static(
            widened(onnx.load(str(file))),
            str(out),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=excluded,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    finally:
        logging.getLogger().setLevel(level)
    return out


def _compare(ours: list[np.ndarray], wanted: list[np.ndarray]) -> Gate:
    decibel, worst = [], 0.0
    for a, b in zip(ours, wanted):
        difference = np.abs(a.astype(np.float32) - b.astype(np.float32))
        decibel.append(min(99.0, 10 * np.log10(255**2 / max(float(np.square(difference).mean()), 1e-9))))
        worst = max(worst, float(np.percentile(difference, 99.9)))
    return Gate(float(np.mean(decibel)), worst)
