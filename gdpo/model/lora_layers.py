"""A LoRA layer as one autograd function: y = W x + b + s B A x in three kernels, its gradients in five.

peft composes it of seven and nine: two casts, three products, the scale and the sum. Here the scale is on B, the sum is
part of the second product, and what a whole model needs cast is cast together. Weights, names and files stay peft's;
what is no plain LoRA (DoRA, dropout, a merged layer, a base that learns) keeps peft's forward pass.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_conv_backward = torch.ops.aten.convolution_backward


class _LoraLinear(torch.autograd.Function):
    """x [...,C], w [O,C], bias [O] or None, a [R,C], b [O,R] (the scale in it) -> [...,O]."""

    @staticmethod
    def forward(ctx, x, w, bias, a, b):
        rows = x.reshape(-1, x.shape[-1])
        hidden = rows @ a.T
        ctx.save_for_backward(rows, w, a, b, hidden)
        ctx.shape = x.shape
        return F.linear(rows, w, bias).addmm_(hidden, b.T).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, w, a, b, hidden = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        back = grad @ b
        grad_x = (grad @ w).addmm_(back, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, back.T @ rows, grad.T @ hidden


class _LoraConv(torch.autograd.Function):
    """x [N,C,H,W], w [O,C,k,k], bias [O] or None, a [R,C,k,k], b [O,R] (the scale in it) -> [N,O,H',W']."""

    @staticmethod
    def forward(ctx, x, w, bias, a, b, stride, padding, dilation):
        ctx.where = stride, padding, dilation, False, (0, 0), 1
        hidden = F.conv2d(x, a, None, stride, padding, dilation)
        ctx.save_for_backward(x, w, a, b, hidden)
        out = F.conv2d(x, w, bias, stride, padding, dilation)
        if out.is_contiguous(memory_format=torch.channels_last):
            _pixels(out).addmm_(_pixels(hidden), b.T)  # of a view, so in place
            return out
        return out.add_(F.conv2d(hidden, b[:, :, None, None]))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, w, a, b, hidden = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0]
        rows = _pixels(grad)
        if x.is_contiguous(memory_format=torch.channels_last):  # torch's normalisations give the other order back
            grad = rows.view(grad.shape[0], *grad.shape[2:], -1).permute(0, 3, 1, 2)
        back = (rows @ b).view(grad.shape[0], *grad.shape[2:], -1).permute(0, 3, 1, 2)
        grad_x, grad_a, _ = _conv_backward(back, x, a, None, *ctx.where, (wanted, True, False))
        if wanted:
            grad_x.add_(_conv_backward(grad, x, w, None, *ctx.where, (True, False, False))[0])
        return grad_x, None, None, grad_a, rows.T @ _pixels(hidden), None, None, None


def _pixels(x: Tensor) -> Tensor:
    """[N,C,H,W] -> [N*H*W,C]: of channels-last features a view."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class _Prepared(torch.autograd.Function):
    """A, A, ..., B, B, ... of layers of one rank r and one scale -> the same as products take them.

    In `dtype`, the scale on B, and R = `rank` >= r rows of A and columns of B: a [R,...], b [O,R], the rest zeros.
    """

    @staticmethod
    def forward(ctx, dtype, scale, rank, *weights):
        ctx.scale, ctx.dtype, ctx.like = scale, weights[0].dtype, [(w.shape, w.stride()) for w in weights]
        a, b = _halves(weights)
        sizes = [rank * p[0].numel() for p in a]
        flat = torch.zeros(sum(sizes), dtype=dtype, device=a[0].device)
        starts = itertools.accumulate(sizes, initial=0)
        wide = [flat.as_strided((rank, *p.shape[1:]), p.stride(), start) for p, start in zip(a, starts)]
        torch._foreach_copy_([p[: p0.shape[0]] for p, p0 in zip(wide, a)], list(a))
        stacked = (torch.cat([p.flatten(1) for p in b]) * scale).to(dtype)
        stacked = F.pad(stacked, (0, rank - stacked.shape[1]))
        return *wide, *stacked.split([len(p) for p in b])

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        r = ctx.like[0][0][0]
        (a, b), (like_a, like_b) = _halves(grads), _halves(ctx.like)
        found = [torch.empty_strided(*like, dtype=ctx.dtype, device=a[0].device) for like in like_a]
        torch._foreach_copy_(found, [g[:r] for g in a])
        stacked = torch.cat(list(b))[:, :r].to(ctx.dtype) * ctx.scale
        rows = stacked.split([len(g) for g in b])
        return None, None, None, *found, *(g.view(size) for g, (size, _) in zip(rows, like_b))


