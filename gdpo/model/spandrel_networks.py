"""Published super-resolution networks from their files: PyTorch's, safetensors and ncnn's.

spandrel (MIT) tells some forty architectures by the names and shapes of their weights. Files are read as data: a
pickle may name nothing but tensors. Its extra is `gdpo-sr[spandrel]`.
"""

from __future__ import annotations

import importlib
import re
import sys
import types
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.io.files import sha256
from gdpo.model.ncnn import Layers, load_ncnn
from gdpo.model.parts import first_line, read_tensors

PUBLISHED = {  # name -> (asset of gdpo.assets, stem of the files in it)
    "real-esrgan-x4plus": ("real-esrgan", "REALESRGAN_X4PLUS_UP4X"),
    "real-esrgan-animevideov3": ("real-esrgan", "REALESRGAN_ANIMAVIDEOV3_UP4X"),
    "realsr-df2k": ("realsr", "REALSR_DF2K_UP4X"),
}
SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors", ".param", ".bin")
SCALES = (2, 4)
State = dict[str, Tensor]


class Network(NamedTuple):
    """A published network, frozen.

    Attributes:
        model: [B,3,h,w] in [0,1] -> [B,3,scale*h,scale*w], not clamped.
        architecture: spandrel's name of it.
        scale: 2 or 4.
        multiple: h and w must be multiples of it, as far as is known.
    """

    model: nn.Module
    architecture: str
    scale: int
    multiple: int


def is_network(name: str) -> bool:
    """Whether a name or a file is a network's: one of PUBLISHED, or a file with one of SUFFIXES."""
    return name in PUBLISHED or Path(name).suffix.lower() in SUFFIXES


def load_network(file: Path) -> tuple[Network, dict[str, str]]:
    """A network and where it is from ("file", "sha256").

    Args:
        file: .pth, .pt, .ckpt, .safetensors, or ncnn's .param or .bin, which has the other beside it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, holds code, or is not a x2 or x4 network of colour pictures.
        RuntimeError: spandrel is not installed.
    """
    ncnn = file.suffix.lower() in (".param", ".bin")
    file = file.with_suffix(".bin") if ncnn else file
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a network's weights ({', '.join(SUFFIXES)})")
    state = state_of_ncnn(load_ncnn(file.with_suffix(""))) if ncnn else read_state(file)
    return network_of(state, str(file)), {"file": file.name, "sha256": sha256(file)}


def read_state(file: Path) -> State:
    """The weights in a file of PyTorch or safetensors, by name. Nothing in it is executed.

    Raises:
        ValueError: it holds something else.
    """
    if file.suffix.lower() == ".safetensors":
        return read_tensors(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old formats
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # hostile bytes can raise anything; torch's own advice (load it unsafely) is withheld
        named = re.search(r"(?:Unsupported global: GLOBAL|Trying to [\w ]*?) ?([\w.]+\.[\w.]+)", str(error))
        if "TorchScript" in str(error):
            raise ValueError(f"{file}: refused: TorchScript is a program; expected only weights") from None
        if named:
            raise ValueError(
                f"{file}: refused: its pickle names {named[1][:80]}, which weights do not need; nothing of it was "
                "executed (a .safetensors file of the same network would do)"
            ) from None
        raise ValueError(f"{file}: not a file of weights that PyTorch wrote ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must hold a dict of weights; got {type(content).__name__}")
    if "rank_unet" in content:
        raise ValueError(f"{file} is a LoRA file: --base must name the model folder that it belongs on")
    return content


def network_of(state: State, where: str) -> Network:
    """The network that weights are of.

    Raises:
        ValueError: of no architecture that spandrel knows, or another kind of network; `where` is named.
        RuntimeError: spandrel is not installed.
    """
    spandrel = import_spandrel()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of the architectures' code
            found = spandrel.ModelLoader("cpu").load_from_state_dict(spandrel.canonicalize_state_dict(state))
    except spandrel.UnsupportedModelError:
        example = next((str(k) for k in state), "none")[:60]
        raise ValueError(
            f"{where}: its weights are of no architecture that spandrel {spandrel.__version__} knows (first: {example})"
        ) from None
    except Exception as error:  # a stranger's shapes
        raise ValueError(
            f"{where}: spandrel cannot build its network ({type(error).__name__}: {first_line(error)})"
        ) from None
    broken = [name for name, value in found.model.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"{where}: {broken[0]} holds values that are not finite; is it of a training that diverged?")
    kind = found.architecture.id
    channels = (found.input_channels, found.output_channels)
    if not isinstance(found, spandrel.ImageModelDescriptor) or found.purpose != "SR" or channels != (3, 3):
        raise ValueError(
            f"{where}: is a {kind} network for {found.purpose}; expected one that enlarges colour pictures"
        )
    if found.scale not in SCALES:
        raise ValueError(f"{where}: is a x{found.scale} network ({kind}); expected x4, or x2, which is applied twice")
    size = found.size_requirements
    if size.square:
        raise ValueError(f"{where}: this {kind} network takes only square pictures, which tiles are not")
    multiple = size.minimum if size.minimum > 16 else size.multiple_of  # tiles are at least 16 LR pixels wide
    return Network(found.model.float().eval().requires_grad_(False), kind, found.scale, multiple)


def state_of_ncnn(layers: Layers) -> State:
    """The layers of an ncnn file under the names that Real-ESRGAN's authors gave them.

    Raises:
        ValueError: the layers of another network.
    """
    if any(len(layer) == 1 for layer in layers):  # PReLUs: the compact network
        names = [f"body.{i}" for i in range(len(layers))]
    else:
        blocks, rest = divmod(len(layers) - 6, 15)
        if blocks < 1 or rest:
            raise ValueError(f"an ncnn network of {len(layers)} convolutions is not one of Real-ESRGAN's")
        places = [(b, d, c) for b in range(blocks) for d in (1, 2, 3) for c in (1, 2, 3, 4, 5)]
        middle = [f"body.{b}.rdb{d}.conv{c}" for b, d, c in places]
        names = ["conv_first", *middle, "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]
    return {
        f"{name}.{kind}": value for name, layer in zip(names, layers) for kind, value in zip(("weight", "bias"), layer)
    }


_STAND_IN = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")


def import_spandrel() -> Any:
    """The package. Where torchvision is missing, or does not fit torch, spandrel is imported without it: two of its
    architectures need it, and neither enlarges pictures.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        return importlib.import_module("spandrel")
    except ImportError as error:
        if error.name == "spandrel":
            raise RuntimeError(
                "reading a network needs the package spandrel: pip install 'gdpo-sr[spandrel]' (beside a CPU build of "
                "torch: pip install --no-deps spandrel einops)"
            ) from None
    except RuntimeError:  # torchvision's operators, which another build of torch has not
        pass
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "torchvision"}
    modules = {name: types.ModuleType(name) for name in _STAND_IN}
    for name in ("InterpolationMode", "rotate", "normalize"):
        setattr(modules[_STAND_IN[-1]], name, None)
    sys.modules.update(modules)
    try:
        return importlib.import_module("spandrel")
    except ImportError as error:
        raise RuntimeError(f"spandrel cannot be imported ({first_line(error)})") from None
    finally:
        for name in _STAND_IN:
            sys.modules.pop(name, None)
        sys.modules.update(kept)
