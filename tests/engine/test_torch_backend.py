"""The torch backend made fast: every step alone and all together against the definition; recorded graphs."""

import contextlib

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from engine import Upscaler
from engine.export import torch_backend as backend
from engine.export.optimise import DEFINITION, Steps, fastest
from gdpo.generator import OneStepGenerator
from gdpo.model.diffusers_patches import FusedGroupNorm, fuse_norms
from tests.support.fused import relative_error

CPU = torch.device("cpu")
EVERY = Steps("fp32", channels_last=True, folded=True, attention=True, norms=True)
ALONE = [
    DEFINITION,
    Steps(channels_last=True),
    Steps(folded=True),
    Steps(attention=True),
    Steps(norms=True),
    EVERY,
]


def session(folder, steps):
    """A model whose biases and scales are not the neutral ones that diffusers starts with."""
    generator = OneStepGenerator.from_pretrained(folder)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in generator.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=random))
    return backend.from_generator(generator, steps=steps)[1]


def inputs(up, batch=2, side=64, seed=0):
    random = torch.Generator().manual_seed(seed)
    geometry = up.manifest.geometry
    latent = side // geometry.factor
    image = torch.rand(batch, 3, side, side + geometry.multiple, generator=random) * 2 - 1
    width = latent + geometry.multiple // geometry.factor
    return image, torch.randn(batch, geometry.channels, latent, width, generator=random)


@pytest.fixture(scope="module")
def reference(mini_model):
    made = session(mini_model, DEFINITION)
    given = inputs(made)
    return given, made.run(*given).double()


@pytest.mark.parametrize("steps", ALONE, ids=str)
def test_every_step_changes_rounding_alone(mini_model, reference, steps):
    given, expected = reference
    assert expected.std() > 0.05 and (expected.abs() == 1).double().mean() < 0.2  # not hidden by the clamp
    assert relative_error(session(mini_model, steps).run(*given), expected) < 2e-5


@pytest.mark.parametrize("precision, limit", [("bf16", 0.04), ("fp16", 0.005)])
def test_half_precision_is_as_near_as_it_can_be(mini_model, reference, precision, limit):
    given, expected = reference
    plain = relative_error(session(mini_model, Steps(precision)).run(*given), expected)
    every = relative_error(session(mini_model, Steps(precision, True, True, True, True)).run(*given), expected)
    assert plain < limit and every < 1.2 * plain


def test_no_norm_activation_or_projection_is_left_apart(mini_model):
    made = session(mini_model, EVERY)
    modules = list(made.module.modules())
    assert not any(isinstance(m, torch.nn.GroupNorm) for m in modules)
    with_silu = [m.silu for m in modules if isinstance(m, FusedGroupNorm)]
    plain = list(OneStepGenerator.from_pretrained(mini_model).modules())
    blocks = sum(type(m).__name__ == "ResnetBlock2D" for m in plain)
    assert sum(with_silu) == 2 * blocks + 3  # and the last norms of UNet, encoder and decoder
    assert len(with_silu) == sum(isinstance(m, torch.nn.GroupNorm) for m in plain)
    attention = [m for m in modules if isinstance(m, Attention)]
    assert attention and all(isinstance(m.to_k, torch.nn.Identity) for m in attention)


def test_no_pixel_is_repeated_padded_or_divided_by_1(mini_model):
    made = session(mini_model, EVERY)
    given = inputs(made)
    with StandIn() as seen:
        made.run(*given)
    names = [str(function) for function, *_ in seen.calls]
    assert any(name.startswith("aten.conv") for name in names)
    assert not [name for name in names if name.startswith(("aten.upsample", "aten.constant_pad", "aten.pad"))]
    divisors = [args[1] for function, args, *_ in seen.calls if str(function).startswith("aten.div")]
    assert divisors and 1 not in divisors  # latents are divided by their scale


def test_features_stay_channels_last(mini_model):
    made = session(mini_model, EVERY)
    seen = []

    def look(module, args):
        x = args[0]
        if x.shape[1] > 4:  # the network's own inputs are small and come as they are
            seen.append(x.is_contiguous(memory_format=torch.channels_last))

    for module in made.module.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(look)
    made.run(*inputs(made))
    assert len(seen) > 50 and all(seen)


