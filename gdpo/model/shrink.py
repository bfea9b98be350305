"""A smaller network from a larger one: what is taken away, least squares makes up for, layer by layer.

Both ways look at what the layers get of some pictures. A convolution is linear in its input, so the weights with which
it does best on a smaller or another input are the solution of a linear system. Each system sees what the smaller
network's earlier layers really give, so that errors do not add up. The rest is learned, with the larger as teacher.
All of this runs on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdpo.model.compact import CompactUNet
from gdpo.model.network_unet import NetworkUNet
from gdpo.model.spandrel_networks import network_of

_RIDGE = 1e-5  # of a system's mean diagonal
_RIDGE_OF_BLOCK = 2e-4
Progress = Callable[[Iterable[Any]], Iterable[Any]]


class System:
    """Least squares for a 3x3 convolution, from its inputs and what it is to give.

    Args:
        channels, outputs: of the convolution.
    """

    def __init__(self, channels: int, outputs: int):
        self.channels = channels
        self.gram = torch.zeros(9 * channels + 1, 9 * channels + 1, dtype=torch.double)
        self.right = torch.zeros(9 * channels + 1, outputs, dtype=torch.double)

    def add(self, x: Tensor, wanted: Tensor) -> None:
        """x [C,h+2,w+2], wanted [O,h,w]."""
        rows = F.unfold(x[None], 3)[0]
        rows = torch.cat([rows, torch.ones_like(rows[:1])])
        self.gram += (rows @ rows.T).double()
        self.right += (rows @ wanted.flatten(1).T).double()

    def solve(self, kept: Sequence[int] | None = None, ridge: float = _RIDGE) -> tuple[Tensor, Tensor]:
        """(weight [O,K,3,3], bias [O]) of the convolution of all or the K `kept` channels, float32."""
        kept = range(self.channels) if kept is None else kept
        at = [9 * c + i for c in kept for i in range(9)] + [9 * self.channels]
        gram = self._ridged(ridge)[at][:, at]
        found = torch.linalg.solve(gram, self.right[at]).float()
        return found[:-1].T.unflatten(1, (-1, 3, 3)).contiguous(), found[-1]

    def choose(self, count: int) -> list[int]:
        """The channels to keep: the one whose loss the others make up for best goes first, and so on.

        What a channel's loss costs after all other weights have adapted is known from the inverse of the system
        (optimal brain surgeon: Hassibi and Stork 1993), here of a channel's nine weights at once.
        """
        inverse = torch.linalg.inv(self._ridged(_RIDGE))
        weight, kept = inverse @ self.right, list(range(self.channels))

        def cost(channel: int) -> float:
            own = slice(9 * channel, 9 * channel + 9)
            return float((weight[own] * torch.linalg.solve(inverse[own, own], weight[own])).sum())

        while len(kept) > count:
            least = min(kept, key=cost)
            own = slice(9 * least, 9 * least + 9)
            gain = inverse[:, own] @ torch.linalg.inv(inverse[own, own])
            weight, inverse = weight - gain @ weight[own], inverse - gain @ inverse[own]
            kept.remove(least)
        return kept

    def _ridged(self, ridge: float) -> Tensor:
        gram = self.gram.clone()
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        return gram


@torch.no_grad()
def narrow(unet: CompactUNet, samples: Tensor, width: int, progress: Progress = iter) -> CompactUNet:
    """A compact network of which every second activation has `width` channels.

    Args:
        samples: [N,in_channels,h,w], what the UNet gets of varied pictures.
        progress: is given the layers, and gives them.

    Raises:
        ValueError: a width that is not below that of these activations.
    """
    config = unet.config
    if not config.layers:
        raise ValueError("this network has one activation alone; there is none to narrow")
    if not 0 < width < config.widths[1]:
        raise ValueError(f"width must be above 0 and below the network's {config.widths[1]}; got {width}")
    made = copy.deepcopy(unet)
    layers: list[Any] = [made.conv_in, *made.convs, made.conv_out]
    whole: list[Any] = [unet.conv_in, *unet.convs, unet.conv_out]
    small = large = _first_input(unet, samples)  # what layer i - 1 gets
    for i in progress(range(1, config.layers + 1, 2)):
        before, after = layers[i], layers[i + 1]
        act: Any = made.acts[i]
        large = unet.run(large, i - 1, i + 1)
        seen = made.run(small, i - 1, i + 1)
        system = System(before.out_channels, after.out_channels)
        for x, y in zip(seen, large):
            system.add(x, whole[i + 1](y[None])[0])
        kept = system.choose(width)
        after.weight, after.bias = map(nn.Parameter, system.solve(kept))
        before.weight, before.bias = nn.Parameter(before.weight[kept]), nn.Parameter(before.bias[kept])
        act.weight = nn.Parameter(act.weight[kept])
        made.beyond[i, :width] = made.beyond[i, kept]
        made.beyond[i, width:] = 0
        before.out_channels = after.in_channels = width
        small = seen[:, kept]
    finished = CompactUNet(replace(config, inner_width=width))
    finished.load_state_dict(made.state_dict())
    return finished


def _first_input(unet: CompactUNet, samples: Tensor) -> Tensor:
    """What the first convolution gets, [N,6,h+2,w+2]."""
    found: list[Tensor] = []
    hook = unet.conv_in.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    unet(samples, 0)
    hook.remove()
    return found[0]


@torch.no_grad()
def merge_blocks(unet: NetworkUNet, lrs: Tensor, ends: Sequence[int], progress: Progress = iter) -> NetworkUNet:
    """An RRDBNet (Real-ESRGAN x4plus and its like) of fewer residual blocks.

    The k-th block stands for those of the whole network up to the one numbered ends[k]. It begins as the first or the
    last of these, whichever does better, with its last convolution fitted to what the whole network has behind them.

    Args:
        lrs: [N,3,h,w] in [0,1], varied pictures.
        ends: ascending; the last is the number of blocks of the whole network.
        progress: is given the blocks, and gives them.

    Raises:
        ValueError: another architecture, or ends that do not ascend to the number of blocks.
    """
    if unet.architecture != "ESRGAN" or unet.unshuffle > 1:
        got = unet.architecture + (f" that unshuffles by {unet.unshuffle}" if unet.unshuffle > 1 else "")
        raise ValueError(f"blocks can be merged in a x4 RRDBNet (ESRGAN, Real-ESRGAN x4plus); got {got}")
    first, trunk = (unet.network.get_submodule(f"model.{i}") for i in (0, 1))
    whole: list[Any] = list(trunk.get_submodule("sub").children())[:-1]
    if list(ends) != sorted(set(ends)) or not ends or ends[0] < 1 or ends[-1] != len(whole):
        raise ValueError(f"blocks must be numbers that ascend to {len(whole)}, the network's last; got {list(ends)}")
    starts: list[Tensor] = [first(lr[None]) for lr in lrs]
    behind = []  # features of the whole network behind each end
    for x in starts:
        features = []
        for number, block in enumerate(whole, start=1):
            x = block(x)
            if number in ends:
                features.append(x)
        behind.append(features)
    blocks = []
    for k, (begin, end) in progress(list(enumerate(pairwise([0, *ends])))):
        wanted = [features[k] for features in behind]
        fitted = [_fitted(whole[i], starts, wanted) for i in sorted({begin, end - 1})]
        block = min(fitted, key=lambda candidate: _error(candidate, starts, wanted))
        starts = [block(x) for x in starts]
        blocks.append(block)
    state = unet.network.state_dict()
    of_blocks = tuple(f"model.1.sub.{i}." for i in range(len(whole)))
    kept = {name: value for name, value in state.items() if not name.startswith(of_blocks)}
    body = f"model.1.sub.{len(whole)}."
    kept = {name.replace(body, f"model.1.sub.{len(ends)}."): value for name, value in kept.items()}
    for k, block in enumerate(blocks):
        kept |= {f"model.1.sub.{k}.{name}": value for name, value in block.state_dict().items()}
    small = NetworkUNet(network_of(kept, unet.architecture), unet.source, unet.signal)
    small.noise.load_state_dict(unet.noise.state_dict())
    return small


def _fitted(block: Any, starts: list[Tensor], wanted: list[Tensor]) -> Any:
    """A copy of a residual block whose last convolution takes `starts` to what is wanted."""
    block = copy.deepcopy(block)
    seen: list[Tensor] = []
    dense = block.RDB3
    conv = dense.conv5[0]
    hook = conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    system = System(conv.in_channels, conv.out_channels)
    for x, y in zip(starts, wanted):
        block(x)
        features = seen.pop()
        # y = x + 0.2 (z + 0.2 conv(features)), where z, what the last dense block gets, is its first features
        rest = ((y - x) / 0.2 - features[:, : conv.out_channels]) / 0.2
        system.add(features[0], rest[0, :, 1:-1, 1:-1])
    hook.remove()
    conv.weight, conv.bias = map(nn.Parameter, system.solve(ridge=_RIDGE_OF_BLOCK))
    return block.requires_grad_(False)


def _error(block: Any, starts: list[Tensor], wanted: list[Tensor]) -> float:
    return sum(float(F.mse_loss(block(x), y)) for x, y in zip(starts, wanted))
