"""Fold what does not change between pictures into constants, and cut a generator into the graphs that are exported.

The timestep is fixed, so is the prompt. Hence the time embedding and its projections become a bias (or a scale and a
bias) of a convolution, and the keys and values of cross-attention become constants: an exported UNet holds no text
encoder, no time-embedding perceptron, no key and value projections of the prompt.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gdpo.generator import OneStepGenerator
from gdpo.model.architectures import architecture_of, works_on_pixels
from gdpo.model.diffusers_patches import fold_constants, fold_upsampling, skip_divisions

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class _Widened(nn.Module):
    """A block whose output is fp32, for what follows."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs) -> torch.Tensor:
        return self.block(*args, **kwargs).float()


@torch.no_grad()
def fold(generator: OneStepGenerator) -> OneStepGenerator:
    """Merge the LoRA and fold timestep, prompt, nearest upsampling and factors of 1 into the weights, in place.

    Raises:
        ValueError: a UNet with an architecture that is not known to fold (class or label conditioning, other
            processors); the message names it.
    """
    generator.merge_lora()
    if works_on_pixels(generator.unet):
        generator.unet.fold(generator.t_diffusion)
        return generator
    fold_constants(generator.unet, generator.t_diffusion, generator.text_embeds)
    for part in (generator.unet, generator.codec):
        fold_upsampling(part)
        skip_divisions(part)
    return generator


def cast(generator: OneStepGenerator, precision: str) -> OneStepGenerator:
    """Convert the weights, in place. In fp16 the up-blocks of a KL decoder stay fp32: their activations overflow."""
    for module in (generator.unet, generator.codec):
        nn.Module.to(module, DTYPES[precision])  # diffusers' own `to` warns about what this does on purpose
    decoder: Any = getattr(generator.vae, "decoder", None)
    if precision == "fp16" and hasattr(decoder, "up_blocks"):
        for part in (decoder.up_blocks, decoder.conv_norm_out, decoder.conv_out):
            part.float()
        decoder.mid_block = _Widened(decoder.mid_block)
    return generator


class Encoder(nn.Module):
    """image [B,3,H,W] in [-1,1] -> latent [B,C,h,w], float32 at both ends whatever is inside."""

    def __init__(self, generator: OneStepGenerator, precision: str):
        super().__init__()
        self.codec, self.dtype = generator.codec, DTYPES[precision]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.codec.encode_in(image, self.dtype)


def step_of(generator: OneStepGenerator, precision: str) -> nn.Module:
    """latent, noise [B,C,h,w] -> x0, float32: the one diffusion step of a folded generator."""
    own = architecture_of(generator.unet).step
    if own is None:
        return Step(generator, precision)
    return own(generator.unet, math.sqrt(generator.a_n), math.sqrt(generator.b_n))


class Step(nn.Module):
    """The step of a generator whose architecture has none of its own."""

    def __init__(self, generator: OneStepGenerator, precision: str):
        super().__init__()
        self.unet, self.dtype = generator.unet, DTYPES[precision]
        self.t = generator.t_diffusion
        self.residual = generator.parametrization == "residual"
        self.signal, self.noise = math.sqrt(generator.a_n), math.sqrt(generator.b_n)
        self.scale, self.shift = 1 / math.sqrt(generator.a_d), math.sqrt(generator.b_d / generator.a_d)

    def forward(self, latent: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        noisy = self.signal * latent + self.noise * noise
        if self.residual:
            return latent + self.unet(torch.cat([noisy, latent], dim=1).to(self.dtype), self.t).sample.float()
        predicted = self.unet(noisy.to(self.dtype), self.t, encoder_hidden_states=None).sample.float()
        return self.scale * noisy - self.shift * predicted


class Decoder(nn.Module):
    """x0 [B,C,h,w] -> output [B,3,H,W], about [-1,1].

    Not clamped: backends' Clip makes -1 or 1 of what is not finite, a black tile where an error is due. The run time
    looks first and clips afterwards.
    """

    def __init__(self, generator: OneStepGenerator, precision: str):
        super().__init__()
        self.codec, self.dtype = generator.codec, DTYPES[precision]

    def forward(self, x0: torch.Tensor) -> torch.Tensor:
        return self.codec.decode_in(x0, self.dtype)


class Whole(nn.Module):
    """image [B,3,H,W], noise [B,C,h,w] -> output [B,3,H,W]."""

    def __init__(self, generator: OneStepGenerator, precision: str):
        super().__init__()
        self.encoder, self.step = Encoder(generator, precision), step_of(generator, precision)
        self.decoder = Decoder(generator, precision)

    def forward(self, image: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.step(self.encoder(image), noise))


class ImageToImage(nn.Module):
    """picture [1,3,h,w] in [0,1] -> [1,3,4h,4w] in [0,1]: resampling, noise and AdaIN inside, for other front ends.

    The picture is mirrored to the size that the model needs. The noise is a constant that repeats beyond its size.
    """

    noise: torch.Tensor
    kernel: torch.Tensor

    def __init__(self, generator: OneStepGenerator, precision: str, noise: torch.Tensor, scale: int = 4):
        super().__init__()
        self.whole, self.scale = Whole(generator, precision), scale
        self.multiple, self.factor = generator.multiple // scale, generator.codec.factor
        self.register_buffer("noise", noise)
        self.register_buffer("kernel", upsampling_kernel(scale))

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        height, width = picture.shape[2:]
        # Rounded up without a negative number: ONNX divides towards zero.
        padded = [(side + self.multiple - 1) // self.multiple * self.multiple for side in (height, width)]
        # Two samples more on every side: the cubic's reach.
        rows, columns = (_mirror(torch.arange(p + 4) - 2, n) for p, n in zip(padded, (height, width)))
        source = picture[:, :, rows][:, :, :, columns]
        phases = F.conv2d(source.flatten(0, 1)[:, None], self.kernel)
        image = F.pixel_shuffle(phases, self.scale)[:, 0][None].clamp(0, 1)
        latent = [p * self.scale // self.factor for p in padded]
        y, x = (torch.arange(n) % size for n, size in zip(latent, self.noise.shape[2:]))
        result = (self.whole(image * 2 - 1, self.noise[:, :, y][:, :, :, x]).clamp(-1, 1) + 1) / 2
        result, image = (t[:, :, : height * self.scale, : width * self.scale] for t in (result, image))
        return (_standardised(result) * _deviation(image) + image.mean((2, 3), keepdim=True)).clamp(0, 1)


def _deviation(x: torch.Tensor) -> torch.Tensor:
    return ((x - x.mean((2, 3), keepdim=True)).square().mean((2, 3), keepdim=True) + 1e-5).sqrt()


def _standardised(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean((2, 3), keepdim=True)) / _deviation(x)


def _mirror(index: torch.Tensor, size: int) -> torch.Tensor:
    period = 2 * torch.ones(size, dtype=torch.int64).sum()  # a tensor: the exporter has no remainder by a symbol
    index = torch.remainder(index, period)
    return torch.minimum(index, period - 1 - index)


def upsampling_kernel(scale: int) -> torch.Tensor:
    """The project's bicubic for a whole factor as one convolution: [scale^2, 1, 5, 5], a phase of the result each."""
    from engine.runtime.resample import taps

    first, weights = taps(16, 16 * scale)
    line = torch.zeros(scale, 5)
    for phase in range(scale):
        start = int(first[8 * scale + phase]) - 8 + 2
        for k, weight in enumerate(weights[8 * scale + phase][: 5 - start]):
            line[phase, start + k] = float(weight)
    return (line[:, None, :, None] * line[None, :, None, :]).reshape(scale * scale, 1, 5, 5)