def test_the_fused_kernel_in_the_model(mini_model, reference, monkeypatch):
    """The interpreter takes a millisecond a program, so on the UNet's lowest blocks only."""
    import gdpo.model.diffusers_patches

    def on_triton(x, *args, **options):
        calls.append(x.shape)
        return fused(x, *args, backend="triton" if x[0, 0].numel() <= 8 and not calls[9:] else "torch", **options)

    given, expected = reference
    made, calls, fused = session(mini_model, EVERY), [], gdpo.model.diffusers_patches.group_norm
    monkeypatch.setattr(gdpo.model.diffusers_patches, "group_norm", on_triton)
    assert relative_error(made.run(*given), expected) < 2e-5
    assert calls


def test_a_lost_activation_is_seen(mini_model, reference):
    given, expected = reference
    made = session(mini_model, EVERY)
    next(m for m in made.module.modules() if isinstance(m, FusedGroupNorm) and m.silu).silu = False
    assert relative_error(made.run(*given), expected) > 1e-3


def test_other_blocks_are_left_alone():
    from diffusers.models.resnet import ResnetBlock2D

    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=8, temb_channels=6, groups=2, time_embedding_norm="scale_shift").eval()
    x, time = torch.randn(1, 8, 5, 5), torch.randn(1, 6)
    with torch.no_grad():
        expected = block(x, time)
        fuse_norms(block)
        assert relative_error(block(x, time), expected.double()) < 1e-6
    assert isinstance(block.norm2, FusedGroupNorm) and not block.norm2.silu


def test_a_large_batch_goes_in_pieces(mini_model, monkeypatch):
    made = session(mini_model, EVERY)
    image, noise = inputs(made, batch=5)
    whole = made.run(image, noise)
    sizes, module = [], made.module
    made.module = lambda image, noise: sizes.append(len(image)) or module(image, noise)
    monkeypatch.setattr(backend, "INDEXABLE", 2 * 256 * image.shape[2] * image.shape[3])
    assert relative_error(made.run(image, noise), whole.double()) < 2e-5
    assert sizes == [2, 2, 1]


