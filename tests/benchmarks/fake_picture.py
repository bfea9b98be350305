"""Count what one picture costs at full size, on tensors without data: kernels, the bytes that they move, products.

    LD_PRELOAD=./fake_cuda.so python -m tests.benchmarks.fake_picture [SIDE] [BATCH] [ARCHITECTURE]   (see fake_cuda.py)

The generator is Stable Diffusion 2.1's, made fast for a GPU (engine.export.optimise.fastest). A kernel moves what it
reads and what it writes, each once: caches are not modelled, nor what a library needs for a moment.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from typing import Any

import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.fake_cuda import Watch, _Launched, attention, pretend

aten = torch.ops.aten


class _Picture(Watch):
    """torch adds a convolution's bias on a GPU by a kernel of its own, which reads and writes the result."""

    fake: fake_tensor.FakeTensorMode

    def did(self, name: str, tensors: list[torch.Tensor]) -> None:
        if name != "convolution" or tensors[-2].ndim > 1:
            return super().did(name, tensors)
        *inputs, bias, result = tensors
        super().did(name, [*inputs, result])
        super().did("bias", [bias, result, result.detach()])


def _nearest(watch: Watch, x: torch.Tensor, **how: Any) -> torch.Tensor:
    """F.interpolate as a GPU does it; without data torch takes it apart."""
    with torch.utils._python_dispatch._disable_current_modes(), watch.fake:
        out = torch.empty(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3], dtype=x.dtype, device=x.device)
        out = out.contiguous(memory_format=torch.channels_last)
    watch.did("upsample_nearest2d", [x, out])
    return out


def _product(a: torch.Size, b: torch.Size, *rest: Any, out_shape: Any = None, **named: Any) -> int:
    return 2 * math.prod(a) * b[-1]  # torch's own does not know `out_dtype`


def count(side: int = 512, batch: int = 1, architecture: str = "sd21") -> dict[str, Any]:
    """Kernels, bytes, FLOP of a batch of pictures of this side, and each by operation."""
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401 (libraries look at what torch.cuda has)

    from engine.export.torch_backend import from_generator
    from gdpo.generator import OneStepGenerator
    from gdpo.kernels import gate, norm
    from gdpo.model import random_folder
    from gdpo.model.codecs import KLCodec

    watch = _Picture()
    pretend(watch)
    own = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = functools.partial(attention, own)  # type: ignore[assignment]
    for module in (gate, norm):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, _Launched(name, watch))
    nn.functional.interpolate = functools.partial(_nearest, watch)  # type: ignore[assignment]
    shape = random_folder.architecture(architecture)
    watch.fake = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    with watch.fake, watch:
        codec = KLCodec(random_folder._vae(shape["vae"]))
        embeds = torch.zeros(1, 77, shape["unet"]["cross_attention_dim"])
        generator = OneStepGenerator(random_folder._unet(shape["unet"]), codec, prompt_embeds=embeds)
        _, session = from_generator(generator, "cuda:0", precision="bf16")
        latent = side // codec.factor
        inputs = [torch.zeros(batch, c, s, s, device="cuda") for c, s in ((3, side), (codec.channels, latent))]
        watch.ops.clear()
        with FlopCounterMode(display=False, custom_mapping={aten.bmm: _product}) as flop:
            session.run(*inputs)
    ops = dict(sorted(watch.ops.items(), key=lambda item: -item[1][1]))
    return {
        "side": side,
        "batch": batch,
        "model": architecture,
        "kernels": sum(n for n, _ in ops.values()),
        "bytes": sum(b for _, b in ops.values()),
        "flop": flop.get_total_flops(),
        "by_op": ops,
    }


if __name__ == "__main__":
    arguments = sys.argv[1:]
    print(json.dumps(count(*map(int, arguments[:2]), *arguments[2:])))
