"""Engine folders with a synthetic model, good and bad, and what Python makes of a picture with the good one.

python tests/support/folders.py OUT
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engine import Upscaler
from engine.runtime.manifest import Geometry, Graph, Manifest, Profile, Tensor

CASES = {"tiled": {}, "adain": {"color": "adain"}, "other": {"scale": 2.5}}


def model(image: str = "image") -> bytes:
    """output = image sharpened by a 3x3 convolution, plus a little of the noise at full resolution."""
    rng = np.random.default_rng(0)
    kernel = (
        rng.normal(0, 0.05, (3, 3, 3, 3)) + np.eye(3)[:, :, None, None] * (np.arange(9) == 4).reshape(3, 3)
    ).astype(np.float32)
    planes = {
        image: ["batch", 3, "height", "width"],
        "noise": ["batch", 48, "latent_height", "latent_width"],
        "output": ["batch", 3, "height", "width"],
    }
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in planes.items()]
    nodes = [
        helper.make_node("Conv", [image, "kernel"], ["sharp"], pads=[1, 1, 1, 1]),
        helper.make_node("DepthToSpace", ["noise"], ["grain"], blocksize=4),
        helper.make_node("Mul", ["grain", "amount"], ["little"]),
        helper.make_node("Add", ["sharp", "little"], ["output"]),
    ]
    weights = [numpy_helper.from_array(kernel, "kernel"), numpy_helper.from_array(np.float32(0.02), "amount")]
    graph = helper.make_graph(nodes, "synthetic", infos[:2], infos[2:], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(made)
    return made.SerializeToString()


def write_folder(folder: Path, content: bytes, data: bytes | None = None, profile: Profile | None = None) -> Path:
    """A folder whose manifest fits `content`, whatever that is, and the weights `data` beside it."""
    folder.mkdir(parents=True)
    (folder / "generator.onnx").write_bytes(content)
    if data is not None:
        (folder / "generator.onnx.data").write_bytes(data)
    graph = Graph(
        "generator.onnx",
        hashlib.sha256(content).hexdigest(),
        (
            Tensor("image", ("batch", 3, "height", "width")),
            Tensor("noise", ("batch", 48, "latent_height", "latent_width")),
        ),
        Tensor("output", ("batch", 3, "height", "width")),
        {} if data is None else {"generator.onnx.data": hashlib.sha256(data).hexdigest()},
    )
    geometry = Geometry(scale=4, factor=4, channels=48, multiple=16, overlap=64)
    Manifest("onnx", "opset 18", "fp32", geometry, profile or Profile(), {"generator": graph}).save(folder)
    return folder


def write_ppm(path: Path, pixels: np.ndarray) -> None:
    path.write_bytes(f"P6\n{pixels.shape[1]} {pixels.shape[0]}\n255\n".encode() + pixels.tobytes())


def make(out: Path) -> None:
    plain = write_folder(out / "plain", model())
    write_folder(out / "inputs", model("picture"))
    write_folder(out / "truncated", model()[:-200])
    split = onnx.load_model_from_string(model())
    onnx.save_model(
        split, out / "split.onnx", save_as_external_data=True, location="generator.onnx.data", size_threshold=0
    )
    write_folder(out / "external", (out / "split.onnx").read_bytes(), (out / "generator.onnx.data").read_bytes())
    (out / "empty").mkdir()
    for name in ("edited", "stale", "linked"):
        shutil.copytree(plain, out / name)
    manifest = json.loads((plain / "manifest.json").read_text())
    (out / "edited" / "manifest.json").write_text(json.dumps(manifest | {"precision": "fp16"}))
    (out / "stale" / "generator.onnx").write_bytes(model()[:-1] + b"\0")
    (out / "linked" / "generator.onnx").unlink()
    (out / "linked" / "generator.onnx").symlink_to(plain / "generator.onnx")
    y, x = np.mgrid[:61, :83]
    grain = np.random.default_rng(1).integers(0, 40, (61, 83, 3))
    picture = (np.stack([2 * x, 3 * y, x + y], axis=2) + grain).clip(0, 255).astype(np.uint8)
    write_ppm(out / "in.ppm", picture)
    up = Upscaler.load(plain, core=False)
    for name, options in CASES.items():
        write_ppm(out / f"expected-{name}.ppm", up.upscale(picture, seed=7, tile=24, **options))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
