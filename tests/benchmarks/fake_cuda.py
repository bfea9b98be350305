"""Run the CUDA paths on tensors without data, where there is no GPU, and report what a GPU would stumble over.

    g++ -std=c++20 -shared -fPIC tests/benchmarks/fake_cuda.cpp -I$TORCH/include -L$TORCH/lib -ltorch_cpu -lc10 \
        -Wl,-rpath,$TORCH/lib -o fake_cuda.so                   TORCH: the folder of that package, one without CUDA
    python -m gdpo.model.random_folder FOLDER
    LD_PRELOAD=./fake_cuda.so python -m tests.benchmarks.fake_cuda FOLDER
    LD_PRELOAD=./fake_cuda.so python -m tests.benchmarks.fake_cuda FOLDER ours checkpointing 512 6 sd21

Tensors have shapes, types, strides and devices: what mixes devices fails here as there. Kernels are recorded in place
of their launch. As JSON beside: products and convolutions of mixed types, and where the host waits for the GPU.
The second form counts a step: its peak in MiB, its kernels and the bytes that they read and write. `ours` or
`released`, a variant of benchmarks/gdpo_step.py, the side of the crop, G, and the architecture if not the folder's.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import json
import math
import sys
import traceback
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
aten = torch.ops.aten
TYPED = ("mm", "addmm", "bmm", "convolution", "conv2d", "linear", "matmul", "native_group_norm", "native_layer_norm")
FREE = {"detach", "alias", "_unsafe_view", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty",
        "new_empty_strided", "record_stream", "set_", "resize_"}  # no kernel; nor has a view one  # fmt: skip


class Watch(TorchDispatchMode):
    """Goes beside every operation; `capturing` is what a CUDA graph would be recorded of."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: dict[str, int] = collections.Counter()
        self.mixed: set[str] = set()
        self.captured: set[str] = set()
        self.capturing = False
        self.live = self.peak = 0  # bytes
        self.storages: dict[int, weakref.ref] = {}
        self.ops: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])  # name -> [number, bytes]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:
            return function(*args)
        kwargs, name = kwargs or {}, function.name().removeprefix("aten::").partition(".")[0]
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_gpu = [t for t in tensors if t.device.type == "cuda"]
        kinds = {t.dtype for t in on_gpu if t.is_floating_point()}
        if name in TYPED and len(kinds) > 1:
            self.mixed.add(f"{name}: {sorted(map(str, kinds))} at {_place()}")
        if name == "_local_scalar_dense":
            if on_gpu:
                self._wait()
            return True if tensors[0].dtype == torch.bool else 0.5 if tensors[0].is_floating_point() else 1
        if name in ("_to_copy", "copy_"):
            ends = {t.device.type for t in tensors} | {torch.device(kwargs.get("device") or tensors[0].device).type}
            if ends == {"cpu", "cuda"} and not kwargs.get("non_blocking"):
                self._wait()
            for t in tensors:
                t.constant = None  # or it would be computed with, on a GPU
        result = function(*args, **kwargs)
        if not (function.is_view or name in FREE):
            made = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
            self.did(name, [*tensors, *(t.detach() for t in made if any(t is own for own in tensors)), *made])
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.device.type == "cuda":
                self._count(t.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def did(self, name: str, tensors: list[torch.Tensor]) -> None:
        """Count a kernel by the distinct elements of the tensors that it reads and writes."""
        own = {id(t): t for t in tensors if t.device.type == "cuda"}.values()
        if own:
            self.ops[name][0] += 1
            self.ops[name][1] += sum(_distinct(t) * t.element_size() for t in own)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512  # as torch's allocator rounds

        def gone(_: object) -> None:
            if self.storages.pop(key, None) is not None:
                self.live -= size

        if key not in self.storages:
            self.storages[key] = weakref.ref(storage, gone)
            self.live += size

    def _wait(self) -> None:
        self.waits[_place()] += 1
        if self.capturing:
            self.captured.add(_place())


def _distinct(t: torch.Tensor) -> int:
    """Elements of a tensor; an expanded dimension holds one."""
    return math.prod(n for n, stride in zip(t.shape, t.stride()) if stride)


def _place() -> str:
    """The line of this project's that led here; an environment may lie in its folder."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and not path.is_relative_to(sys.prefix) and path != Path(__file__):
            return f"{path.relative_to(ROOT)}:{frame.name}"
    return "?"


def pretend(watch: Watch) -> None:
    """Torch's questions to a GPU, answered for an H100; what conversions of modules cannot do with such tensors."""

    @contextlib.contextmanager
    def graph(*args, **kwargs):
        watch.capturing = True
        yield
        watch.capturing = False

    def nothing() -> Any:  # a new one each time: torch.compile's rules do not take one under two names
        return lambda *args, **kwargs: contextlib.nullcontext()

    answers: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "_lazy_init": nothing(),
        "is_bf16_supported": lambda *args: True, "get_device_capability": lambda *args: (9, 0),
        "device": nothing(), "device_of": nothing(), "stream": nothing(), "Stream": nothing(), "set_device": nothing(),
        "synchronize": nothing(), "empty_cache": nothing(), "graph": graph, "graph_pool_handle": nothing(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    fake_tensor.init_gpu_context = lambda device: None
    for kinds in (_foreach_utils._foreach_supported_types, optimizer._foreach_supported_types):
        kinds.append(fake_tensor.FakeTensor)  # kernels for many tensors at once
    torch._C._set_only_lift_cpu_tensors(True)
    torch.Tensor.pin_memory = lambda self, device=None: self.clone()  # type: ignore[method-assign, assignment]
    dropout = nn.functional.dropout  # without data a copy stands for one that drops nothing

    def dropped(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return dropout(x, p, training, inplace) if training and p else x

    nn.functional.dropout = dropped  # type: ignore[assignment]

    def convert(self, function, recurse=True):
        for child in self.children():
            child._apply(function)
        for name, p in self._parameters.items():
            if p is not None:
                with torch.no_grad():
                    self._parameters[name] = nn.Parameter(function(p), p.requires_grad)
        self._buffers |= {name: b if b is None else function(b) for name, b in self._buffers.items()}
        return self

    nn.Module._apply = convert  # type: ignore[method-assign]


def attention(own: Any, query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **named: Any) -> Any:
    """The kernels that a GPU would take, which keep no scores of all pairs."""
    if query.device.type != "cuda" or attn_mask is not None:
        return own(query, key, value, attn_mask, *rest, **named)
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (t.to(torch.get_autocast_dtype("cuda")) for t in (query, key, value))
    scale = named.get("scale")
    if query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256:
        return aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(query, key, value, None, grad, scale=scale)[0]


class _Launched(dict):
    """Stands in for a Triton kernel: counted, on any grid."""

    def __init__(self, name: str, watch: Watch):
        self.name, self.watch = name, watch

    def __missing__(self, grid: object) -> Any:
        return lambda *args, **named: self.watch.did(self.name, [t for t in args if isinstance(t, torch.Tensor)])


def _silu(watch: Watch, x: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """F.silu, whose backward pass is one kernel on a GPU; without one torch takes it apart."""

    class Silu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return aten.silu(x)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            made = torch.empty_like(grad)
            watch.did("silu_backward", [grad, x, made])
            return made

    return Silu.apply(x)


def count(folder: str, procedure: str, variant: str, crop: str, group: str, architecture: str = "") -> dict[str, Any]:
    """Of the second step, where the optimiser has its state: the peak of all tensors, kernels, bytes that they move."""
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    from benchmarks import gdpo_step, released_procedure  # noqa: F401
    from gdpo.kernels import complexity, gate, loss, norm, reward, statistics
    from gdpo.model import codecs, folders, prompts, random_folder
    from gdpo.photos.dataset import Batch
    from gdpo.train.methods import gdpo as method  # noqa: F401

    def build(kind: Any, where: Any, dtype: torch.dtype | None = None, **more: Any) -> Any:
        made = {
            "UNet2DConditionModel": lambda: random_folder._unet(shape["unet"]),
            "AutoencoderKL": lambda: random_folder._vae(shape["vae"]),
            "CLIPTextModel": lambda: random_folder._text_encoder(shape["text_encoder"], 49408),
        }[kind.__name__]().eval()
        return made if dtype is None else nn.Module.to(made, dtype)

    watch = Watch()
    pretend(watch)
    accelerator = Accelerator(mixed_precision="bf16")
    own = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = functools.partial(attention, own)  # type: ignore[assignment]
    nn.functional.silu = functools.partial(_silu, watch)
    if architecture:
        shape = random_folder.architecture(architecture)
    for module in (codecs, folders, prompts):
        module.load_pretrained = build if architecture else load  # type: ignore[attr-defined]
    for kind in (UNet2DConditionModel, AutoencoderKL, CLIPTextModel):
        kind.from_pretrained = classmethod(build if architecture else load)  # type: ignore[method-assign, assignment]
    for module in (complexity, gate, loss, norm, reward, statistics):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:  # launched on any grid, to no effect
            setattr(module, name, _Launched(name, watch))
    make = gdpo_step._released if procedure == "released" else gdpo_step._ours
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True), watch:
        step = make(folder, accelerator, int(crop), int(group), variant)
        for number in range(2):
            gc.collect()
            watch.peak = watch.live
            watch.ops.clear()
            batch = Batch(["one"], None, [number], torch.rand(1, 3, int(crop), int(crop)).to("cuda"))
            step(batch, number)
    ops = sorted(watch.ops.items(), key=lambda item: -item[1][0])
    return {
        "peak_mib": watch.peak / (1 << 20),
        "kernels": sum(n for _, (n, _) in ops),
        "bytes": sum(b for _, (_, b) in ops),
        "by_op": dict(ops),
    }


def load(kind: Any, folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The model that a folder describes, without its weights."""
    if hasattr(kind, "load_config"):
        return kind.from_config(kind.load_config(str(folder))).eval()
    return kind(kind.config_class.from_pretrained(str(folder))).eval()


def report(folder: str) -> dict[str, Any]:
    """What a GDPO step and inference in miniature do, for tests/benchmarks/test_cuda_devices.py."""
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    from benchmarks import gdpo_step
    from engine.export.torch_backend import from_generator
    from gdpo import generator
    from gdpo.model import codecs, folders, prompts
    from gdpo.model.tiny import TinyUNetConfig
    from gdpo.photos.dataset import Batch
    from gdpo.train import setup
    from gdpo.train.methods import gdpo as _
    from tests.support.aot import record

    watch = Watch()
    pretend(watch)  # behind all imports: libraries look at what torch.cuda has
    for module in (codecs, folders, prompts):
        module.load_pretrained = load  # type: ignore[attr-defined]
    accelerator = Accelerator(mixed_precision="bf16")
    found: dict[str, Any] = {}
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True), watch:
        step = gdpo_step._ours(folder, accelerator, 256, 2, "checkpointing")
        batch = Batch(["one"], None, [0], torch.rand(1, 3, 256, 256).to("cuda"))
        watch.waits.clear()
        launches = record(lambda: step(batch, 0))
        values = [value for launch in launches for value in launch["values"].values()]
        found["waits"] = dict(watch.waits)
        found["kernels"] = sorted({launch["name"] for launch in launches})
        found["places"] = sorted({str(value.device) for value in values if isinstance(value, torch.Tensor)})
        options: dict[str, Any] = {"algorithm": "diffusion_dpo", "reward_weights": [1.0, 2.0]}
        for preset in ("dpo", "tiny"):
            if preset == "tiny":
                setup.starting_generator = lambda *_: generator.OneStepGenerator.tiny(TinyUNetConfig())
            method = gdpo_step._method(folder, accelerator, 64, 3, **options)
            small = batch._replace(hr=torch.rand(1, 3, 64, 64).to("cuda"))
            watch.waits.clear()
            record(lambda method=method, small=small: method.step(small, 0, accelerator.backward))
            found[f"waits, {preset}"] = dict(watch.waits)
        _, session = from_generator(generator.OneStepGenerator.from_pretrained(folder), "cuda:0", precision="bf16")
        inputs = torch.zeros(2, 3, 64, 64, device="cuda"), torch.zeros(2, 4, 8, 8, device="cuda")
        record(lambda: [session.run(*inputs) for _ in range(3)])
        found["graphs"] = sum(recorded is not None for recorded in session._shapes.values())
    return found | {"mixed": sorted(watch.mixed), "captured": sorted(watch.captured)}


if __name__ == "__main__":
    print(json.dumps(report(*sys.argv[1:]) if len(sys.argv) == 2 else count(*sys.argv[1:])))
