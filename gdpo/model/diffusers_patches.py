"""Every place that reaches into what diffusers keeps to itself, of its networks: cheaper, fused, folded.

REACHES lists the names that each patch needs; tests/gdpo/test_patches.py tells which no longer fits a new version.
pyproject.toml holds diffusers below the first version that was not tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

from gdpo.kernels import geglu, group_norm, residual_sum
from gdpo.model.layers import PaddedBehind, attention, subpixel, tokens
from gdpo.model.lora_layers import Shifted, base_of

# Patch -> (class of diffusers, what instances of it must have).
REACHES: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "norms_in_own_precision": [
        ("diffusers.models.upsampling.Upsample2D", ("interpolate", "norm", "use_conv_transpose")),
    ],
    "fuse_norms": [
        (
            "diffusers.models.resnet.ResnetBlock2D",
            ("norm1", "norm2", "conv1", "nonlinearity", "time_embedding_norm", "time_emb_proj", "skip_time_act"),
        ),
        ("diffusers.UNet2DConditionModel", ("conv_norm_out", "conv_act")),
    ],
    "fuse_gates": [("diffusers.models.activations.GEGLU", ("proj", "gelu"))],
    "fold_constants": [
        ("diffusers.models.resnet.ResnetBlock2D", ("time_emb_proj", "time_embedding_norm", "conv1", "nonlinearity")),
        ("diffusers.UNet2DConditionModel", ("time_embedding", "get_time_embed")),
        (
            "diffusers.models.attention_processor.Attention",
            ("set_processor", "to_k", "to_v", "norm_cross", "norm_q", "residual_connection"),
        ),
    ],
    "fuse_attention": [
        (
            "diffusers.models.attention_processor.Attention",
            ("to_q", "to_k", "to_v", "to_out", "heads", "group_norm", "norm_q", "norm_k", "spatial_norm", "add_k_proj")
            + ("is_cross_attention", "residual_connection", "rescale_output_factor", "set_processor"),
        ),
    ],
    "skip_divisions": [
        (
            "diffusers.models.resnet.ResnetBlock2D",
            ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut", "nonlinearity", "skip_time_act")
            + ("time_embedding_norm", "upsample", "downsample", "dropout", "output_scale_factor"),
        ),
    ],
    "fuse_residuals": [("diffusers.models.resnet.ResnetBlock2D", ("conv2", "conv_shortcut"))],
    "merge_biases": [("diffusers.models.resnet.ResnetBlock2D", ("conv2", "conv_shortcut"))],
    "fold_upsampling": [
        ("diffusers.models.upsampling.Upsample2D", ("conv", "interpolate", "norm", "use_conv_transpose")),
    ],
    "fold_padding": [("diffusers.models.downsampling.Downsample2D", ("conv", "padding", "use_conv"))],
    "transformers_channels_last": [
        (
            "diffusers.models.transformers.transformer_2d.Transformer2DModel",
            ("_get_output_for_continuous_inputs", "use_linear_projection", "proj_out"),
        ),
    ],
}

# ---- normalisation


class _GroupNorm(nn.GroupNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class _LayerNorm(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def norms_in_own_precision(model: nn.Module) -> None:
    """Keep CUDA's autocast from widening every normalisation and every upsampling to fp32, in place.

    The statistics are fp32 inside the kernels anyway; what autocast adds are fp32 outputs, which the activation after
    them computes on and the backward pass keeps: twice the bytes for values that the next convolution rounds. Upsampled
    features, repetitions of what was there, would be the largest of a decoder.
    """
    own: dict[type, type] = {nn.GroupNorm: _GroupNorm, nn.LayerNorm: _LayerNorm}
    modules: list[Any] = list(model.modules())
    for module in modules:
        if type(module) in own:
            module.__class__ = own[type(module)]
        elif type(module).__name__ == "Upsample2D" and module.interpolate and module.norm is None:
            if module.use_conv_transpose:
                continue  # it upsamples by itself
            module.interpolate = False  # from here on before it
            module.register_forward_pre_hook(_upsampled, with_kwargs=True)


def _upsampled(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
    """What Upsample2D does ahead of its convolution, in the precision of its input."""
    x, size = inputs[0], (*inputs[1:], named.get("output_size"))[0]
    if 4 * x.numel() > 1 << 32:  # as Upsample2D: channels-last, CUDA leaves what is past 2^32 empty (pytorch#141831)
        x = x.contiguous()
    with torch.autocast(x.device.type, enabled=False):
        x = F.interpolate(x, size=size, scale_factor=None if size else 2.0, mode="nearest")
    return (x, *inputs[1:]), named


class FusedGroupNorm(nn.Module):
    """nn.GroupNorm, with SiLU or without, on the fused kernel where it can run; `shift` [C] is added to x first."""

    shift: torch.Tensor | None

    def __init__(self, norm: nn.GroupNorm, silu: bool = False, shift: torch.Tensor | None = None):
        super().__init__()
        self.groups, self.eps, self.silu = norm.num_groups, norm.eps, silu
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        known = None if torch.compiler.is_compiling() else getattr(x, "channel_statistics", None)
        return group_norm(
            x, self.groups, self.weight, self.bias, self.eps, silu=self.silu, shift=self.shift, statistics=known
        )


def fuse_norms(module: nn.Module) -> None:
    """Replace every affine GroupNorm, with the SiLU behind it and the bias before it in diffusers' blocks.

    Every parameter keeps its name: a model in training is saved as it was read.
    """
    from diffusers.models.resnet import ResnetBlock2D

    block: Any = ResnetBlock2D
    parts: list[Any] = list(module.modules())
    for part in parts:
        if isinstance(part, block) and isinstance(part.nonlinearity, nn.SiLU):
            if part.time_embedding_norm == "scale_shift" or not all(map(_affine, (part.norm1, part.norm2))):
                continue  # the SiLU follows something else
            part.norm1 = FusedGroupNorm(part.norm1, True)
            part.norm2 = FusedGroupNorm(part.norm2, True, _taken_bias(part.conv1))
            if part.time_emb_proj is not None and not part.skip_time_act:
                part.time_emb_proj.register_forward_pre_hook(_activated)
            part.nonlinearity = nn.Identity()
        elif _affine(getattr(part, "conv_norm_out", None)) and isinstance(getattr(part, "conv_act", None), nn.SiLU):
            part.conv_norm_out, part.conv_act = FusedGroupNorm(part.conv_norm_out, True), nn.Identity()
    for part in list(module.modules()):
        children: list[tuple[str, Any]] = list(part.named_children())
        for name, child in children:
            if _affine(child):
                setattr(part, name, FusedGroupNorm(child))


def _affine(norm: object) -> bool:
    return isinstance(norm, nn.GroupNorm) and norm.affine


def _activated(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (F.silu(inputs[0]),)


def _taken_bias(conv: Any) -> torch.Tensor | None:
    """What a convolution adds, which a GPU would do in a pass of its own; it adds it no more, where this can be."""
    base = base_of(conv)
    if base is None:
        return None
    added = base.shifted if type(base) is Shifted else base.bias
    base.__class__ = Shifted
    base.register_buffer("shifted", None, persistent=False)
    return added


def fuse_gates(module: nn.Module) -> None:
    """The gate of a transformer's feed-forward block as one kernel, in place."""
    parts: list[Any] = list(module.modules())
    for part in parts:
        if type(part).__name__ == "GEGLU":
            part.forward = MethodType(_gated, part)


