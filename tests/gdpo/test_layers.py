"""Layers in another form: the same as the plain ones in fp64, no worse in bf16, and a planted fault is seen."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gdpo.generator import OneStepGenerator
from gdpo.model import diffusers_patches as patches
from gdpo.model import layers, lora
from tests.support.fused import assert_as_good, relative_error

EXACT = 1e-14  # of values about 1, in fp64


@pytest.fixture(autouse=True)
def seed():
    with torch.no_grad():
        torch.manual_seed(0)
        yield


def upsampled(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


FORMS = {"transposed": layers.subpixel, "four phases": lambda conv: layers.Phases(layers.subpixel(conv))}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("height, width", [(1, 1), (1, 4), (5, 7), (8, 8)])  # all border, and more
def test_upsampling_inside_the_convolution(form, height, width):
    conv, x = nn.Conv2d(6, 5, 3, padding=1).double(), torch.randn(2, 6, height, width).double()
    found = FORMS[form](conv)(x)
    assert found.shape == (2, 5, 2 * height, 2 * width)
    assert (found - upsampled(conv, x)).abs().max() < EXACT


def test_another_transposed_convolution_is_not_split():
    module = nn.Sequential(nn.ConvTranspose2d(3, 3, 4, 2, bias=False), layers.subpixel(nn.Conv2d(3, 3, 3, padding=1)))
    layers.split_phases(module)
    assert isinstance(module[0], nn.ConvTranspose2d) and isinstance(module[1], layers.Phases)


@pytest.mark.parametrize("row", range(4))
def test_a_wrong_entry_of_the_kernel_is_seen(row):
    conv, x = nn.Conv2d(6, 5, 3, padding=1).double(), torch.randn(2, 6, 5, 7).double()
    made = layers.subpixel(conv)
    made.weight[0, 0, row, 3] += 1e-6
    assert EXACT < (made(x) - upsampled(conv, x)).abs().max() < 1e-4


def test_in_bf16_it_is_as_near_to_fp64():
    conv, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 16, 16)
    exact = upsampled(copy.deepcopy(conv).double(), x.double())
    transposed = layers.subpixel(copy.deepcopy(conv)).bfloat16()
    phases, plain, x = layers.Phases(transposed), conv.bfloat16(), x.bfloat16()
    assert relative_error(phases(x), exact) < 1.05 * relative_error(upsampled(plain, x), exact)
    # The weights' roundings alone: torch's CPU may add rounded products in a transposed convolution of bf16.
    allowed = 1.05 * relative_error(upsampled(plain.double(), x.double()), exact)
    assert relative_error(transposed.double()(x.double()), exact) < allowed


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("side", [2, 10])
def test_padding_behind_inside_the_convolution(side, order):
    conv = nn.Conv2d(6, 5, 3, stride=2).double()
    x = torch.randn(2, 6, side, side + 2).double().contiguous(memory_format=order)
    expected = conv(F.pad(x, (0, 1, 0, 1)))
    conv.__class__ = layers.PaddedBehind
    assert (conv(x) - expected).abs().max() < EXACT and conv(x).is_contiguous(memory_format=order)


def attention_inputs(dtype=torch.float64):
    query, key, value = torch.randn(3, 2, 1, 50, 320).to(dtype).unbind()
    return query * 320**-0.5, key, value


def test_attention_by_products_is_attention(monkeypatch):
    inputs = attention_inputs()
    expected = F.scaled_dot_product_attention(*inputs, scale=1.0)
    assert (layers.attention_by_products(*inputs) - expected).abs().max() < EXACT
    monkeypatch.setattr(layers, "SCORES", 2 * 50 * 7)  # seven rows at once
    assert (layers.attention_by_products(*inputs) - expected).abs().max() < EXACT
    query, key, value = inputs
    assert (layers.attention_by_products(query, key.roll(1, 2), value) - expected).abs().max() > 1e-3


def test_attention_by_products_keeps_its_softmax_wide():
    inputs = [t.bfloat16() for t in attention_inputs()]
    exact = F.scaled_dot_product_attention(*(t.double() for t in inputs), scale=1.0)
    plain = F.scaled_dot_product_attention(*inputs, scale=1.0)
    assert_as_good(layers.attention_by_products(*inputs), plain, exact)


class Seen(TorchDispatchMode):
    """The operations, and the numbers that tensors are divided by."""

    def __init__(self):
        super().__init__()
        self.names, self.divisors = set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        self.names.add(name)
        if name == "div":
            self.divisors.append(args[1])
        return function(*args, **(kwargs or {}))


def picture(generator: OneStepGenerator) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    image = torch.rand(1, 3, 64, 64, generator=random) * 2 - 1
    latents = generator.encode(image)
    noise = torch.randn(latents.shape, generator=random)
    return generator.decode(generator.predict(latents, noise).x0)


def test_divisions_by_1_are_left_out_to_the_bit(mini_sd):
    generator = OneStepGenerator.from_pretrained(mini_sd)
    with Seen() as before:
        expected = picture(generator)
    for part in (generator.unet, generator.codec):
        patches.skip_divisions(part)
    blocks = [m for p in (generator.unet, generator.codec) for m in p.modules() if type(m).__name__ == "ResnetBlock2D"]
    with Seen() as after:
        assert torch.equal(picture(generator), expected)
    assert len(blocks) > 10 and before.divisors.count(1.0) - after.divisors.count(1.0) == len(blocks)


def test_biases_of_a_block_are_added_once(mini_sd):
    generator = OneStepGenerator.from_pretrained(mini_sd)
    parts = (generator.unet, generator.codec)
    for parameter in generator.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn(parameter.shape))  # diffusers starts with zeros
    expected = picture(generator)
    biases = lambda: sum(getattr(m, "bias", None) is not None for p in parts for m in p.modules())  # noqa: E731
    before = biases()
    for part in parts:
        patches.merge_biases(part)
    shortcuts = [m for p in parts for m in p.modules() if getattr(m, "conv_shortcut", None) is not None]
    assert shortcuts and biases() == before - len(shortcuts)
    assert relative_error(picture(generator), expected) < 1e-5
    shortcuts[0].conv_shortcut.bias += 0.1
    assert relative_error(picture(generator), expected) > 1e-4


def test_a_block_that_scales_its_output_still_does():
    from diffusers.models.resnet import ResnetBlock2D

    block = ResnetBlock2D(in_channels=8, temb_channels=6, groups=2, output_scale_factor=2.0).eval()
    x, time = torch.randn(1, 8, 5, 5), torch.randn(1, 6)
    expected = block(x, time)
    patches.skip_divisions(block)
    assert torch.equal(block(x, time), expected)


@pytest.mark.parametrize("folder", ["mini_sd", "mini_sd_taesd"])
def test_a_folded_generator_repeats_no_pixel(folder, request):
    generator = OneStepGenerator.from_pretrained(request.getfixturevalue(folder))
    expected = picture(generator)
    for part in (generator.unet, generator.codec):
        patches.fold_upsampling(part)
    with Seen() as seen:
        found = picture(generator)
    assert "upsample_nearest2d" not in seen.names
    assert relative_error(found, expected) < 1e-5


def test_a_folded_encoder_copies_no_picture_to_pad_it(mini_sd):
    codec = OneStepGenerator.from_pretrained(mini_sd).codec
    image = torch.rand(1, 3, 64, 96) * 2 - 1
    expected = codec.encode(image)
    patches.fold_padding(codec)
    with Seen() as seen:
        found = codec.encode(image)
    assert "constant_pad_nd" not in seen.names
    assert relative_error(found, expected) < 1e-5


def test_a_convolution_with_a_lora_is_not_folded(mini_sd):
    unet = OneStepGenerator.from_pretrained(mini_sd).unet
    lora.add(unet, 2, r".*upsamplers\.0\.conv")
    patches.fold_upsampling(unet)
    ups = [m for m in unet.modules() if type(m).__name__ == "Upsample2D"]
    assert ups and not any(up.use_conv_transpose for up in ups)