class StandIn(TorchDispatchMode):
    """A CUDA graph on the CPU: remembers the operations of a capture; a replay does them again into the same memory."""

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        self.replays += 1
        for function, args, kwargs, result in self.calls:
            for old, new in zip(tree_flatten(result)[0], tree_flatten(function(*args, **kwargs))[0]):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were recorded."""
    made = []

    @contextlib.contextmanager
    def capture(graph, pool, capture_error_mode):
        cudnn = torch.backends.cudnn
        assert cudnn.benchmark and cudnn.benchmark_limit == 0 and capture_error_mode == "thread_local"
        with graph:
            yield
        made.append(graph)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return made


def recording(folder):
    made = session(folder, EVERY)
    made.steps = Steps("fp32", True, True, True, True, graphs=True)
    return made


def test_a_shape_that_comes_again_is_recorded(tiny_model, graphs):
    made, plain = recording(tiny_model), session(tiny_model, EVERY)
    limit = torch.backends.cudnn.benchmark_limit
    for count in range(5):
        given = inputs(made, seed=count)
        assert relative_error(made.run(*given), plain.run(*given).double()) < 1e-6
        assert len(graphs) == (count > 0) and (not graphs or graphs[0].replays == count)
    assert not torch.backends.cudnn.benchmark and torch.backends.cudnn.benchmark_limit == limit


def test_recorded_shapes_are_bounded_and_the_usual_one_stays(tiny_model, graphs):
    made = recording(tiny_model)
    for side in (64, 64, 80, 96, 112, 64, 128, 144, 64):
        made.run(*inputs(made, batch=1, side=side))
        assert len(made._shapes) <= backend.KEPT_SHAPES
    assert len(graphs) == 1 and graphs[0].replays == 3  # the others came once
    made.forget()
    assert not made._shapes


@pytest.mark.parametrize("steps, recordable", [(DEFINITION, False), (EVERY, True)])
def test_nothing_is_copied_to_the_device_or_waited_for(mini_model, steps, recordable):
    """What a CUDA graph cannot record: values that come from the host (lift_fresh) or go there."""
    made = session(mini_model, steps)
    given = inputs(made)
    with StandIn() as seen:
        made.run(*given)
    names = {str(function) for function, *_ in seen.calls}
    host = ("aten.lift_fresh", "aten._local_scalar_dense", "aten.nonzero", "aten.item")
    assert recordable != any(name.startswith(host) for name in names)


def test_graphs_need_a_gpu(tiny_model):
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        session(tiny_model, Steps(graphs=True))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="device cuda: torch sees 0 NVIDIA"):
            Upscaler.load(tiny_model, "torch", "cuda", precision="bf16")
    with pytest.raises(ValueError, match="device must be cpu, cuda or cuda:N for torch; got 'tpu'"):
        Upscaler.load(tiny_model, "torch", "tpu")
    with pytest.raises(ValueError, match="precision must be one of fp32, fp16, bf16; got 'int8'"):
        session(tiny_model, Steps("int8"))
    assert not fastest(CPU).graphs and fastest(torch.device("cuda")).graphs


@pytest.mark.parametrize("bf16, limit", [(False, 1), (True, 8)])
@pytest.mark.parametrize("name, tile", [("mini", 16), ("tiny", None)])
def test_the_picture_is_onnx_runtimes(name, tile, bf16, limit, photo, request):
    """In tiles, with the same noise and colours."""
    model, engine = (request.getfixturevalue(f"{name}_{kind}") for kind in ("model", "engine"))
    rgb = np.ascontiguousarray(photo[100:140, 200:230])
    up = Upscaler.load(model, "torch", "cpu", precision="bf16" if bf16 else "fp32")
    assert up.manifest.precision == ("bf16" if bf16 else "fp32")
    ours = up.upscale(rgb, seed=5, tile=tile).astype(int)
    theirs, other = (Upscaler.load(engine).upscale(rgb, seed=seed, tile=tile) for seed in (5, 6))
    assert np.abs(ours - theirs).max() <= limit < np.abs(ours - other).max()


@pytest.mark.parametrize("model", ["tiny_model", pytest.param("mini_model", marks=pytest.mark.slow)])
def test_compiled_to_one_graph(model, request):
    plain, made = (session(request.getfixturevalue(model), steps) for steps in (DEFINITION, EVERY))
    given = inputs(plain)
    made.module.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    assert relative_error(made.run(*given), plain.run(*given).double()) < 2e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's compiler
def test_compiled_for_this_machine(tiny_model):
    made = session(tiny_model, Steps(channels_last=True, folded=True, compiled=True))
    given = inputs(made)
    assert relative_error(made.run(*given), session(tiny_model, DEFINITION).run(*given).double()) < 2e-5


def test_compiled_once_for_pictures_of_any_size(mini_model, photo, monkeypatch):
    shapes = []

    def compiled(module, dynamic):
        module.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))

    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    up = Upscaler.load(mini_model, "torch", "cpu", compiled=True)
    for height, width in ((20, 30), (150, 129)):
        assert up.upscale(np.ascontiguousarray(photo[:height, :width])).shape == (4 * height, 4 * width, 3)
    assert set(shapes) == {(1, 3, 512, 512)} and len(shapes) == 1 + 4
    rgb = np.ascontiguousarray(photo[:128, :128])  # one tile of 512 either way
    plain = Upscaler.load(mini_model, "torch", "cpu").upscale(rgb, seed=5)
    assert np.abs(up.upscale(rgb, seed=5).astype(int) - plain).max() <= 1


def test_compiling_is_refused_where_it_cannot_be_done(mini_model, tiny_engine, monkeypatch):
    needs = r"compiled \(--compile\) needs backend torch and a generator's folder as model; got backend auto"
    with pytest.raises(ValueError, match=needs):
        Upscaler.load(tiny_engine, compiled=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler, and no-such-compiler is not here; install g"):
        Upscaler.load(mini_model, "torch", "cpu", compiled=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mini_model", "tiny_model"])
def test_on_a_gpu(name, request):
    folder = request.getfixturevalue(name)
    plain = backend.open_generator(folder, "cuda")[1]
    fast = backend.open_generator(folder, "cuda", precision="bf16")[1]
    assert fast.steps == fastest(torch.device("cuda"))
    for count in range(4):
        image, noise = inputs(plain, batch=3, seed=count)
        given = {"image": image.numpy(), "noise": noise.numpy()}
        expected = torch.from_numpy(plain(given)).double()
        assert relative_error(torch.from_numpy(fast(given)), expected) < 0.05
    assert all(fast._shapes.values())
