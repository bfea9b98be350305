"""CompactUNet: a plain stack of convolutions at the LR's resolution, with the call signature of a diffusers UNet.

The body is the compact network of Real-ESRGAN (SRVGG; Wang et al. 2021, arXiv 2107.10833): convolutions and PReLUs in
turn and one pixel shuffle, no skip but the picture itself. It fits a latent of pixel-unshuffled pictures, because it
can start from the published weights: the LR, from which bicubic made the condition, is a linear function of it
(`recover`), the upsampled LR that the network's picture is added to is one of the LR (`base`), and the noise of the
latent reaches the network as noise of the LR (`grain`). All of these are convolutions and learn with the others.

Beyond its border a picture goes on as in a mirror, and the features between two convolutions as `beyond` says, one
number for each channel. Zeros there are another colour: a white page had a dark frame, a saturated one a ring.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from gdpo.model.tiny import UNetOutput

TOGETHER = 4  # layers whose features gradient checkpointing computes again together
GRAIN = 2 / 255  # of a picture in [0,1]: standard deviation of the noise that the network sees on the LR


@dataclass(frozen=True)
class CompactUNetConfig:
    """The shape of a CompactUNet. `in_channels` is twice `out_channels`: the noisy latent beside the clean condition.

    Args:
        width: channels of the body.
        layers: convolutions between the first and the last.
        inner_width: channels of every second activation, the second, the fourth and so on; 0: as many as the others.
        base_kernel: side of the linear upsampler's kernels, in LR pixels.
    """

    in_channels: int = 96
    out_channels: int = 48
    width: int = 64
    layers: int = 16
    base_kernel: int = 5
    inner_width: int = 0

    def __post_init__(self):
        if self.in_channels != 2 * self.out_channels:
            raise ValueError(f"in_channels must be twice out_channels; got {self.in_channels} and {self.out_channels}")
        if self.out_channels % 16:
            raise ValueError(f"out_channels must be a multiple of 16 (pixel-unshuffle by 4); got {self.out_channels}")
        if self.base_kernel % 2 == 0 or self.base_kernel < 3:
            raise ValueError(f"base_kernel must be odd and at least 3; got {self.base_kernel}")
        if not 0 <= self.inner_width <= self.width:
            raise ValueError(f"inner_width must be from 0 to width {self.width}; got {self.inner_width}")

    @property
    def widths(self) -> list[int]:
        """Channels of each activation."""
        return [self.inner_width or self.width if i % 2 else self.width for i in range(self.layers + 1)]


class EvenConv2d(nn.Conv2d):
    """A linear upsampler in front of a pixel shuffle that draws no lattice: its kernels have one sum for all 16 pixels.

    So even areas stay even. The network's last convolution is free: held to the same sums it draws teeth at edges. What
    it draws at the periods of the shuffle, the penalties on grid and lattice take away (gdpo.train.losses.grid).
    """

    cell = 16

    def even(self) -> torch.Tensor:
        """The weight without the part by which the sums of a cell's kernels differ."""
        sums = self.weight.unflatten(0, (-1, self.cell)).mean((3, 4), keepdim=True)
        return self.weight - (sums - sums.mean(1, keepdim=True)).flatten(0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.even(), self.bias)


class SplitPReLU(nn.Module):
    """A PReLU as a convolution of each channel by itself, a ReLU and a sum, for an export that a CPU runs.

    ONNX Runtime keeps features in blocks of channels from one convolution to the next; for a PReLU it unpacks and packs
    them again, which takes longer than the activation. With the slope a: PReLU(x) = x + relu((a - 1) x). For a > 1 that
    holds of the negative of both, so such a channel comes with the other `sign`, and leaves with it.
    """

    def __init__(self, slope: torch.Tensor):
        super().__init__()
        self.sign = SplitPReLU.sign_of(slope)
        self.rest = nn.Conv2d(len(slope), len(slope), 1, groups=len(slope)).to(slope).requires_grad_(False)
        for parameter, values in zip(self.rest.parameters(), ((slope - 1)[:, None, None, None], 0 * slope)):
            parameter.copy_(values)

    @staticmethod
    def sign_of(slope: torch.Tensor) -> torch.Tensor:
        return torch.where(slope > 1, -1.0, 1.0).to(slope)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.relu(self.rest(x))


