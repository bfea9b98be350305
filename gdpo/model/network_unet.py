"""NetworkUNet: a published super-resolution network as a one-step generator's UNet (the `residual` parametrisation).

It draws the network's own picture of the LR. The LR is a function of the condition, its bicubic enlargement, and is
solved for: to the bit, for 8-bit pictures. The noise enters beside the picture, by channels of the network's first
convolution that start at zero: an untrained generator gives the network's pixels whatever the noise. Or the
network sees the noise on its LR from the start (`see_noise`): one trained as a GAN answers it with other texture.

A x2 network is applied twice; the noise enters the first time.
"""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gdpo.model.compact import bicubic
from gdpo.model.spandrel_networks import Network, network_of
from gdpo.model.tiny import UNetOutput

CHANNELS = 48  # of a latent: 3 colours, unshuffled by 4
_PIXELS = CHANNELS // 3  # of the enlarged picture in one of the LR
_MOST_NOISE = 64  # 8-bit levels
_STEPS, _RATE = 6, 1.35  # of `Recovery`: the worst error, of black and white noise, is then 0.085 of an 8-bit level
_NEAR = 0.1  # of an 8-bit level: so near to a whole one counts as that
_SIDE = 16  # of the picture that a network is tried on


class Recovery(nn.Module):
    """condition [B,48,h,w] in [-1,1] -> the LR [B,3,h,w] in [0,1], fp32, of which it is the bicubic enlargement.

    Solved by Van Cittert's iteration: what the enlargement of the estimate lacks is added to the estimate. Clipping is
    part of the enlargement, so that clipped pixels do no harm.
    """

    kernel: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", bicubic(5)[:, None], persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Recovery:
        super()._apply(fn, recurse)
        self.kernel = bicubic(5)[:, None].to(self.kernel.device)  # fp32 whatever the network is in
        return self

    def forward(self, condition: Tensor) -> Tensor:
        device = condition.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self(condition)
        wanted = condition.float() * 0.5 + 0.5
        inside = F.conv2d(torch.ones_like(wanted[:1, :1]), self.kernel, padding=2)  # edges count what is inside alone
        lr = _middle(wanted)
        for _ in range(_STEPS):
            drawn = F.conv2d(lr.flatten(0, 1)[:, None], self.kernel, padding=2) / inside
            drawn = drawn.unflatten(0, (-1, 3)).flatten(1, 2).clamp(0, 1)
            lr = (lr + _RATE * _middle(wanted - drawn)).clamp(0, 1)
        levels = torch.round(lr * 255)
        return torch.where((lr * 255 - levels).abs() < _NEAR, levels / 255, lr)


def _middle(x: Tensor) -> Tensor:
    """The mean of the middle four of each pixel's 16: [B,48,h,w] -> [B,3,h,w]."""
    cells = x.unflatten(1, (3, 16))
    return (cells[:, :, 5] + cells[:, :, 6] + cells[:, :, 9] + cells[:, :, 10]) * 0.25