def _gated(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return geglu(self.proj(x))


# ---- constants


class FixedCrossAttention(nn.Module):
    """An attention processor of diffusers whose keys and values are constants, [1, heads, L, D]."""

    key: torch.Tensor
    value: torch.Tensor

    def __init__(self, attention: Any, prompt: torch.Tensor):
        super().__init__()
        heads = attention.heads
        for name, projection in (("key", attention.to_k), ("value", attention.to_v)):
            projected = projection(prompt)
            self.register_buffer(name, projected.unflatten(-1, (heads, -1)).transpose(1, 2).contiguous())

    def forward(self, attn: Any, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        batch = hidden_states.shape[0]  # len() would fix the batch of an export
        key, value = self.key.expand(batch, -1, -1, -1), self.value.expand(batch, -1, -1, -1)
        out = F.scaled_dot_product_attention(query, key, value)
        return _divided(attn.to_out[0](out.transpose(1, 2).flatten(2)), attn.rescale_output_factor)


class _NoTimeEmbedding(nn.Module):
    """Stands in for the perceptron whose results are folded away."""

    def forward(self, *args, **kwargs) -> None:
        return None


class DenseCrossAttention(FixedCrossAttention):
    """Each picture's keys and values in memory of their own: attention kernels of GPUs (cuDNN's comes first on an H100)
    are little tried, and have been wrong, on a batch that is one picture's with a stride of 0."""

    def forward(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        key, value = (t.expand(len(hidden_states), -1, -1, -1).contiguous() for t in (self.key, self.value))
        out = F.scaled_dot_product_attention(query, key, value)
        return _divided(attn.to_out[0](out.transpose(1, 2).flatten(2)), attn.rescale_output_factor)


@torch.no_grad()
def fold_constants(unet: Any, timestep: int, prompt_embeds: Callable[[int], torch.Tensor]) -> None:
    """Make constants of the timestep and the prompt, [1,L,D], in a UNet2DConditionModel, in place.

    Raises:
        ValueError: an architecture that is not known to fold; it names what is in the way.
    """
    from diffusers.models.resnet import ResnetBlock2D

    odd = [k for k in ("class_embed_type", "addition_embed_type", "time_cond_proj_dim") if unet.config.get(k)]
    if odd or unet.config.get("encoder_hid_dim_type"):
        raise ValueError(
            f"unet/config.json: {', '.join(odd) or 'encoder_hid_dim_type'} is set; this UNet does not fold"
        )
    parameter = next(unet.parameters())
    sample = torch.zeros(1, dtype=parameter.dtype, device=parameter.device)
    time = unet.time_embedding(unet.get_time_embed(sample, timestep))
    prompt = prompt_embeds(1).to(parameter.dtype)
    blocks: tuple[Any, ...] = (ResnetBlock2D,)
    for name, module in list(unet.named_modules()):
        if isinstance(module, blocks) and module.time_emb_proj is not None:
            if module.time_embedding_norm != "default":
                raise ValueError(f"{name}: time_embedding_norm {module.time_embedding_norm!r} does not fold")
            module.conv1.bias.add_(module.time_emb_proj(module.nonlinearity(time))[0])
            module.time_emb_proj, module.time_embedding_norm = None, "folded"
        elif name.endswith("attn2"):
            if module.norm_cross or module.norm_q is not None or module.residual_connection:
                raise ValueError(f"{name}: cross-attention with extra normalisation does not fold")
            module.set_processor(FixedCrossAttention(module, prompt))
            module.to_k = module.to_v = nn.Identity()
    unet.time_embedding = _NoTimeEmbedding()
    unet.get_time_embed = lambda sample, timestep: None  # a copy from host to device: no CUDA graph can record it


def _divided(x: torch.Tensor, by: float) -> torch.Tensor:
    """x / by; the factor that diffusers divides by is nearly always 1, and a pass over memory for nothing."""
    return x if by == 1 else x / by


def skip_divisions(module: nn.Module) -> None:
    """Keep every plain ResnetBlock2D from dividing its result by 1: equal to the bit."""
    parts: list[Any] = list(module.modules())
    for part in parts:
        if type(part).__name__ == "ResnetBlock2D" and part.output_scale_factor == 1 and part.dropout.p == 0:
            other = part.upsample or part.downsample or part.skip_time_act
            if not other and part.time_embedding_norm != "scale_shift":
                part.forward = MethodType(_resnet_output, part)


def _resnet_output(self: Any, x: torch.Tensor, temb: torch.Tensor | None, *args: Any, **kwargs: Any) -> torch.Tensor:
    x, h = _resnet_branches(self, x, temb)
    return x + h


def _resnet_branches(self: Any, x: torch.Tensor, temb: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    h = self.conv1(self.nonlinearity(self.norm1(x)))
    if self.time_emb_proj is not None:
        h = h + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
    h = self.conv2(self.nonlinearity(self.norm2(h)))
    return x if self.conv_shortcut is None else self.conv_shortcut(x), h


@torch.no_grad()
def fuse_residuals(module: nn.Module) -> None:
    """In blocks that `skip_divisions` found: the last sum, its convolutions' biases and its statistics in one pass.

    In place, for parts that need no gradient; parameters stay.
    """
    parts: list[Any] = list(module.modules())
    for part in parts:
        if getattr(part.forward, "__func__", None) is _resnet_output:
            taken = [_taken_bias(conv) for conv in (part.conv2, part.conv_shortcut) if conv is not None]
            biases = [bias.float() for bias in taken if bias is not None]
            part.register_buffer("added", torch.stack(biases).sum(0) if biases else None, persistent=False)
            part.forward = MethodType(_resnet_sum, part)


def _resnet_sum(self: Any, x: torch.Tensor, temb: torch.Tensor | None, *args: Any, **kwargs: Any) -> torch.Tensor:
    out, statistics = residual_sum(*_resnet_branches(self, x, temb), self.added)
    if statistics is not None:
        out.channel_statistics = statistics  # type: ignore[attr-defined]  # for the FusedGroupNorm that reads it next
    return out


@torch.no_grad()
def merge_biases(module: nn.Module) -> None:
    """Add what the two last convolutions of a ResnetBlock2D add in one place, in place: a pass over memory less."""
    parts: list[Any] = list(module.modules())
    for part in parts:
        if type(part).__name__ == "ResnetBlock2D" and part.conv_shortcut is not None:
            last, shortcut = part.conv2, part.conv_shortcut
            plain = type(last) is nn.Conv2d and type(shortcut) is nn.Conv2d
            if plain and last.bias is not None and shortcut.bias is not None:
                shortcut.bias.add_(last.bias)
                last.bias = None


# ---- upsampling and downsampling


def fold_upsampling(module: nn.Module) -> None:
    """Nearest x2 and the 3x3 convolution behind it become one transposed convolution (see `subpixel`), in place.

    Fold what is still fp32: sums of weights are rounded once then, as the weights themselves are.
    """
    parts: list[Any] = list(module.modules())
    for part in parts:
        if type(part).__name__ == "Upsample2D":
            if part.interpolate and part.norm is None and is_3x3(getattr(part, "conv", None), stride=1, padding=1):
                part.conv, part.use_conv_transpose = subpixel(part.conv), True
        elif isinstance(part, nn.Sequential):  # AutoencoderTiny's
            for i, (up, conv) in enumerate(itertools.pairwise(part)):
                nearest = isinstance(up, nn.Upsample) and (up.scale_factor, up.mode) == (2, "nearest")
                if nearest and is_3x3(conv, stride=1, padding=1):
                    part[i], part[i + 1] = nn.Identity(), subpixel(conv)


def is_3x3(conv: Any, stride: int, padding: int) -> TypeGuard[nn.Conv2d]:
    """Whether it is a plain convolution, without a LoRA around it."""
    if type(conv) is not nn.Conv2d or conv.groups != 1 or conv.padding_mode != "zeros":
        return False
    return (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == (
        (3, 3),
        2 * (stride,),
        2 * (padding,),
        (1, 1),
    )


def fold_padding(module: nn.Module) -> None:
    """Padding behind the last row and column (the encoder's Downsample2D) without a copy of the features, in place."""
    parts: list[Any] = list(module.modules())
    for part in parts:
        pads = type(part).__name__ == "Downsample2D" and part.use_conv and part.padding == 0
        if pads and is_3x3(part.conv, stride=2, padding=0):
            part.conv.__class__, part.padding = PaddedBehind, 1  # 1: it pads no more


# ---- attention


class _SelfAttention:
    """One product, `attn.to_qkv`, for queries (scaled), keys and values: an attention processor of diffusers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        temb: None = None,
    ) -> torch.Tensor:
        x, picture = tokens(attn, hidden_states), hidden_states.ndim == 4
        query, key, value = attn.to_qkv(x).unflatten(-1, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
        out = attn.to_out[0](attention(query, key, value).transpose(1, 2).flatten(2))
        out = out.transpose(1, 2).unflatten(2, hidden_states.shape[2:]) if picture else out
        return _divided(out + hidden_states if attn.residual_connection else out, attn.rescale_output_factor)


def fuse_attention(module: nn.Module) -> None:
    """Plain self-attention of diffusers: one product instead of three. Other kinds stay as they are."""
    from diffusers.models.attention_processor import Attention

    parts: list[Any] = [part for part in module.modules() if isinstance(part, Attention)]
    for part in parts:
        layers = (part.to_q, part.to_k, part.to_v)
        extras = (part.norm_q, part.norm_k, part.spatial_norm, part.add_k_proj)
        if part.is_cross_attention or any(extra is not None for extra in extras):
            continue
        if all(isinstance(layer, nn.Linear) for layer in layers) and len({layer.bias is None for layer in layers}) == 1:
            part.to_qkv = _joined(layers, (layers[0].out_features // part.heads) ** -0.5)
            part.to_q = part.to_k = part.to_v = nn.Identity()
            part.set_processor(_SelfAttention())


def _joined(layers: tuple[nn.Linear, ...], scale: float) -> nn.Linear:
    """One layer for all of them; the first one's result, the queries, comes times `scale`."""
    joined: Any = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers), device="meta")
    scales = [scale, *(1.0 for _ in layers[1:])]
    for name in ("weight", "bias"):
        parts: list[torch.Tensor] = [getattr(layer, name) for layer in layers if getattr(layer, name) is not None]
        whole = torch.cat([part.detach() * by for part, by in zip(parts, scales)]) if parts else None
        setattr(joined, name, None if whole is None else nn.Parameter(whole, requires_grad=False))
    return joined


def transformers_channels_last(module: nn.Module) -> None:
    """Keep Transformer2DModel, which copies into the other order, from doing so."""
    parts: list[Any] = list(module.modules())
    for part in parts:
        if hasattr(part, "_get_output_for_continuous_inputs"):
            part._get_output_for_continuous_inputs = MethodType(_transformer_output, part)


def _transformer_output(
    self: Any,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    batch_size: int,
    height: int,
    width: int,
    inner_dim: int,
) -> torch.Tensor:
    def picture(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)

    if self.use_linear_projection:
        return picture(self.proj_out(hidden_states)) + residual
    return self.proj_out(picture(hidden_states)) + residual
