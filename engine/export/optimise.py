"""Make a generator fast in torch, by steps that can each be left out: fewer passes over memory, fewer launches.

`prepare` applies them to a generator in place and returns image, noise -> output, float32 at both ends. What changes is
rounding alone; engine.export.torch_backend runs the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from engine.export import graphs
from gdpo.generator import OneStepGenerator
from gdpo.model.norms import fuse_norms


@dataclass(frozen=True)
class Steps:
    """What is done to a generator. None of it: the definition.

    Attributes:
        precision: of weights and features: "fp32", "bf16", or "fp16" throughout (as Stable Diffusion is often run; the
            decoder of a trained model may overflow).
        channels_last: features and filters with the channels innermost, as tensor cores read them.
        folded: timestep and prompt as constants (engine.export.graphs).
        attention: queries, keys and values of self-attention from one product.
        norms: group normalisation and the SiLU behind it as one kernel (gdpo.kernels.group_norm).
        graphs: a shape that comes again is recorded as a CUDA graph, with convolutions chosen by measurement.
        compiled: torch.compile, for each shape when it first comes: minutes for a large model.
    """

    precision: str = "fp32"
    channels_last: bool = False
    folded: bool = False
    attention: bool = False
    norms: bool = False
    graphs: bool = False
    compiled: bool = False


DEFINITION = Steps()


def fastest(device: torch.device) -> Steps:
    """All that pays on a device without minutes of compiling."""
    on_gpu = device.type == "cuda"
    return Steps("bf16", channels_last=True, folded=True, attention=True, norms=on_gpu, graphs=on_gpu)


def prepare(generator: OneStepGenerator, steps: Steps) -> nn.Module:
    """Apply the steps in place: image [B,3,H,W] in [-1,1], noise [B,C,h,w] -> output [B,3,H,W], all float32.

    Raises:
        ValueError: an unknown precision, or a UNet that does not graphs.
    """
    if steps.precision not in graphs.DTYPES:
        raise ValueError(f"precision must be one of {', '.join(graphs.DTYPES)}; got {steps.precision!r}")
    generator.eval().requires_grad_(False)
    if steps.folded:
        graphs.fold(generator)
        for module in generator.unet.modules():
            if type(module) is graphs._FixedCrossAttention:
                module.__class__ = _DenseCrossAttention
    elif steps != DEFINITION:
        generator.merge_lora()
    for part in (generator.unet, generator.codec):
        if steps.attention:
            fuse_attention(part)
        nn.Module.to(part, graphs.DTYPES[steps.precision])
        if steps.channels_last:
            to_channels_last(part)
        if steps.norms:
            fuse_norms(part)
    module = graphs.Whole(generator, steps.precision) if steps.folded else Plain(generator, steps.precision)
    if steps.compiled:
        module.compile(dynamic=False)
    return module


class Plain(nn.Module):
    """Encode, predict, decode, as training does; not clamped (see graphs.Decoder)."""

    def __init__(self, generator: OneStepGenerator, precision: str):
        super().__init__()
        self.generator, self.dtype = generator, graphs.DTYPES[precision]

    def forward(self, image: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        latent = self.generator.encode(image.to(self.dtype))
        return self.generator.codec.decode(self.generator.predict(latent, noise.to(self.dtype)).x0).float()


# ---- channels-last


def to_channels_last(module: nn.Module) -> None:
    """Filters with the channels innermost; features follow them, and stay so behind diffusers' transformers."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    parts: list[Any] = list(module.modules())
    for part in parts:
        if hasattr(part, "_get_output_for_continuous_inputs"):  # Transformer2DModel copies into the other order there
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


# ---- attention


class _DenseCrossAttention(graphs._FixedCrossAttention):
    """Each picture's keys and values in memory of their own: attention kernels of GPUs (cuDNN's comes first on an H100)
    are little tried, and have been wrong, on a batch that is one picture's with a stride of 0."""

    def forward(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        key, value = (t.expand(len(hidden_states), -1, -1, -1).contiguous() for t in (self.key, self.value))
        out = F.scaled_dot_product_attention(query, key, value)
        return attn.to_out[0](out.transpose(1, 2).flatten(2)) / attn.rescale_output_factor


class _SelfAttention:
    """An attention processor of diffusers with one product, `attn.to_qkv`, for queries, keys and values."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        temb: None = None,
    ) -> torch.Tensor:
        picture = hidden_states.ndim == 4
        x = hidden_states.flatten(2).transpose(1, 2) if picture else hidden_states
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        query, key, value = attn.to_qkv(x).unflatten(-1, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
        out = attn.to_out[0](F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        out = out.transpose(1, 2).unflatten(2, hidden_states.shape[2:]) if picture else out
        return (out + hidden_states if attn.residual_connection else out) / attn.rescale_output_factor


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
            part.to_qkv = _joined(layers)
            part.to_q = part.to_k = part.to_v = nn.Identity()
            part.set_processor(_SelfAttention())


def _joined(layers: tuple[nn.Linear, ...]) -> nn.Linear:
    joined: Any = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers), device="meta")
    joined.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    biases: list[torch.Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    joined.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    return joined
