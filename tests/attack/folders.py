"""Hostile engine folders whose hashes are right: manifests changed as JSON, graphs changed as ONNX. Python and C++."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from engine.runtime import manifest as manifests
from engine.runtime.upscaler import Upscaler
from tests.attack.harness import Quiet, Section, Trial
from tests.support.folders import model, write_folder
from tests.support.pictures import gradient

STRANGE = (None, True, False, 0, -1, 1, 7, 10**30, 0.5, 1e308, "", "x", "a\nb", "\ud800", "../x", [], {}, [[]],
           {"": None}, [1, 2, 3], "batch", 65536, 16, "0" * 64)  # fmt: skip
OPERATORS = ("Conv", "DepthToSpace", "Mul", "Add", "Sub", "Relu", "Identity", "Reshape", "Concat", "Transpose", "Cast",
             "Gather", "Slice", "Loop", "Nonsense")  # fmt: skip


def places(content: Any, path: tuple = ()):
    """The path of every value in nested objects and lists."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def strange_manifest(content: dict, rng: random.Random) -> dict:
    """One to three values replaced, removed, doubled or swapped; it stays JSON."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        found = list(places(content))
        if not found:
            break
        path, other = rng.choice(found), rng.choice(found)
        inside = content
        for key in path[:-1]:
            inside = inside[key]
        kind = rng.randrange(5)
        if kind == 0:
            del inside[path[-1]]
        elif kind == 1 and isinstance(inside[path[-1]], int):
            inside[path[-1]] += rng.choice((-1, 1, 1000, 2**31, 2**63))
        elif kind == 2:
            value: Any = content
            for key in other:
                value = value[key]
            inside[path[-1]] = json.loads(json.dumps(value))
        else:
            inside[path[-1]] = json.loads(json.dumps(rng.choice(STRANGE)))
    return content


def strange_graph(content: bytes, rng: random.Random) -> bytes:
    """One to three changes of nodes, names, attributes, weights or inputs; it stays a protocol buffer."""
    made = onnx.load_model_from_string(content)
    graph = made.graph
    for _ in range(rng.choice((1, 1, 2, 3))):
        node, weight = rng.choice(graph.node), rng.choice(graph.initializer)
        names = [n for each in graph.node for n in (*each.input, *each.output)]
        kind = rng.randrange(9)
        if kind == 0:
            node.op_type = rng.choice(OPERATORS)
        elif kind == 1 and node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice([*names, "", "x" * 1000])
        elif kind == 2:
            node.output[0] = rng.choice([*names, "", "output"])
        elif kind == 3:
            value = rng.choice((0, -1, 2**31, 3, 2.5, "x", [1, 2], [2**40] * 4, [0, 0, 0, 0]))
            name = rng.choice(
                ("pads", "strides", "group", "blocksize", "kernel_shape", "dilations", "perm", "axis", "to")
            )
            kept = [a for a in node.attribute if a.name != name]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute(name, value)])
        elif kind == 4:
            at = rng.randrange(len(weight.dims) + 1)
            weight.dims.insert(at, rng.choice((0, -1, 1, 2, 2**31, 2**62)))
        elif kind == 5:
            weight.data_type = rng.randrange(0, 24)
        elif kind == 6:
            weight.raw_data = weight.raw_data[: rng.randrange(len(weight.raw_data) + 1)]
        elif kind == 7:
            shape = rng.choice([*graph.input, *graph.output]).type.tensor_type.shape
            if shape.dim:
                shape.dim[rng.randrange(len(shape.dim))].dim_value = rng.choice((0, -1, 1, 16, 2**40))
        else:
            made.opset_import[0].version = rng.choice((0, -1, 1, 9, 12, 99, 2**40))
    return made.SerializeToString()


def rewritten(folder: Path, manifest: dict) -> None:
    text = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(text)
    (folder / "manifest.sha256").write_bytes(manifests._checksum(text))


def both_ways(work: Path, folder: Path) -> None:
    """Load it and upscale a picture, in Python and in C++: the same pixels, or a line from both."""
    picture, outcomes = gradient(8, 8), []
    built = importlib.util.find_spec("engine._core") is not None
    for core in (False, True) if built else (False,):
        with Quiet(work):
            try:
                made = Upscaler.load(folder, core=core).upscale(picture)
            except (ValueError, RuntimeError, OSError, MemoryError) as error:
                assert len(str(error)) < 3000, str(error)[:200]
                made = None
        if made is not None:
            assert made.dtype == np.uint8 and made.ndim == 3 and made.shape[2] == 3
        outcomes.append(made)
    if len(outcomes) == 2:
        python, cpp = outcomes
        assert (python is None) == (cpp is None), f"Python {shown(python)}, C++ {shown(cpp)}"
        assert python is None or np.array_equal(python, cpp)


def shown(made: Any) -> str:
    return "refused it" if made is None else f"made {made.shape}"


def json_aware(work: Path) -> Trial:
    good = write_folder(work / "good", model())
    whole = (good / "manifest.json").read_text()

    def trial(number: int) -> None:
        rewritten(good, strange_manifest(json.loads(whole), random.Random(number)))
        both_ways(work, good)

    return trial


def onnx_aware(work: Path) -> Trial:
    good = write_folder(work / "good", model())
    whole = json.loads((good / "manifest.json").read_text())

    def trial(number: int) -> None:
        content = strange_graph(model(), random.Random(number))
        (good / "generator.onnx").write_bytes(content)
        manifest = json.loads(json.dumps(whole))
        manifest["graphs"]["generator"]["sha256"] = hashlib.sha256(content).hexdigest()
        rewritten(good, manifest)
        both_ways(work, good)

    return trial


SECTIONS = [
    Section("manifests", "manifests changed as JSON, hashed again", 2500, json_aware, chunk=50, seconds=5, mib=1000),
    Section("graphs", "graphs changed as ONNX, hashed again", 2500, onnx_aware, chunk=25, seconds=20, mib=4000),
]
