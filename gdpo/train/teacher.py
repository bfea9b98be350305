"""A teacher: a published network whose picture of a degraded crop is a target of NAOSD beside the HR.

What a teacher draws is a function of the LR, so that a pixel loss does not average it away, as it does with the texture
of an HR. The teacher may see noise on the LR, the same noise that the generator gets: then the detail it draws is a
function of the noise, and so are the generator's samples, which GDPO needs to differ.

A large teacher is slow, so `count` targets are made once and kept: each a function of (teacher, crops, degradation,
seed, number), in a folder named by a hash of all of these. A step takes random windows of them. Missing ones are made
when they are needed, or before: `python -m gdpo.targets --config F.yaml`.

A generator may be the teacher, also the model itself as it was before training (`name: self`): what it does with one
kind of input is kept while another is learned (learning without forgetting; Li and Hoiem 2016, arXiv 1606.09282). It
sees the input and the noise of the one that is trained, so nothing is stored.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.io.files import atomic_path, atomic_write, sha256
from gdpo.degradation import Degradation
from gdpo.model.ncnn import load_ncnn, network
from gdpo.model.parts import disk_errors
from gdpo.model.spandrel_networks import PUBLISHED, load_network
from gdpo.photos.dataset import CropDataset
from gdpo.randomness import generator_for, normal, uniform
from gdpo.train.options import path_option

_FORMAT, _SCALE = 1, 4
_GRAIN = 32  # a grain of one standard deviation in the stored 8-bit numbers
_TRIES = 1000
SELF = "self"


@dataclass
class TeacherConfig:
    """A network whose pictures are targets.

    Args:
        name: real-esrgan-x4plus, real-esrgan-animevideov3 or realsr-df2k (python -m gdpo.assets real-esrgan realsr), a
            path: STEM of an ncnn network (STEM.param, STEM.bin), or a .pth or .safetensors file of an
            architecture that the package spandrel knows. A model folder, or "self" for the model before training: the
            teacher of every sample that `on` names; of the options below only weight and on have an effect then. Empty:
            no teacher.
        share: share of the samples that are taken from the targets; the others have only the HR.
        weight: weight of the teacher's picture in the losses of such a sample, 0 to 1; the HR has the rest.
        on: presets of degradation.mix to make targets of: "degraded" (all but bicubic), "clean" (bicubic) or "all".
        noise: standard deviation of the noise on the teacher's LR, for pictures in [0,1]; 0 is none.
        count: number of targets.
        crop_size: side of a target's HR.
        folder: crops that the targets are made of; empty: data.folder, which must be one folder then.
        cache: folder of the targets.
    """

    name: str = path_option("")
    share: float = 0.5
    weight: float = 0.7
    on: Literal["degraded", "clean", "all"] = "degraded"
    noise: float = 0.0
    count: int = 400
    crop_size: int = 256
    folder: str = path_option("")
    cache: str = path_option("data/targets")

    @property
    def is_generator(self) -> bool:
        """Whether the teacher is one of this project's generators and not a network."""
        return self.name == SELF or (Path(self.name) / "generator.json").is_file()

    def crops(self, folders: list[str]) -> str:
        """The folder of the targets' crops, in a run that trains on `folders`."""
        return self.folder or folders[0]

    def validate(self, crop_size: int, folders: list[str]) -> None:
        """Raise ValueError naming the option, what it must be, and what it is."""
        for name in ("share", "weight"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"teacher.{name} must be from 0 to 1; got {value}")
        if self.is_generator:
            return
        if not 0 <= self.noise <= 0.2:
            raise ValueError(f"teacher.noise must be from 0 to 0.2 (of a picture in [0,1]); got {self.noise}")
        if len(folders) > 1 and not self.folder:
            raise ValueError(
                f"teacher.folder must name the crops of the targets where data.folder is several; got {folders}"
            )
        if self.count < 1:
            raise ValueError(f"teacher.count must be at least 1; got {self.count}")
        if self.crop_size % _SCALE or self.crop_size < crop_size:
            raise ValueError(
                f"teacher.crop_size must be a multiple of {_SCALE} and at least data.crop_size {crop_size}; "
                f"got {self.crop_size}"
            )


