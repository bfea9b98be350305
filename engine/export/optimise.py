"""Make a generator fast in torch, by steps that can each be left out: fewer passes over memory, fewer launches.

`prepare` applies them to a generator in place and returns image, noise -> output, float32 at both ends. What changes is
rounding alone; engine.export.torch_backend runs the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from engine.export import graphs
from gdpo.generator import OneStepGenerator
from gdpo.model.diffusers_patches import (
    DenseCrossAttention,
    FixedCrossAttention,
    fold_padding,
    fuse_attention,
    fuse_gates,
    fuse_norms,
    fuse_residuals,
    merge_biases,
    transformers_channels_last,
)
from gdpo.model.layers import split_phases


@dataclass(frozen=True)
class Steps:
    """What is done to a generator. None of it: the definition.

    Attributes:
        precision: of weights and features: "fp32", "bf16", or "fp16" throughout (as Stable Diffusion is often run; the
            decoder of a trained model may overflow).
        channels_last: features and filters with the channels innermost, as tensor cores read them.
        folded: timestep and prompt as constants, nearest upsampling inside the convolutions behind it
            (engine.export.graphs), and so the encoder's padding.
        attention: queries, keys and values of self-attention from one product; heads too wide for a fused kernel as
            product, softmax, product.
        norms: group normalisation and the SiLU behind it as one kernel, so a feed-forward block's gate, and a
            residual block's last sum with its biases (gdpo.kernels.group_norm, geglu, residual_sum).
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
            if type(module) is FixedCrossAttention:
                module.__class__ = DenseCrossAttention
        fold_padding(generator.codec)
        for part in (generator.unet, generator.codec):
            merge_biases(part)
            if steps.precision != "fp32" and next(generator.parameters()).device.type == "cpu":
                split_phases(part)
    elif steps != DEFINITION:
        generator.merge_lora()
    for part in (generator.unet, generator.codec):
        if steps.attention:
            fuse_attention(part)
        nn.Module.to(part, graphs.DTYPES[steps.precision])
        if steps.norms:
            fuse_norms(part)
            fuse_residuals(part)
            fuse_gates(part)
    module = graphs.Whole(generator, steps.precision) if steps.folded else Plain(generator, steps.precision)
    if steps.channels_last:
        to_channels_last(module)
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


def to_channels_last(module: nn.Module) -> None:
    """Filters with the channels innermost; features follow them, and stay so behind diffusers' transformers."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    transformers_channels_last(module)
