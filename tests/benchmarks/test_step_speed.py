"""What makes the step cheaper leaves its results: casts, normalisations, compiled frozen parts."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import gdpo_step
from gdpo.model import lora, lora_layers
from gdpo.model import training_patches as patches
from gdpo.model.diffusers_patches import norms_in_own_precision
from gdpo.train import setup
from gdpo.train.methods import gdpo as method
from gdpo.train.methods.gdpo import GDPO
from gdpo.train.setup import save_trained


@pytest.fixture
def accelerator():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def make(precision: str) -> Accelerator:
        AcceleratorState._reset_state(reset_partial_state=True)
        return Accelerator(cpu=True, mixed_precision=precision)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


def losses(accelerator, folder, variant="plain", steps=3):
    step = gdpo_step._ours(str(folder), accelerator, 64, 2, variant)
    return [step(gdpo_step._batch(64, i, "cpu"), i) for i in range(steps)]


def test_without_the_copies_that_autocast_makes_needless_the_losses_are_the_same_bits(
    mini_sd, accelerator, monkeypatch
):
    monkeypatch.setattr(lora_layers, "_classes", dict)  # peft's forward pass, as DoRA has it
    without = losses(accelerator("bf16"), mini_sd)
    monkeypatch.setattr(lora, "leave_casts_to_autocast", lambda model: None)
    assert without == losses(accelerator("bf16"), mini_sd)
    assert without[0] == pytest.approx(math.log(2), abs=1e-6) and without[1] != without[0]


def saved_bytes(unet, *inputs) -> int:
    """Bytes of distinct tensors, parameters apart, that the backward pass keeps."""
    own, kept = {p.untyped_storage().data_ptr() for p in unet.parameters()}, {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        held = unet(*inputs)  # the graph keeps the storages, so that no address is given out twice
    del held
    return sum(kept.values())


def test_the_backward_pass_keeps_less_and_the_lora_stays_fp32(mini_sd):
    from gdpo.generator import OneStepGenerator

    unet = OneStepGenerator.from_pretrained(mini_sd, dtype=torch.bfloat16).unet
    lora.add(unet, 4, lora.UNET_TARGETS)
    for p in lora.parameters(unet).values():
        p.requires_grad_(True)
    inputs = (torch.randn(2, 4, 16, 16, dtype=torch.bfloat16), 100, torch.randn(2, 77, 32, dtype=torch.bfloat16))
    pefts = copy.deepcopy(unet)
    for layer in lora_layers.layers(pefts):
        layer.__class__ = type(layer).__mro__[1]
    before = saved_bytes(pefts, *inputs)
    assert saved_bytes(unet, *inputs) < 0.85 * before
    lora.leave_casts_to_autocast(pefts)
    assert saved_bytes(pefts, *inputs) < 0.85 * before
    assert {p.dtype for p in lora.parameters(unet).values()} == {torch.float32}
    assert {p.dtype for n, p in unet.named_parameters() if ".lora_" not in n} == {torch.bfloat16}


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: nn.GroupNorm(4, 16), lambda: nn.LayerNorm(16)], ids=["group", "layer"])
def test_normalisations_keep_their_type_under_autocast_and_fp32_statistics(make):
    torch.manual_seed(0)
    norm = nn.Sequential(make()).bfloat16()
    for p in norm.parameters():
        p.data = torch.randn_like(p)
    x = (torch.randn(8, 16) * 3 + 40).bfloat16()  # a large mean: statistics of 8 bits would be far off
    exact = norm.double()(x.double())
    norm.bfloat16()
    expected = norm(x)
    norms_in_own_precision(norm)
    assert type(norm[0]) not in (nn.GroupNorm, nn.LayerNorm) and set(norm.state_dict()) == {"0.weight", "0.bias"}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x), expected) and norm(x.float()).dtype == torch.bfloat16
    assert float((expected.double() - exact).norm() / exact.norm()) < 2**-8


@pytest.mark.parametrize("size", [None, (12, 20)])
def test_upsampling_stays_in_its_own_precision_under_autocast(size, monkeypatch):
    """CUDA's autocast, and not the CPU's, would widen it to fp32."""
    from diffusers.models.upsampling import Upsample2D

    model = nn.Sequential(Upsample2D(8, use_conv=True)).bfloat16()
    x = torch.randn(2, 8, 6, 10, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    expected = model[0](x, size)
    norms_in_own_precision(model)
    seen = []
    interpolate = nn.functional.interpolate

    def watched(*inputs, **named):
        seen.append(torch.is_autocast_enabled("cpu"))
        return interpolate(*inputs, **named)

    monkeypatch.setattr(nn.functional, "interpolate", watched)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model[0](x, size), expected)
    assert seen and not any(seen) and model[0].conv.weight.shape == (8, 8, 3, 3)


def test_only_what_is_compared_with_nothing_is_compiled(mini_sd, accelerator, monkeypatch):
    """A stand-in for the compiler that is wrong by a little: the samples feel it, the loss of step one does not."""
    compiled = []

    def rough(call, dynamic):
        compiled.append(call)
        return lambda *inputs: call(*inputs) * (1 + 1e-3)

    monkeypatch.setattr(torch, "compile", rough)
    step = gdpo_step._ours(str(mini_sd), accelerator("no"), 64, 2, "compile-frozen")
    assert len(compiled) == 3
    assert step(gdpo_step._batch(64, 0, "cpu"), 0) == pytest.approx(math.log(2), abs=2e-3)


@pytest.mark.slow
def test_fused_normalisations_and_gates_give_the_same_training_and_files(mini_sd, accelerator, monkeypatch, tmp_path):
    def taken(fused):
        monkeypatch.setattr(GDPO, "_kernels_are_fused", lambda self: fused)
        results = losses(accelerator("no"), mini_sd)
        return results, made[-1].generator

    made, build = [], GDPO._make_frozen_calls
    monkeypatch.setattr(GDPO, "_make_frozen_calls", lambda self: made.append(self) or build(self))
    (plain, before), (fused, after) = taken(False), taken(True)
    assert fused == pytest.approx(plain, rel=1e-3) and plain[1] != plain[0]
    for part in (after.codec, after.unet):
        assert not any(isinstance(m, nn.GroupNorm) for m in part.modules())
    names = [[(n, tuple(p.shape)) for n, p in generator.named_parameters()] for generator in (before, after)]
    assert names[0] == names[1]
    for generator, name in ((before, "plain"), (after, "fused")):
        save_trained(generator, made[-1].config, tmp_path / name)
    files = [sorted((tmp_path / name).rglob("*.safetensors")) for name in ("plain", "fused")]
    for plain_file, fused_file in zip(*files, strict=True):
        ours, theirs = load_file(fused_file), load_file(plain_file)
        assert ours.keys() == theirs.keys()
        if "lora" not in str(plain_file):
            assert fused_file.read_bytes() == plain_file.read_bytes()


@pytest.mark.slow
def test_without_divisions_by_one_and_with_the_time_computed_once_the_training_is_the_same(
    mini_sd, accelerator, monkeypatch
):
    def taken():
        divisions.clear()
        with Divisions():
            return losses(accelerator("no"), mini_sd), len(divisions), names(made[-1].generator)

    class Divisions(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.div.Tensor and args[0].ndim > 2:
                divisions.append(args[0].shape)
            return function(*args, **(kwargs or {}))

    def names(generator):
        return [[(n, tuple(p.shape)) for n, p in m.named_parameters()] for m in (generator.unet, generator.codec)]

    divisions: list[torch.Size] = []
    made, build = [], GDPO._make_frozen_calls
    monkeypatch.setattr(GDPO, "_make_frozen_calls", lambda self: made.append(self) or build(self))
    cheaper, few, own = taken()
    monkeypatch.setattr(method, "constant_time", lambda *_: None)
    undivided = taken()[0]
    assert undivided == pytest.approx(cheaper, rel=1e-3)  # of one picture, or of a batch of equals: other roundings
    for name in ("skip_divisions", "undivided_attention"):
        monkeypatch.setattr(setup, name, lambda *_: None)
    plain, many, theirs = taken()
    assert plain == undivided and plain[1] != plain[0]
    assert few < many / 2 and own == theirs
    monkeypatch.setattr(method, "constant_time", lambda unet, t: patches.constant_time(unet, t + 50))
    assert taken()[0] != pytest.approx(cheaper, rel=1e-3)  # teeth: another time is another loss


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call", "ignore:::torch", "ignore::DeprecationWarning")
def test_compiled_frozen_parts_give_the_same_training(mini_sd, accelerator):
    plain = losses(accelerator("no"), mini_sd)
    assert losses(accelerator("no"), mini_sd, "compile-frozen") == pytest.approx(plain, rel=5e-3)