class Target(NamedTuple):
    """One target: uint8 hr and picture [3,S,S], lr [3,S/4,S/4]; grain int8 [3,S/4,S/4], the teacher's noise."""

    hr: Tensor
    lr: Tensor
    picture: Tensor
    grain: Tensor


class Windows(NamedTuple):
    """Windows of targets: hr, picture [N,3,crop,crop] in [0,1], lr [N,3,crop/4,crop/4] in [0,1], grain like lr."""

    hr: Tensor
    lr: Tensor
    picture: Tensor
    grain: Tensor


def load_teacher(name: str) -> tuple[nn.Module, str]:
    """A network of [B,3,h,w] in [0,1] -> [B,3,4h,4w], frozen, and a hash of its files.

    Raises:
        FileNotFoundError: its files are not there; the message says how to get them.
        ValueError: they cannot be read, or make a picture of another size.
        RuntimeError: the package spandrel is needed and not installed.
    """
    if name in PUBLISHED:
        from gdpo.assets import asset

        folder, stem = PUBLISHED[name]
        return _ncnn(asset(folder) / stem)
    path = Path(name)
    if path.suffix in (".pth", ".safetensors"):
        return _spandrel(path)
    if Path(f"{name}.param").is_file():
        return _ncnn(path)
    raise FileNotFoundError(
        f"teacher {name!r}: neither one of {', '.join(PUBLISHED)} nor a file: "
        "STEM of STEM.param and STEM.bin, or a .pth or .safetensors file"
    )


def _ncnn(stem: Path) -> tuple[nn.Module, str]:
    loaded = network(load_ncnn(stem))
    return loaded, hashlib.blake2b("".join(sha256(f"{stem}{s}") for s in (".param", ".bin")).encode()).hexdigest()[:32]


def _spandrel(path: Path) -> tuple[nn.Module, str]:
    network, source = load_network(path)
    if network.scale != _SCALE:
        raise ValueError(f"teacher {path}: must enlarge {_SCALE} times; got x{network.scale}")
    return network.model, source["sha256"][:32]


