"""A LoRA layer as one function against peft's own forward pass: values, gradients, files, and what stays peft's."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gdpo.model import lora, lora_layers


class Net(nn.Module):
    """Convolutions of several kinds and linear layers, with and without a bias."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(6, 12, 3, padding=1)
        self.down = nn.Conv2d(12, 8, 3, stride=2, padding=(1, 0), dilation=1)
        self.point = nn.Conv2d(8, 10, 1, bias=False)
        self.query = nn.Linear(10, 14, bias=False)
        self.out = nn.Linear(14, 6)
        self.last = nn.Linear(6, 6)

    def forward(self, x):
        x = self.point(torch.tanh(self.down(torch.tanh(self.wide(x)))))
        return self.last(self.out(torch.tanh(self.query(x.flatten(2).transpose(1, 2)))))


TARGETS = ["wide", "down", "point", "query", "out"]


def made(dtype=torch.float64, rank=3, **options):
    """A net with a LoRA that is not zero, and the same with peft's forward pass."""
    torch.manual_seed(0)
    net = Net()
    lora.add(net, rank, TARGETS, alpha=5, **options)
    for p in lora.parameters(net).values():
        p.data = 0.3 * torch.randn(p.shape)
    net.to(dtype)
    own = copy.deepcopy(net)
    for layer in lora_layers.layers(own):
        layer.__class__ = type(layer).__mro__[1]
    return net, own


def taken(net, x, together=True):
    """Output and gradients of the input and of every trained weight."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with lora_layers.cast_together(net if together else None):
        y = net(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for _, p in sorted(lora.parameters(net).items()))]


def errors(found, expected):
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, expected, strict=True)]


def functions(net, x):
    """The names of the autograd functions behind an output."""
    seen, left = set(), [net(x).grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [n for n, _ in node.next_functions]
    return {type(node).__name__ for node in seen}


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("step", [1, 8])
def test_values_and_gradients_are_pefts(memory, together, step, monkeypatch):
    monkeypatch.setattr(lora_layers, "_step", lambda plain: step)  # 8: as a GPU has it, rank 3 padded to 8
    net, own = (n.to(memory_format=memory) for n in made())
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64).to(memory_format=memory)
    assert {"_LoraConvBackward", "_LoraLinearBackward"} <= functions(net, x)
    assert not any("Lora" in name for name in functions(own, x))
    assert max(errors(taken(net, x, together), taken(own, x))) < 1e-13
    assert all(layer.prepared is None for layer in lora_layers.layers(net))


@pytest.mark.parametrize("step", [1, 8])
def test_what_is_computed_again_for_the_backward_pass_is_the_same(step, monkeypatch):
    monkeypatch.setattr(lora_layers, "_step", lambda plain: step)
    net, _ = made(torch.float32)
    for layer in lora_layers.layers(net):
        layer.base_layer.to(torch.bfloat16)
    again = copy.deepcopy(net)
    forward = again.forward
    again.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    x = torch.randn(2, 6, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        plain, recomputed = taken(net, x), taken(again, x)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("fault", ["scale", "grad_b", "padding"])
def test_planted_faults_are_seen(fault, monkeypatch):
    net, own = made()
    if fault == "scale":
        for layer in lora_layers.layers(net):
            layer.scaling["default"] *= 1.001
    elif fault == "grad_b":
        backward = lora_layers._LoraLinear.backward
        wrong = staticmethod(lambda ctx, g: (*(parts := backward(ctx, g))[:-1], parts[-1] * 1.001))
        monkeypatch.setattr(lora_layers._LoraLinear, "backward", wrong)
    else:
        monkeypatch.setattr(lora_layers, "_step", lambda plain: 8)
        pad = lora_layers.F.pad
        monkeypatch.setattr(lora_layers.F, "pad", lambda x, width: pad(x.roll(1, 1), width))
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    assert max(errors(taken(net, x), taken(own, x))) > 1e-5


def test_under_autocast_the_error_is_no_larger_than_pefts():
    net, own = made(torch.float32, rank=4)
    exact = copy.deepcopy(net).double()
    for n in (net, own):
        for layer in lora_layers.layers(n):
            layer.base_layer.to(torch.bfloat16)
            layer.cast_input_dtype_enabled = False
            exact_layer = dict(exact.named_modules())[next(k for k, m in n.named_modules() if m is layer)]
            exact_layer.base_layer.load_state_dict(layer.base_layer.state_dict())
    x = torch.randn(8, 6, 17, 16).to(memory_format=torch.channels_last)
    expected = taken(exact, x.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = taken(net, x), taken(own, x)
        assert "_PreparedBackward" in functions(net, x)
    assert {g.dtype for g in ours[1:]} == {torch.float32}
    ours, theirs = errors(ours, expected), errors(theirs, expected)
    assert sum(ours) < 1.1 * sum(theirs) and max(ours) < 3e-2


def test_dora_and_bases_that_learn_keep_pefts_forward_pass():
    x = torch.randn(1, 6, 8, 8)
    assert not any("Lora" in name for name in functions(made(torch.float32, dora=True)[0], x))
    rooted, _ = made(torch.float32, rslora=True)
    assert "_LoraLinearBackward" in functions(rooted, x)  # another scale, the same function
    net, _ = made(torch.float32)
    net.out.base_layer.weight.requires_grad_(True)
    net(x).sum().backward()
    assert net.out.base_layer.weight.grad is not None


def test_hooks_of_a_base_layer_are_called():
    """A network of others takes its noise by one (gdpo.model.network_unet)."""
    net, peft_net = made()
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    for one in (net, peft_net):
        one.down.base_layer.register_forward_hook(lambda module, inputs, output: output + 1)
    found, expected = taken(net, x), taken(peft_net, x)
    assert max(errors(found, expected)) < 1e-13
    assert not torch.allclose(found[0], taken(made()[0], x)[0])


def test_switching_is_a_matter_of_flags(monkeypatch):
    net, _ = made(torch.float32)
    lora.add(net, 2, ["out"], train_whole=("last",), adapter="fake")
    for name, p in net.named_parameters():
        p.requires_grad_("default" in name and "wide" not in name)
    x, flags = torch.randn(1, 6, 8, 8), {name: p.requires_grad for name, p in net.named_parameters()}
    lora.activate(net, "default")

    def pefts(adapter):
        copied = copy.deepcopy(net)
        for layer in lora_layers.layers(copied):
            layer.enable_adapters(adapter is not None)
            if adapter is not None and (adapter in getattr(layer, "lora_A", ()) or hasattr(layer, "modules_to_save")):
                layer.set_adapter(adapter)
        return copied(x)

    policy = net(x)
    for adapter in (None, "fake"):
        with pytest.raises(KeyError), lora.using([net], adapter):
            there = net(x)
            assert {name: p.requires_grad for name, p in net.named_parameters()} == flags
            raise KeyError
        assert torch.equal(net(x), policy) and not torch.equal(there, policy)
    with lora.using([net], None):
        assert torch.equal(net(x), pefts(None))
    assert {name: p.requires_grad for name, p in net.named_parameters()} == flags


def test_the_files_and_the_merged_weights_are_the_same(tmp_path):
    net, own = made(torch.float32)
    for n, folder in ((net, "ours"), (own, "peft")):
        lora.save(n, tmp_path / folder)
        lora.merge(n)
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("ours", "peft")]
    assert files[0] == files[1] and files[0]
    pairs = zip(net.state_dict().items(), own.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert lora_layers.layers(net) == []