class NetworkUNet(nn.Module):
    """A published network with the call signature of a diffusers UNet. The timestep is not used.

    Args:
        network: as gdpo.model.spandrel_networks reads it.
        source: "file" and "sha256" of where it is from.
        signal: the factor of the picture in the noisy latent, sqrt(alpha_bar) of the generator's t_noise.

    Raises:
        ValueError: a network that takes no noise, or does not give the same picture twice.
    """

    def __init__(self, network: Network, source: dict[str, str] | None = None, signal: float = 1.0):
        super().__init__()
        self.signal = signal
        self.architecture, self.scale, self.source = network.architecture, network.scale, dict(source or {})
        self.multiple = network.multiple
        self.network = network.model
        self.recover = Recovery()
        self.gradient_checkpointing = False
        self._pending: Tensor | None = None
        self._probe()

    @property
    def windowed(self) -> bool:
        """Whether it is a transformer, whose windows are laid out for one size of picture when it is exported."""
        return any(isinstance(module, nn.LayerNorm) for module in self.network.modules())

    @property
    def _side(self) -> int:
        """Of the smallest picture that it is tried on."""
        return self.multiple * math.ceil(_SIDE / self.multiple)

    def _probe(self) -> None:
        """Try the network: find its first convolution, whose sisters the noise's channels are, and what a LoRA adapts:
        the layers that run."""
        first: list[tuple[str, Tensor]] = []
        ran: list[str] = []

        def seen(name: str) -> Any:
            def hook(module: nn.Module, args: tuple) -> None:
                if isinstance(module, nn.Conv2d) and not first:
                    first.append((name, args[0]))
                if name not in ran:
                    ran.append(name)

            return hook

        layers = {n: m for n, m in self.network.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
        hooks = [m.register_forward_pre_hook(seen(n)) for n, m in layers.items()]
        side = self._side
        picture = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                drawn, again = (self.network(picture.clone()) for _ in range(2))  # some write into their input
        except Exception as error:  # of strangers' code
            raise ValueError(f"{self.architecture}: cannot draw a picture of {side}x{side} ({error})") from None
        finally:
            for hook in hooks:
                hook.remove()
        wanted = (1, 3, self.scale * side, self.scale * side)
        if not isinstance(drawn, Tensor) or tuple(drawn.shape) != wanted or not torch.equal(drawn, again):
            raise ValueError(f"{self.architecture}: does not make one picture {wanted} of one picture; not supported")
        if not first or first[0][1].ndim != 4 or len(first[0][1]) != 1 or first[0][1].shape[2] != first[0][1].shape[3]:
            raise ValueError(f"{self.architecture}: does not begin with a convolution of the picture; not supported")
        self.first, seen_by_it = first[0]
        conv: Any = layers[self.first]
        self.unshuffle = max(1, side // seen_by_it.shape[2])
        self.extra = seen_by_it.shape[2] - side // self.unshuffle
        options = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "bias": False}
        self.noise = nn.Conv2d(CHANNELS * self.unshuffle**2, conv.out_channels, conv.kernel_size, **options)
        nn.init.zeros_(self.noise.weight)
        conv.register_forward_hook(self._add_noise)
        adapted = (n for n in ran if getattr(layers[n], "groups", 1) == 1)
        self.lora_targets = "noise|network\\.(" + "|".join(map(re.escape, adapted)) + ")"

    def _add_noise(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if self._pending is None:
            return None
        noise, self._pending = self._pending, None
        return output + self.noise(noise)

    def train(self, mode: bool = True) -> NetworkUNet:
        """The network stays as it is used: its dropout and the statistics of its normalisations are not trained."""
        super().train(mode)
        self.network.eval()
        return self

    def enable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = True

    def config_dict(self) -> dict:
        about = {"architecture": self.architecture, "scale": self.scale, "source": self.source, "signal": self.signal}
        return {"_class_name": "NetworkUNet", **about}

    @classmethod
    def from_weights(cls, config: dict, state: dict[str, Tensor], where: str) -> NetworkUNet:
        """The generator's network of a saved folder.

        Raises:
            ValueError: weights and config do not fit; `where` is named.
        """
        own = {k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")}
        network = network_of(own, where)
        if (network.architecture, network.scale) != (config.get("architecture"), config.get("scale")):
            raise ValueError(
                f"{where}: must hold a x{config.get('scale')} {config.get('architecture')} network; "
                f"got x{network.scale} {network.architecture}"
            )
        source = config.get("source", {})
        if not isinstance(source, dict) or not all(isinstance(v, str) for v in source.values()):
            raise ValueError(f"{where}: source must hold texts; got {source!r:.60}")
        signal = config.get("signal", 1.0)
        if not isinstance(signal, int | float) or not 0 < signal <= 1:
            raise ValueError(f"{where}: signal must be a number above 0 and up to 1; got {signal!r:.40}")
        unet = cls(network, source, float(signal))
        noise = state.get("noise.weight")
        if noise is None or noise.shape != unet.noise.weight.shape or len(state) != len(own) + 1:
            raise ValueError(
                f"{where}: must hold noise.weight {tuple(unet.noise.weight.shape)} and a network's weights"
            )
        with torch.no_grad():
            unet.noise.weight.copy_(noise)
        return unet

    def check(self) -> NetworkUNet:
        """Whether trained weights survive being saved: a few architectures derive some from others when they are read.

        Raises:
            ValueError: they would not.
        """
        changed = copy.deepcopy(self)
        rng = torch.Generator().manual_seed(1)
        pattern = re.compile(self.lora_targets)
        with torch.no_grad():
            for name, module in changed.named_modules():
                if pattern.fullmatch(name):
                    weight: Any = module.weight
                    weight.mul_(1 + 0.01 * torch.randn(weight.shape, generator=rng))
        state = {k: v.clone() for k, v in changed.state_dict().items()}
        sample = torch.rand(1, 2 * CHANNELS, self._side, self._side, generator=rng)
        try:
            loaded = type(self).from_weights(self.config_dict(), state, self.architecture)
        except ValueError as error:
            raise ValueError(f"{self.architecture}: cannot be read from its own weights ({error})") from None
        with torch.no_grad():
            if not torch.equal(changed(sample, 0).sample, loaded(sample, 0).sample):
                raise ValueError(f"{self.architecture}: derives weights from others, so training them is not supported")
        return self

    def see_noise(self, level: float) -> None:
        """Have the network see its LR with the noise on it: a standard deviation of `level`, of 8-bit levels.

        The noise of a latent [B,48,h,w] is pooled to the LR's pixels, and its channels are given the weights of the
        picture's own in the first convolution. What is added to the picture elsewhere (a skip from it) stays clean.

        Raises:
            ValueError: a level that is not above 0 and at most 64; a network that does more with the LR before its
                first convolution than to scale it.
        """
        if not 0 < level <= _MOST_NOISE:
            raise ValueError(f"noise must be above 0 and at most {_MOST_NOISE} levels of 255; got {level}")
        dark, bright = (torch.full((1, 3, self._side, self._side), value) for value in (0.25, 0.75))
        gain = (self._first_input(bright) - self._first_input(dark)) / 0.5
        first: Any = self.network.get_submodule(self.first)
        plain = first.in_channels == 3 * self.unshuffle**2 and not self.extra and first.groups == 1
        if not plain or (gain - gain.mean()).abs().max() > 1e-3 * gain.mean().abs():
            raise ValueError(
                f"{self.architecture}: does more with a picture before its first convolution than to scale it, so it "
                "cannot see noise there; without --noise, NAOSD teaches it to use the noise"
            )
        scale = float(gain.mean()) * level / 255 / math.sqrt(1 - self.signal**2) / math.sqrt(_PIXELS)
        weight = first.weight.detach().unflatten(1, (3, 1, self.unshuffle**2)).expand(-1, -1, _PIXELS, -1, -1, -1)
        with torch.no_grad():
            self.noise.weight.copy_(weight.flatten(1, 3) * scale)

    def _first_input(self, picture: Tensor) -> Tensor:
        """What the first convolution gets of a picture [B,3,h,w]."""
        seen: list[Tensor] = []
        hook = self.network.get_submodule(self.first).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            with torch.no_grad():
                self.network(picture.clone())
        finally:
            hook.remove()
        return seen[0]

    def fold(self, timestep: int) -> None:
        """Nothing depends on the timestep."""

    def draw(self, lr: Tensor, noise: Tensor | None = None) -> Tensor:
        """The network's picture [B,3,4h,4w] of lr [B,3,h,w], both in [0,1], with the noise [B,48,h,w] if any."""
        if noise is not None:
            noise = F.pixel_unshuffle(noise, self.unshuffle) if self.unshuffle > 1 else noise
            noise = F.pad(noise, (0, self.extra, 0, self.extra)) if self.extra else noise
        self._pending = noise
        try:
            picture = self.network(lr)
        finally:
            self._pending = None
        return picture if self.scale == 4 else self.network(picture.clamp(0, 1))

    def forward(
        self, sample: Tensor, timestep: Tensor | int, encoder_hidden_states: Tensor | None = None
    ) -> UNetOutput:
        """sample [B,96,h,w], timestep unused -> .sample [B,48,h,w]. No text is used."""
        m = self.multiple
        if sample.shape[1] != 2 * CHANNELS or sample.shape[2] % m or sample.shape[3] % m:
            raise ValueError(
                f"sample must be [B,{2 * CHANNELS},h,w] with h and w multiples of {m}; got {tuple(sample.shape)}"
            )
        noisy, condition = sample[:, :CHANNELS], sample[:, CHANNELS:]
        lr, noise = self.recover(condition).to(sample.dtype), noisy - self.signal * condition
        if self.gradient_checkpointing and torch.is_grad_enabled():
            picture = checkpoint(self.draw, lr, noise, use_reentrant=False)
        else:
            picture = self.draw(lr, noise)
        return UNetOutput(F.pixel_unshuffle(2 * picture - 1, 4) - condition)