class Targets:
    """The targets of a config, made and kept.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: see load_teacher and CropDataset.
    """

    def __init__(self, config: TeacherConfig, folder: str, degrade: Degradation, seed: int, device: torch.device):
        self.config, self.degrade, self.seed, self.device = config, degrade, seed, device
        self.crops = CropDataset(folder, "train", config.crop_size, captions=False)
        self.network, fingerprint = load_teacher(config.name)
        self.network.to(device)
        self.about = {
            "format": _FORMAT,
            "teacher": config.name,
            "teacher_hash": fingerprint,
            "crops": self.crops.fingerprint,
            "crop_size": config.crop_size,
            "degradation": asdict(degrade.config),
            "on": config.on,
            "noise": config.noise,
            "seed": seed,
        }
        self.key = hashlib.blake2b(json.dumps(self.about, sort_keys=True).encode(), digest_size=8).hexdigest()
        self.folder = Path(config.cache) / f"{Path(config.name).stem}-{self.key}"
        self.get: Callable[[int], Target] = functools.lru_cache(maxsize=config.count)(self._get)

    def file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def _get(self, number: int) -> Target:
        """A target, read or made.

        Raises:
            ValueError: its file is damaged or of another cache; named.
        """
        file = self.file(number)
        return self._read(file) if file.is_file() else self.make(number)

    def _read(self, file: Path) -> Target:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as opened:
                about = opened.metadata() or {}
                target = Target(*(opened.get_tensor(name) for name in Target._fields))
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} is damaged ({str(error).splitlines()[0]}); delete it to have it made anew"
            ) from None
        if about.get("key") != self.key:
            raise ValueError(f"{file} belongs to another cache ({about.get('key')}); delete it to have it made anew")
        if about.get("hash") != _hash(target):
            raise ValueError(f"{file} is damaged (its hash is another); delete it to have it made anew")
        return target

    @torch.inference_mode()
    def make(self, number: int) -> Target:
        """Compute a target and keep it. Several processes may do so: the bytes are the same."""
        from safetensors.torch import save_file

        sample = self._sample(number)
        index = self.crops.index_of(number, seed=self.seed)
        hr = self.crops.item(index, seed=self.seed, sample=number)["hr"][None]
        lr, _ = self.degrade(hr, seed=self.seed, samples=[sample])
        grain = torch.zeros_like(lr[0], dtype=torch.int8)
        if self.config.noise:
            drawn = normal(lr.shape[1:], self.seed, "teacher grain", number)
            grain = drawn.mul(_GRAIN).round().clamp(-127, 127).to(torch.int8)
        seen = (lr + self.config.noise / _GRAIN * grain.float()).to(self.device)
        picture = self.network(seen)[0].float().cpu()
        if picture.shape != hr.shape[1:]:
            raise ValueError(f"teacher {self.config.name}: made {tuple(picture.shape)} of {tuple(lr.shape[1:])}")
        hr8, lr8, picture8 = (x.clamp(0, 1).mul(255).round().byte().contiguous() for x in (hr[0], lr[0], picture))
        target = Target(hr8, lr8, picture8, grain)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "about.json").is_file():
            atomic_write(self.folder / "about.json", json.dumps(self.about, indent=1) + "\n")
        with disk_errors(self.file(number)), atomic_path(self.file(number)) as staged:
            save_file(target._asdict(), staged, {"key": self.key, "hash": _hash(target)})
        return target

    def _sample(self, number: int) -> int:
        """The sample number under which a target is degraded: the first of a presets that `on` asks for."""
        if self.config.on == "all":
            return number
        for attempt in range(_TRIES):
            sample = number + attempt * self.config.count
            if (self.degrade.preset_of(self.seed, sample) == "bicubic") == (self.config.on == "clean"):
                return sample
        raise ValueError(f"teacher.on is {self.config.on}, but degradation has no such preset; see degradation.mix")

    def drawn(self, samples: list[int]) -> list[int]:
        """Which of a batch, by position, take the place of their crop: a function of (seed, sample)."""
        share = self.config.share
        return [i for i, s in enumerate(samples) if uniform(self.seed, "taught", s) < share]

    def windows(self, samples: list[int], size: int) -> Windows:
        """For each sample number a target, a part of it and a turn: all functions of (seed, sample)."""
        found = []
        for sample in samples:
            rng = generator_for(self.seed, "target", sample)
            least = (self.config.crop_size - size) // _SCALE + 1
            number, y, x, turns, flip = (
                int(torch.randint(n, (), generator=rng)) for n in (self.config.count, least, least, 4, 2)
            )
            small = size // _SCALE
            parts = []
            for image in self.get(number):
                scale = _SCALE if image.shape[1] == self.config.crop_size else 1
                cut = image[:, y * scale : (y + small) * scale, x * scale : (x + small) * scale].rot90(turns, (1, 2))
                parts.append(cut.flip(2) if flip else cut)
            found.append(parts)
        hr, lr, picture, grain = (torch.stack(part).float() for part in zip(*found))
        return Windows(hr / 255, lr / 255, picture / 255, grain / _GRAIN)


def with_grain(noise: Tensor, grain: Tensor) -> Tensor:
    """A latent's noise [N,48,h,w] whose mean over each LR pixel, times 4, is the teacher's grain [N,3,h,w].

    The mean of 16 standard normal numbers has a quarter of their deviation: what comes out is standard normal again.
    """
    cells = noise.unflatten(1, (grain.shape[1], -1))
    count = cells.shape[2]
    return (cells - cells.mean(2, keepdim=True) + grain[:, :, None] / count**0.5).flatten(1, 2)


def _hash(target: Target) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in target:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def upsampled(lr: Tensor) -> Tensor:
    """lr [N,3,h,w] in [0,1] as the generator's input in [-1,1], by the resampler of inference."""
    return F.interpolate(lr, scale_factor=_SCALE, mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1
