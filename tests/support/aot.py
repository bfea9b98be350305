"""Compile the kernels as the public functions launch them, for GPUs that need not be there, and report what came out.

    python -m tests.support.aot 80 90 100        one JSON line a kernel, variant and target
    python -m tests.support.aot 80 few           of the real models' normalisations the widest alone

The launches are recorded on meta tensors, so grids, tile sizes and what Triton specialises on (alignment, ones) are
those of real calls, at sizes that fit no memory here.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported: its decorators look

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gdpo.kernels import complexity, gate, loss, norm, reward, statistics

TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32",
    torch.int8: "*i8", torch.uint8: "*u8",
}  # fmt: skip


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, name: str, kernel: Any, launches: list[dict[str, Any]]):
        self.name, self.kernel, self.launches = name, kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **named: Any) -> None:
            constants = [p.name for p in self.kernel.params if p.is_constexpr]
            options = {name: named.pop(name) for name in named.keys() - constants}
            values = dict(zip(self.kernel.arg_names, args)) | named
            self.launches.append(
                {"name": self.name, "kernel": self.kernel, "values": values, "constants": constants, "options": options}
            )

        return launch


def record(
    call: Callable[[], object], modules=(complexity, gate, loss, norm, reward, statistics)
) -> list[dict[str, Any]]:
    """What `call` launches, without launching it."""
    launches: list[dict[str, Any]] = []
    kernels = [(m, n, k) for m in modules for n, k in vars(m).items() if n.endswith("_kernel")]
    try:
        for module, name, kernel in kernels:
            setattr(module, name, Recorder(name, kernel, launches))
        call()
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)
    return launches


def specialisation(launch: dict[str, Any]) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """Signature, constants and attributes, as the JIT would choose them for a recorded launch."""
    names = launch["kernel"].arg_names
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(names):
        value = launch["values"][name]
        if name in launch["constants"] or (isinstance(value, int) and value == 1):
            signature[name], constants[(position,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:  # allocations are aligned
                attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_launch(launch: dict[str, Any], capability: int) -> tuple[Any, str]:
    """Compile one recorded launch, whatever is in Triton's cache: the kernel, and what the assembler said of it."""
    signature, constants, attributes = specialisation(launch)
    source = ASTSource(fn=launch["kernel"], signature=signature, constexprs=constants, attrs=attributes)
    knobs, said = triton.knobs, io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch["options"])
    return compiled, said.getvalue()


def figures(compiled: Any, log: str) -> dict[str, int]:
    """Registers, spilled bytes, shared memory and 128-bit global accesses of a compiled kernel."""
    ptx = compiled.asm["ptx"]

    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        if found is None:
            raise RuntimeError(f"ptxas did not say {pattern!r}: {log[:500]}")
        return int(found.group(1))

    return {
        "cubin_bytes": len(compiled.asm["cubin"]),
        "registers": number(r"Used (\d+) registers"),
        "spilled_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "shared_bytes": compiled.metadata.shared,
        "loads": len(re.findall(r"ld\.global", ptx)),
        "loads_128bit": len(re.findall(r"ld\.global\S*\.v4\.[bfu]32|ld\.global\S*\.v2\.[bfu]64", ptx)),
        "stores_128bit": len(re.findall(r"st\.global\S*\.v4\.[bfu]32|st\.global\S*\.v2\.[bfu]64", ptx)),
    }


def _new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _loss(b: int, g: int, side: int, dtype: torch.dtype, weighted: bool, channels: int = 4) -> None:
    pred, noise, ref = (_new(b, g, channels, side, side, dtype=dtype) for _ in range(3))
    weight = _new(b, side, side) if weighted else None
    _, margin, scale = loss._forward(pred, noise, ref, _new(b, g), weight, 5000.0)
    loss._backward(pred, noise, weight, margin, scale, _new(), _new(b) if weighted else None)


def _statistics(b: int, g: int, side: int, dtype: torch.dtype) -> None:
    mask = _new(b, side, side, dtype=torch.bool)
    statistics._launch(_new(b, g, 3, side, side, dtype=dtype), _new(b, 3, side, side, dtype=dtype), mask)


