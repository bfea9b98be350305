"""Published x4 networks from files in ncnn's format (a text of layers, and their weights one after another).

Two architectures are read, both of Real-ESRGAN (Wang et al. 2021, arXiv 2107.10833): RRDBNet (also RealSR-DF2K, Ji et
al. 2020) and the compact network. Nothing in the files is executed.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.io.files import naming

Layers = list[tuple[Tensor, ...]]
_HALF = 0x01306B47  # ncnn's mark of fp16 weights


def read_ncnn(param: str, raw: bytes, name: str = "the network") -> Layers:
    """(weight [out,in,k,k], bias [out]) of each convolution and (slope [C],) of each PReLU, in order.

    Args:
        param: the text of the .param file. raw: the .bin file. name: for messages.

    Raises:
        ValueError: the two do not fit each other.
    """
    position = 0

    def take(dtype: type, count: int) -> Tensor:
        nonlocal position
        values = np.frombuffer(raw, dtype, count, position).astype(np.float32)
        position += (count * np.dtype(dtype).itemsize + 3) // 4 * 4
        return torch.from_numpy(values)

    layers: Layers = []
    try:
        for line in param.splitlines()[2:]:
            words = line.split()
            options = dict(w.split("=", 1) for w in words[4 + int(words[2]) + int(words[3]) :] if "=" in w)
            if words[0] == "Convolution":
                half = struct.unpack_from("<I", raw, position)[0] == _HALF
                position += 4
                out, kernel = int(options["0"]), int(options["1"])
                weight = take(np.float16 if half else np.float32, int(options["6"]))
                layers.append((weight.view(out, -1, kernel, kernel), take(np.float32, out)))
            elif words[0] == "PReLU":
                layers.append((take(np.float32, int(options["0"])),))
    except (ValueError, KeyError, IndexError, RuntimeError, struct.error) as error:
        raise ValueError(f"{name}: weights and layers do not fit ({str(error).splitlines()[0]})") from None
    if position != len(raw):
        raise ValueError(f"{name}: the .bin holds {len(raw)} bytes, its layers {position}")
    return layers


def load_ncnn(stem: str | Path) -> Layers:
    """The layers of STEM.param and STEM.bin.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    files = [Path(f"{stem}{suffix}") for suffix in (".param", ".bin")]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; an ncnn network is a .param and a .bin file")
    with naming(stem):
        return read_ncnn(files[0].read_text("utf-8", errors="replace"), files[1].read_bytes(), str(stem))


def network(layers: Layers) -> nn.Module:
    """[B,3,h,w] in [0,1] -> [B,3,4h,4w], not clamped: the architecture is told by whether there are PReLUs."""
    return (CompactNet if any(len(layer) == 1 for layer in layers) else RRDBNet)(layers).eval()


class _Stack(nn.Module):
    """Numbered layers of weights, frozen."""

    def __init__(self, layers: Sequence[tuple[Tensor, ...]]):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in layer) for layer in layers
        )

    def of(self, i: int) -> tuple[Tensor, ...]:
        return tuple(self.layers[i].parameters())

    def conv(self, i: int, x: Tensor) -> Tensor:
        weight, bias = self.of(i)
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
        for i in range(len(self.layers)):
            y = self.conv(i, y) if len(self.of(i)) == 2 else F.prelu(y, self.of(i)[0])
        return F.pixel_shuffle(y, 4) + F.interpolate(x, scale_factor=4, mode="nearest")