class CompactUNet(nn.Module):
    """Convolutions and PReLUs at the LR's resolution; every side of a latent will do. The timestep is not used.

    Called as diffusers' UNets are. Its weights are those of one noise level: the generator has one.
    """

    multiple = 1  # latent H and W must be multiples of this
    lora_targets = r"conv_in|convs\.\d+"  # not what keeps the lattice away

    def __init__(self, config: CompactUNetConfig | None = None):
        super().__init__()
        self.config = config = config or CompactUNetConfig()
        channels = config.out_channels // 16
        self.recover = nn.Conv2d(config.out_channels, channels, 3, bias=False)  # condition -> LR
        self.grain = nn.Conv2d(config.in_channels, channels, 1, bias=False)  # noise of the latent -> noise of the LR
        self.base: Any = EvenConv2d(channels, config.out_channels, config.base_kernel, bias=False)
        self.conv_in = nn.Conv2d(2 * channels, config.width, 3)  # the LR with grain, the LR
        self.convs = nn.ModuleList(nn.Conv2d(*pair, 3) for pair in pairwise(config.widths))
        self.acts = nn.ModuleList(nn.PReLU(width) for width in config.widths)
        self.beyond = nn.Parameter(torch.zeros(config.layers + 1, config.width))  # the picture's border, of each act
        self.conv_out = nn.Conv2d(config.widths[-1], config.out_channels, 3)
        self.gradient_checkpointing = False
        self._reset()

    @torch.no_grad()
    def _reset(self) -> None:
        """Bicubic as the base, the middle of a condition's pixel as the LR, no residual, no grain."""
        for layer in (self.recover, self.grain, self.base, self.conv_out):
            for parameter in layer.parameters():
                parameter.zero_()
        kernel = bicubic(self.config.base_kernel)
        for c in range(self.config.out_channels // 16):
            self.base.weight[16 * c : 16 * c + 16, c] = kernel
            self.recover.weight[c, [16 * c + i for i in (5, 6, 9, 10)], 1, 1] = 0.25
        self.measure_beyond()

    @torch.no_grad()
    def measure_beyond(self, lr: torch.Tensor | None = None) -> None:
        """Set `beyond` to the mean of each activation on pictures, as `features` takes them; None is an even grey one.

        A start: it learns with the other weights.
        """
        if lr is None:
            lr = self.beyond.new_zeros(1, self.config.out_channels // 8, *self.base.kernel_size)
        self.features(lr, measure=True)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's. Weights from before there was `beyond` get that of a grey picture."""
        if "beyond" in state_dict or "recover.weight" not in state_dict:  # a LoRA's alone
            return super().load_state_dict(state_dict, *args, **kwargs)
        loaded = super().load_state_dict({**state_dict, "beyond": self.beyond.detach()}, *args, **kwargs)
        self.measure_beyond()
        return loaded

    def enable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = True

    def config_dict(self) -> dict:
        return {"_class_name": "CompactUNet", **asdict(self.config)}

    @classmethod
    def from_config(cls, config: dict) -> CompactUNet:
        fields: dict[str, Any] = {k: v for k, v in config.items() if not k.startswith("_")}
        try:
            return cls(CompactUNetConfig(**fields))
        except (TypeError, ValueError, IndexError, ZeroDivisionError, RuntimeError) as error:
            raise ValueError(f"unet/config.json is not a CompactUNet's: {error}") from None

    @staticmethod
    def config_of(weights: dict[str, torch.Tensor]) -> CompactUNetConfig:
        """The shape of the network, read off its weights."""
        width = len(weights["conv_in.bias"])
        inner = len(weights.get("convs.0.bias", weights["conv_in.bias"]))
        return CompactUNetConfig(
            in_channels=weights["grain.weight"].shape[1],
            out_channels=weights["recover.weight"].shape[1],
            width=width,
            layers=sum(name.startswith("convs.") and name.endswith(".weight") for name in weights),
            base_kernel=weights["base.weight"].shape[-1],
            inner_width=0 if inner == width else inner,
        )

    @torch.no_grad()
    def fold(self, timestep: int) -> None:
        """Nothing depends on the timestep; a plain convolution takes the place of the even one: for an export."""
        even = self.base
        plain = nn.Conv2d(even.in_channels, even.out_channels, self.config.base_kernel, bias=False).to(even.weight)
        plain.weight.copy_(even.even())
        self.base = plain.requires_grad_(False)

    @torch.no_grad()
    def split_slopes(self) -> None:
        """Put a SplitPReLU in the place of each PReLU, in place."""
        layers: list[Any] = [self.conv_in, *self.convs, self.conv_out]
        for i, (before, following) in enumerate(pairwise(layers)):
            slope = self.acts[i].weight
            assert isinstance(slope, torch.Tensor)  # nn.PReLU's
            self.acts[i] = split = SplitPReLU(slope.detach())
            before.weight.mul_(split.sign[:, None, None, None])
            before.bias.mul_(split.sign)
            following.weight.mul_(split.sign[:, None, None])
            self.beyond[i, : len(slope)].mul_(split.sign)

    @staticmethod
    def join_slopes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of a network by name, with those of `split_slopes` as they were before."""
        weights, beyond = dict(weights), []
        count = sum(name.startswith("acts.") and name.endswith(".rest.weight") for name in weights)
        layers = ["conv_in", *(f"convs.{i}" for i in range(count - 1)), "conv_out"]
        for i, (before, following) in enumerate(pairwise(layers)):
            weights.pop(f"acts.{i}.rest.bias", None)
            slope = 1 + weights.pop(f"acts.{i}.rest.weight").flatten()
            sign = SplitPReLU.sign_of(slope)
            weights[f"acts.{i}.weight"] = slope
            weights[f"{before}.weight"] = weights[f"{before}.weight"] * sign[:, None, None, None]
            weights[f"{before}.bias"] = weights[f"{before}.bias"] * sign
            weights[f"{following}.weight"] = weights[f"{following}.weight"] * sign[:, None, None]
            beyond.append(weights["beyond"][i, : len(sign)] * sign)
        return weights | {"beyond": pad_sequence(beyond, batch_first=True)}

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | int, encoder_hidden_states: torch.Tensor | None = None
    ) -> UNetOutput:
        """sample [B,in_channels,h,w], timestep unused -> .sample [B,out_channels,h,w]. No text is used."""
        if sample.shape[1] != self.config.in_channels:
            raise ValueError(f"sample must be [B,{self.config.in_channels},h,w]; got {tuple(sample.shape)}")
        condition = sample[:, self.config.out_channels :]
        lr = self.recover(mirrored(condition, 1, unshuffled=True))
        lr = mirrored(torch.cat([lr + self.grain(sample), lr], dim=1), self.base.kernel_size[0] // 2)
        picture = 2 * self.conv_out(self.features(lr)) + self.base(lr[:, lr.shape[1] // 2 :])
        return UNetOutput(picture - condition)

    def features(self, lr: torch.Tensor, measure: bool = False) -> torch.Tensor:
        """What the last convolution sees of the LR with and without grain.

        lr [B,2C,h+2n,w+2n] in [-1,1], n pixels beyond each border -> [B,width,h+2,w+2], one pixel beyond.
        """
        margin = self.base.kernel_size[0] // 2 - 1
        x = 0.5 * lr[:, :, margin : lr.shape[2] - margin, margin : lr.shape[3] - margin] + 0.5  # as it was published
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return self.run(x, 0, len(self.acts), measure)
        for first in range(0, len(self.acts), TOGETHER):
            x = checkpoint(self.run, x, first, first + TOGETHER, use_reentrant=False)
        return x

    def run(self, x: torch.Tensor, first: int, end: int, measure: bool = False) -> torch.Tensor:
        """[B,C,h+2,w+2], what layer `first` gets, through the layers before `end`."""
        for i, (conv, act) in list(enumerate(zip([self.conv_in, *self.convs], self.acts)))[first:end]:
            x = act(conv(x))
            beyond = self.beyond[i, : x.shape[1]]
            if measure:
                beyond.copy_(x.mean((0, 2, 3)))
            x = framed(x, beyond)
        return x


def framed(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """x [B,C,h,w] with one pixel more beyond each border, of `values` [C]."""
    values = values[:, None, None]
    return F.pad(x - values, (1, 1, 1, 1)) + values


def mirrored(x: torch.Tensor, count: int, unshuffled: bool = False) -> torch.Tensor:
    """Pictures [B,C,h,w], or `unshuffled` ones [B,16*C,h,w], with `count` pixels more beyond each border.

    In slices of one and a permutation of channels, which every run time knows. Where the picture ends before, its last
    row or column is repeated.
    """
    for axis in (2, 3):
        size = x.shape[axis]
        places = [i if i < size else size - 1 for i in range(count)]
        first = [x.narrow(axis, i, 1) for i in reversed(places)]
        last = [x.narrow(axis, size - 1 - i, 1) for i in places]
        if unshuffled:
            order = torch.arange(x.shape[1], device=x.device).view(-1, 4, 4).flip(axis - 1).flatten()
            first, last = ([part.index_select(1, order) for part in parts] for parts in (first, last))
        x = torch.cat([*first, x, *last], dim=axis)
    return x


@torch.no_grad()
def start_from(
    unet: CompactUNet, weights: list[tuple[torch.Tensor, ...]], *, a_noise: float, grain: float = GRAIN
) -> CompactUNet:
    """Give a CompactUNet the weights of a published network.

    Without noise it then draws that network's picture (and with `rebase` the same one on a smooth base).

    Args:
        weights: (weight, bias) of each convolution and (slope,) of each PReLU in order, as gdpo.model.ncnn reads them.
        a_noise: alpha_bar of the generator's t_noise: its latents hold sqrt(1 - a_noise) of noise.
        grain: standard deviation of the noise on the LR, of a picture in [0,1]. The latent's noise has 16 pixels for
            one of the LR; their mean, scaled, is the noise of that one.

    Raises:
        ValueError: another number or shape of layers.
    """
    colours, (first, bias) = unet.config.out_channels // 16, weights[0]
    weights = [(torch.cat([first, torch.zeros_like(first)], dim=1), bias), *weights[1:]]
    layers = [unet.conv_in, unet.acts[0]]
    for conv, act in zip(unet.convs, unet.acts[1:]):
        layers += [conv, act]
    layers.append(unet.conv_out)
    shapes = [[tuple(p.shape) for p in layer.parameters()] for layer in layers]
    if shapes != [[tuple(t.shape) for t in layer] for layer in weights]:
        raise ValueError(f"these {len(weights)} layers are not those of a compact network of {len(layers)} layers")
    for layer, values in zip(layers, weights):
        for parameter, value in zip(layer.parameters(), values):
            parameter.copy_(value)
    unet.recover.weight.copy_(recovery(colours))
    unet.base.weight.zero_()
    middle = unet.config.base_kernel // 2
    for c in range(colours):  # the published network's picture is added to the nearest neighbour
        unet.base.weight[16 * c : 16 * c + 16, c, middle, middle] = 1
    unet.grain.weight.zero_()
    scale = 2 * grain * 4 / (1 - a_noise) ** 0.5 / 16  # a mean of 16 has a quarter of the deviation; [-1,1] has twice
    for c in range(colours):
        own = slice(16 * c, 16 * c + 16)
        unet.grain.weight[c, own] = scale
        unet.grain.weight[c, unet.config.out_channels + 16 * c : unet.config.out_channels + 16 * c + 16] = (
            -scale * a_noise**0.5
        )
    unet.measure_beyond()
    return unet


def bicubic(side: int) -> torch.Tensor:
    """Kernels [16,side,side] that take an LR to its unshuffled bicubic x4 picture; the part within `side` pixels."""
    dot = torch.zeros(1, 1, side + 4, side + 4)
    dot[0, 0, side // 2 + 2, side // 2 + 2] = 1
    up = F.pixel_unshuffle(F.interpolate(dot, scale_factor=4, mode="bicubic", antialias=True), 4)
    return up[0, :, 2:-2, 2:-2].flip(1, 2)


def recovery(channels: int = 3) -> torch.Tensor:
    """The 3x3 convolution [channels,16*channels,3,3] that takes an unshuffled bicubic x4 picture back to its LR.

    Least squares on noise: 12x12 pixels of a bicubic picture are 144 equations in the 49 LR pixels that they are made
    of. The ridge keeps its weights small where pictures were rounded or clipped.
    """
    rng = torch.Generator().manual_seed(0)
    lr = torch.rand(1, 1, 96, 96, generator=rng, dtype=torch.float64) * 2 - 1
    up = F.interpolate(lr.float(), scale_factor=4, mode="bicubic", antialias=True).double()
    rows = F.unfold(F.pixel_unshuffle(up, 4)[:, :, 4:-4, 4:-4], 3)[0].T  # [N,16*9]
    wanted = lr[0, 0, 5:-5, 5:-5].reshape(-1, 1)
    gram = rows.T @ rows + 1e-5 * len(rows) * torch.eye(rows.shape[1], dtype=torch.float64)
    kernel = torch.linalg.solve(gram, rows.T @ wanted).reshape(1, 16, 3, 3).float()
    full = torch.zeros(channels, 16 * channels, 3, 3)
    for c in range(channels):
        full[c, 16 * c : 16 * c + 16] = kernel[0]
    return full


@torch.no_grad()
def rebase(unet: CompactUNet, lrs: torch.Tensor) -> CompactUNet:
    """Put what the network draws on bicubic where `start_from` has it on the nearest neighbour; the picture stays.

    The published network's residual also takes the steps of the nearest neighbour away. As long as that has to fit, a
    weight that moves a little shows steps at every edge. The features before the last convolution hold the LR, so a
    linear fit of that convolution gives the residual to bicubic (within one level of 255 on photos).

    Args:
        lrs: [B,3,h,w] in [0,1], varied pictures to fit on.
    """
    lr = 2 * lrs - 1
    inside = (..., slice(2, -2), slice(2, -2))  # away from the border
    lr = mirrored(lr, unet.config.base_kernel // 2)
    x = unet.features(torch.cat([lr, lr], dim=1), measure=True)
    wanted = unet.conv_out(x) + 0.5 * unet.base(lr)
    unet.base.weight.zero_()
    for c in range(unet.config.out_channels // 16):
        unet.base.weight[16 * c : 16 * c + 16, c] = bicubic(unet.config.base_kernel)
    wanted = (wanted - 0.5 * unet.base(lr))[inside]
    features = F.unfold(x, 3).unflatten(2, tuple(lrs.shape[2:]))[inside]
    a = features.movedim(1, 0).flatten(1).double()
    a = torch.cat([a, torch.ones_like(a[:1])])  # [577, pixels]
    b = wanted.movedim(1, 0).flatten(1).double()
    gram = a @ a.T
    gram.diagonal().add_(1e-4 * gram.diagonal().mean())
    solved = torch.linalg.solve(gram, a @ b.T).T.to(unet.conv_out.weight)  # [48, 577]
    unet.conv_out.weight.copy_(solved[:, :-1].view_as(unet.conv_out.weight))
    if unet.conv_out.bias is not None:
        unet.conv_out.bias.copy_(solved[:, -1])
    return unet