def _norm(
    n: int,
    channels: int,
    side: int,
    dtype: torch.dtype,
    silu: bool,
    groups: int = 32,
    shifted: bool = False,
    backward: bool = False,
    part_of_a_sum: bool = False,
) -> None:
    x = torch.empty(n, side, side, channels, dtype=dtype, device="meta").movedim(-1, 1)
    weight, bias, shift = (_new(channels, dtype=dtype) for _ in range(3))
    how = groups, weight, bias, 1e-5, silu, shift if shifted else None
    out, coefficient = norm._launch(x, *how)
    if backward:
        norm._launch(x, *how, grad=out, coefficient=coefficient)
    elif part_of_a_sum:
        norm._statistics(x, out, _new(channels))


def _geglu(n: int, channels: int, tokens: int, dtype: torch.dtype) -> None:
    x = _new(n, tokens, 2 * channels, dtype=dtype)
    gate._launch(x)
    gate._launch(x, _new(n, tokens, channels, dtype=dtype))


# (channels, side, SiLU behind it) of every GroupNorm of Stable Diffusion 2.1-base at 512 pixels, 32 groups each; the
# autoencoder's last one but one works on 4096 tokens.
NORMS = {
    "unet": (
        *((c, side, True) for side, widths in ((64, (320, 640, 960)), (32, (320, 640, 960, 1280, 1920)),
                                               (16, (640, 1280, 1920, 2560)), (8, (1280, 2560))) for c in widths),
        *((c, side, False) for c, side in ((320, 64), (640, 32), (1280, 16), (1280, 8))),
    ),
    "vae": (
        *((c, side, True) for c, sides in ((128, (256, 512)), (256, (128, 256, 512)), (512, (64, 128, 256)))
          for side in sides),
        (512, 64, False),
    ),
}  # fmt: skip


def real_norms() -> dict[str, set[tuple[int, int, bool]]]:
    """The same, looked up in the networks themselves, without weights."""
    from torch import nn

    from gdpo.model import random_folder

    shape = random_folder.architecture("sd21")
    found: dict[str, set[tuple[int, int, bool]]] = {"unet": set(), "vae": set()}
    with torch.device("meta"), torch.no_grad():
        unet, vae = random_folder._unet(shape["unet"]), random_folder._vae(shape["vae"])
        for part, model in (("unet", unet), ("vae", vae)):
            for name, module in model.named_modules():
                if isinstance(module, nn.GroupNorm):
                    silu = name.rpartition(".")[2] in ("norm1", "norm2", "conv_norm_out")

                    def seen(m: Any, x: Any, y: Any, part: str = part, silu: bool = silu) -> None:
                        found[part].add((x[0].shape[1], math.isqrt(x[0][0, 0].numel()), silu))

                    module.register_forward_hook(seen)
        unet(_new(1, 4, 64, 64), _new(1), encoder_hidden_states=_new(1, 77, 1024))
        vae.decode(vae.encode(_new(1, 3, 512, 512)).latent_dist.mode())
    return found


# Not compiled but for the H100: what differs from the rest in a count or a type.
ONLY_H100 = (
    "odd",
    "unet float32",
    "unet float16",
    "vae float16",
    "one",
    "map",
    "training float16",
    "training bfloat16",
    "large bfloat16",
)


def _chosen(kernel: str, variant: str, capability: int) -> bool:
    """Everything for the H100, less elsewhere; nor, anywhere, the reductions for each type."""
    if "reduce" in kernel and "float16" in variant:
        return False
    return capability == 90 or not variant.startswith(ONLY_H100)


