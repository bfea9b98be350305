"""TinyUNet: the small convolutional UNet of the `tiny` preset, with the call signature of a diffusers UNet."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class UNetOutput(NamedTuple):
    sample: torch.Tensor


@dataclass(frozen=True)
class TinyUNetConfig:
    """The shape of a TinyUNet. `in_channels` is twice `out_channels`: the noisy latent beside the clean condition."""

    in_channels: int = 96
    out_channels: int = 48
    block_out_channels: tuple[int, ...] = (64, 96, 128)
    layers_per_block: int = 2
    time_channels: int = 64
    head_channels: tuple[int, int] = (32, 16)

    def __post_init__(self):
        if self.in_channels != 2 * self.out_channels:
            raise ValueError(f"in_channels must be twice out_channels; got {self.in_channels} and {self.out_channels}")
        if self.out_channels % 16:
            raise ValueError(f"out_channels must be a multiple of 16 (pixel-unshuffle by 4); got {self.out_channels}")


def _act(x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x, 0.1)


class ResBlock(nn.Module):
    """conv, FiLM by the timestep, conv, added to the input. No normalisation: tiles must not have statistics."""

    def __init__(self, in_channels: int, out_channels: int, time_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_channels, 2 * out_channels)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.time.weight)
        nn.init.zeros_(self.time.bias)
        with torch.no_grad():
            self.conv2.weight.mul_(0.1)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        h = _act(self.conv1(x) * (1 + scale) + shift)
        return self.skip(x) + self.conv2(h)


class FoldedResBlock(nn.Module):
    """A ResBlock whose FiLM, a constant, is folded into its first convolution."""

    def __init__(self, block: ResBlock, time: torch.Tensor):
        super().__init__()
        self.conv1, self.conv2, self.skip = block.conv1, block.conv2, block.skip
        scale, shift = block.time(time)[0].chunk(2)
        bias = self.conv1.bias
        assert bias is not None  # nn.Conv2d's default
        self.conv1.weight.mul_((1 + scale)[:, None, None, None])
        bias.mul_(1 + scale).add_(shift)

    def forward(self, x: torch.Tensor, time: None) -> torch.Tensor:
        return self.skip(x) + self.conv2(_act(self.conv1(x)))


class Head(nn.Module):
    """Features at 1/4 resolution to a latent residual, by way of full resolution.

    A bare pixel-shuffle leaves a grid of period 4, because neighbouring pixels come from unrelated filters. Here each
    x2 shuffle is followed by a convolution at the resolution it made, and the picture is unshuffled at last. The last
    of them also sees the noisy and the clean picture as they are: grain is made from noise, not drawn as streaks.
    """

    def __init__(self, in_channels: int, sample_channels: int, out_channels: int, widths: tuple[int, int]):
        super().__init__()
        half, full = widths
        self.up1 = nn.Conv2d(in_channels, 4 * half, 3, padding=1)
        self.conv1 = nn.Conv2d(half, half, 3, padding=1)
        self.up2 = nn.Conv2d(half, 4 * full, 3, padding=1)
        self.conv2 = nn.Conv2d(full + sample_channels // 16, full, 3, padding=1)
        self.out = nn.Conv2d(full, out_channels // 16, 3, padding=1)
        for parameter in self.out.parameters():  # the untrained generator returns its input
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        x = _act(F.pixel_shuffle(self.up1(x), 2))
        x = _act(self.conv1(x))
        x = _act(F.pixel_shuffle(self.up2(x), 2))
        x = _act(self.conv2(torch.cat([x, F.pixel_shuffle(sample, 4)], dim=1)))
        return F.pixel_unshuffle(self.out(x), 4)


class TinyUNet(nn.Module):
    """A UNet of residual convolution blocks for pixel-unshuffled latents; fully convolutional, no attention.

    Called as diffusers' UNets are. H and W of the latent must be multiples of `multiple`.
    """

    lora_targets = r"conv_in|downs\.\d+|ups\.\d+|.*\.(conv1|conv2)|head\.(up1|up2|out)"

    def __init__(self, config: TinyUNetConfig | None = None):
        super().__init__()
        self.config = config = config or TinyUNetConfig()
        widths, time = config.block_out_channels, config.time_channels
        self.time_in = nn.Linear(time, time)
        self.time_out = nn.Linear(time, time)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.encoder, self.downs = nn.ModuleList(), nn.ModuleList()
        self.decoder, self.ups = nn.ModuleList(), nn.ModuleList()
        n = config.layers_per_block
        for i, width in enumerate(widths):
            self.encoder.append(nn.ModuleList(ResBlock(width, width, time) for _ in range(n)))
            if i + 1 < len(widths):
                self.downs.append(nn.Conv2d(width, widths[i + 1], 3, stride=2, padding=1))
        for i in reversed(range(len(widths) - 1)):
            self.ups.append(nn.Conv2d(widths[i + 1], 4 * widths[i], 1))
            blocks = [ResBlock(2 * widths[i] if k == 0 else widths[i], widths[i], time) for k in range(n)]
            self.decoder.append(nn.ModuleList(blocks))
        self.head = Head(widths[0], config.in_channels, config.out_channels, config.head_channels)
        self.gradient_checkpointing = False

    @property
    def multiple(self) -> int:
        """Latent H and W must be multiples of this."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def enable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = True

    def config_dict(self) -> dict:
        return {"_class_name": "TinyUNet", **asdict(self.config)}

    @classmethod
    def from_config(cls, config: dict) -> TinyUNet:
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if not k.startswith("_")
        }
        try:
            return cls(TinyUNetConfig(**fields))
        except (TypeError, ValueError, IndexError, ZeroDivisionError, RuntimeError) as error:
            raise ValueError(f"unet/config.json is not a TinyUNet's: {error}") from None

    @staticmethod
    def config_of(weights: dict[str, torch.Tensor]) -> TinyUNetConfig:
        """The shape of the network, read off its weights (those of the time may be missing)."""
        levels = 1 + sum(name.startswith("downs.") and name.endswith(".weight") for name in weights)
        blocks = sum(name.startswith("encoder.0.") and name.endswith(".conv1.weight") for name in weights)
        sample = weights["conv_in.weight"].shape[1]
        return TinyUNetConfig(
            in_channels=sample,
            out_channels=sample // 2,
            block_out_channels=tuple(len(weights[f"encoder.{i}.0.conv1.bias"]) for i in range(levels)),
            layers_per_block=blocks,
            head_channels=(len(weights["head.conv1.bias"]), len(weights["head.conv2.bias"])),
        )

    @torch.no_grad()
    def fold(self, timestep: int) -> None:
        """Make one timestep's scales and shifts part of the convolutions, in place: for an export."""
        time = self._time(timestep, next(self.parameters()))
        for blocks in [*self.encoder, *self.decoder]:
            for i, block in enumerate(blocks):
                blocks[i] = FoldedResBlock(block, time)
        del self.time_in, self.time_out
        self._time = lambda timestep, sample: None  # type: ignore[method-assign, assignment, return-value]

    def _time(self, timestep: torch.Tensor | int, sample: torch.Tensor) -> torch.Tensor:
        """Sinusoidal embedding of the timestep (as in DDPM) and a two-layer perceptron -> [1 or B, time_channels]."""
        if not isinstance(timestep, torch.Tensor):  # filled there: to copy it the host would wait for the device
            timestep = torch.full((1,), timestep, device=sample.device)
        t = timestep.to(sample.device, torch.float32).reshape(-1, 1)
        half = self.config.time_channels // 2
        frequency = torch.exp(-math.log(10000.0) * torch.arange(half, device=sample.device) / half)
        wave = torch.cat([torch.cos(t * frequency), torch.sin(t * frequency)], dim=1).to(self.time_in.weight.dtype)
        return _act(self.time_out(_act(self.time_in(wave))))

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | int, encoder_hidden_states: torch.Tensor | None = None
    ) -> UNetOutput:
        """sample [B,in_channels,h,w], timestep an int or [B] -> .sample [B,out_channels,h,w]. No text is used."""
        if (
            sample.shape[1] != self.config.in_channels
            or sample.shape[2] % self.multiple
            or sample.shape[3] % self.multiple
        ):
            raise ValueError(
                f"sample must be [B,{self.config.in_channels},h,w] with h and w multiples of {self.multiple}; "
                f"got {tuple(sample.shape)}"
            )
        time = self._time(timestep, sample)

        def run(blocks, x):
            for block in blocks:
                if self.gradient_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, time, use_reentrant=False)
                else:
                    x = block(x, time)
            return x

        x = run(self.encoder[0], self.conv_in(sample))
        skips = []
        for down, blocks in zip(self.downs, self.encoder[1:]):
            skips.append(x)
            x = run(blocks, down(x))
        for up, blocks in zip(self.ups, self.decoder):
            x = run(blocks, torch.cat([F.pixel_shuffle(up(x), 2), skips.pop()], dim=1))
        return UNetOutput(self.head(x, sample))