def _halves(items: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    return items[: len(items) // 2], items[len(items) // 2 :]


class Shifted(nn.Conv2d):
    """A convolution that adds `shifted` in place of its bias, which is kept: with what else is constant, or nothing."""

    shifted: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.shifted)


def base_of(conv: Any) -> Any | None:
    """A convolution, or the one under its LoRA; None where something looks at its bias (DoRA takes it off again)."""
    if getattr(conv, "lora_variant", None):
        return None
    base = conv.get_base_layer() if hasattr(conv, "get_base_layer") else conv
    return base if type(base) in (nn.Conv2d, Shifted) else None


class _Plain(NamedTuple):
    """The plain LoRA of a frozen layer: A [r,...], B [O,r,...], the scale, and the type to compute in."""

    a: Tensor
    b: Tensor
    scale: float
    dtype: torch.dtype


def _plain(layer: Any) -> _Plain | None:
    """None where peft's own forward pass is to run."""
    if layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    base = layer.base_layer
    if len(names) != 1 or names[0] in layer.lora_variant or base.weight.requires_grad:
        return None
    if type(base) not in (nn.Linear, nn.Conv2d, Shifted) or base._forward_hooks or base._forward_pre_hooks:
        return None  # a hook (where a network's noise enters: network_unet) is called with the layer
    (name,) = names
    a, b, w = layer.lora_A[name], layer.lora_B[name], base.weight
    if b.bias is not None or not isinstance(layer.lora_dropout[name], nn.Identity):
        return None
    device = w.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a.weight.dtype
    return _Plain(a.weight, b.weight, layer.scaling[name], dtype) if w.dtype == dtype else None


def _step(plain: _Plain) -> int:
    """What the rank must be a multiple of: tensor cores read channels by 16 bytes."""
    return 8 if plain.a.is_cuda and plain.dtype.itemsize == 2 else 1


def _prepare(layers: list[Any]) -> Iterator[tuple[Any, tuple[Tensor, Tensor]]]:
    """(layer, its a and b) of those that run as one function."""
    groups: dict[Any, list[tuple[Any, _Plain]]] = {}
    for layer in layers:
        if (plain := _plain(layer)) is not None:
            key = plain.a.shape[0], plain.scale, plain.dtype, plain.a.device, plain.a.dtype
            groups.setdefault(key, []).append((layer, plain))
    for (r, scale, dtype, *_), members in groups.items():
        step = _step(members[0][1])
        a, b = [plain.a for _, plain in members], [plain.b for _, plain in members]
        if (dtype, scale, r % step) == (a[0].dtype, 1, 0):  # they are so already
            made = *a, *(p.flatten(1) for p in b)
        else:
            made = _Prepared.apply(dtype, scale, -(-r // step) * step, *a, *b)
        yield from zip((layer for layer, _ in members), zip(*_halves(made)))


@functools.cache
def _classes() -> dict[type, type]:
    """peft's layers -> those that run as one function where they can."""
    from peft.tuners.lora import layer as peft

    class Linear(peft.Linear):
        def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
            if args or named or (pair := _pair(self, x)) is None:
                return super().forward(x, *args, **named)
            base: Any = self.base_layer
            return _LoraLinear.apply(x.to(base.weight.dtype), base.weight, base.bias, *pair)

    class Conv2d(peft.Conv2d):
        def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
            base: Any = self.base_layer
            odd = base.groups != 1 or base.padding_mode != "zeros" or isinstance(base.padding, str)
            if odd or args or named or (pair := _pair(self, x)) is None:
                return super().forward(x, *args, **named)
            bias = base.shifted if isinstance(base, Shifted) else base.bias
            where = base.stride, base.padding, base.dilation
            return _LoraConv.apply(x.to(base.weight.dtype), base.weight, bias, *pair, *where)

    return {peft.Linear: Linear, peft.Conv2d: Conv2d}


def _pair(layer: Any, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """A layer's a and b: the model's, or in a part that is called by itself (or again, checkpointed) its own."""
    if torch.compiler.is_compiling():
        return None
    autocast = torch.is_autocast_enabled(x.device.type)
    if not autocast and x.dtype != layer.base_layer.weight.dtype:
        return None
    return layer.prepared or next((pair for _, pair in _prepare([layer])), None)


_layers_of: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()  # a walk costs milliseconds, a step has many


def layers(model: nn.Module) -> list[Any]:
    """What peft has put into a model, in order: LoRA layers, and modules trained whole."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    if model not in _layers_of:
        _layers_of[model] = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, ModulesToSaveWrapper))]
    return _layers_of[model]


def changed(model: nn.Module) -> None:
    """To be called where adapters were added or removed. Plain LoRA layers run as one function from then on."""
    _layers_of.pop(model, None)
    own = _classes()
    for layer in layers(model):
        if type(layer) in own:
            layer.__class__, layer.prepared = own[type(layer)], None


@contextmanager
def cast_together(model: nn.Module | None) -> Iterator[None]:
    """Inside, a model's LoRA weights are cast and scaled all at once, instead of each where it is used."""
    if model is None or not hasattr(model, "peft_config") or torch.compiler.is_compiling():
        yield
        return
    fused = [layer for layer in layers(model) if hasattr(layer, "prepared")]
    for layer, pair in _prepare(fused):
        layer.prepared = pair
    try:
        yield
    finally:
        for layer in fused:
            layer.prepared = None