def cases(few: bool = False) -> Iterator[tuple[str, Callable[[], object]]]:
    """(variant, call): the sizes of training, the large ones, odd ones, and every type. With `few`, of the real models'
    normalisations, of which hardly two are one kernel, those alone that need most: the widest at each side, in a group.
    """
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        yield f"training {name}", lambda dtype=dtype: _loss(1, 6, 64, dtype, False)
        yield f"large {name}", lambda dtype=dtype: _loss(16, 16, 128, dtype, False)
        yield f"training {name}", lambda dtype=dtype: _statistics(1, 6, 512, dtype)
        yield f"large {name}", lambda dtype=dtype: _statistics(16, 16, 1024, dtype)
        yield f"vae {name}", lambda dtype=dtype: _norm(8, 128, 512, dtype, True)
        yield f"unet {name}", lambda dtype=dtype: _norm(1, 320, 64, dtype, True, backward=True)
        yield f"large {name}", lambda dtype=dtype: _geglu(6, 1280, 4096, dtype)
    for n, channels, tokens in itertools.product((1, 6), (1280, 2560, 5120), (64, 4096)):
        yield "real geglu", functools.partial(_geglu, n, channels, tokens, torch.bfloat16)
    yield "unet large", lambda: _norm(1, 2560, 16, torch.bfloat16, True)
    yield "unet small", lambda: _norm(1, 1280, 8, torch.bfloat16, False)
    for part, norms in NORMS.items():
        if few:
            norms = list({side: (channels, side, silu) for channels, side, silu in sorted(norms)}.values())
        for images, shifted in ((1, False), (1, True), (6, False))[2 * few :]:  # inference; a group in training
            for channels, side, silu in norms:
                learning = images == 6 and part == "unet"
                call = functools.partial(
                    _norm,
                    images,
                    channels,
                    side,
                    torch.bfloat16,
                    silu,
                    shifted=shifted,
                    backward=learning,
                    part_of_a_sum=True,
                )
                if silu or not shifted:  # the bias of a convolution goes into the normalisation behind it
                    yield f"real {part} {images}x{channels}x{side}", call
    yield "weighted float32", lambda: _loss(16, 16, 128, torch.float32, True)
    yield "odd float32", lambda: _loss(3, 2, 7, torch.float32, True, channels=1)
    yield "odd float32", lambda: _statistics(1, 1, 37, torch.float32)
    for weighted in (False, True):  # a 1 is no number to Triton but a constant, which has no .to()
        yield "one element", lambda weighted=weighted: _loss(1, 2, 1, torch.float32, weighted, channels=1)
    yield "one element", lambda: _statistics(1, 1, 1, torch.float32)
    yield "one element", lambda: _norm(1, 1, 1, torch.float32, True, groups=1, backward=True)
    yield "one element", lambda: _geglu(1, 1, 1, torch.float32)
    yield "one channel", lambda: _norm(1, 1, 512, torch.float32, True, groups=1, backward=True)
    yield "one channel", lambda: _norm(2, 48, 200, torch.float32, True, groups=48, backward=True)
    for patch in (10, 64):
        yield f"patch {patch}", lambda patch=patch: complexity._launch(_new(1, 512, 512), patch, 50.0)
    yield "map", lambda: complexity._launch(_new(1, 512, 512), 10, None)
    yield "one pixel", lambda: complexity._launch(_new(1, 1, 1), 10, 50.0)
    yield "one metric", lambda: reward._launch(_new(1, 2, 1), _new(1, 2, 1), _new(1), _new(1), _new(1), _new(1))
    yield "paper", lambda: reward._launch(_new(1, 6, 1), _new(1, 6, 2), _new(1), _new(1))
    yield "large", lambda: reward._launch(_new(16, 16, 3), _new(16, 16, 0), _new(16), _new(16), _new(3))


def main() -> None:
    words = sys.argv[1:]
    targets = [int(word) for word in words if word != "few"] or [80, 90, 100]
    compiled: dict[str, dict[str, int]] = {}  # many shapes of a model are one kernel
    for variant, call in cases("few" in words):
        for launch, capability in itertools.product(record(call), targets):
            if not _chosen(launch["name"], variant, capability):
                continue
            same = repr((launch["name"], capability, launch["options"], *specialisation(launch)))
            if same not in compiled:
                compiled[same] = figures(*compile_launch(launch, capability))
            row = {"kernel": launch["name"], "variant": variant, "capability": capability}
            print(json.dumps(row | compiled[same]), flush=True)


if __name__ == "__main__":
    main()
