"""What gdpo.model.diffusers_patches reaches into is there in this diffusers; else this names the patch to mend."""

from importlib import import_module

import diffusers
import peft
import pytest
import torch

from gdpo.generator import OneStepGenerator
from gdpo.model import diffusers_patches as patches
from gdpo.model import lora, lora_layers, training_patches

HOMES = {patch: home for home in (patches, training_patches) for patch in home.REACHES}


@pytest.fixture(scope="module")
def generator(mini_sd):
    return OneStepGenerator.from_pretrained(mini_sd)


def lacking(generator, patch: str) -> list[str]:
    """ "CLASS.ATTRIBUTE" of what the patch needs and instances of the class do not have."""
    modules = [*generator.unet.modules(), *generator.codec.modules()]
    missing = []
    for path, attributes in HOMES[patch].REACHES[patch]:
        home, _, name = path.rpartition(".")
        found = [m for m in modules if isinstance(m, getattr(import_module(home), name))]
        if not found:
            missing.append(f"{path} (no instance of it in a Stable Diffusion model)")
        missing += [f"{path}.{a}" for a in attributes if not all(hasattr(m, a) for m in found)]
    return missing


@pytest.mark.parametrize("patch", HOMES)
def test_every_patch_fits(patch, generator):
    missing = lacking(generator, patch)
    version = f"diffusers {diffusers.__version__}"
    assert not missing, f"{patch} does not fit {version}: there is no {', '.join(missing)}"
    assert callable(getattr(HOMES[patch], patch))


def test_a_patch_that_does_not_fit_is_named(generator, monkeypatch):
    path, attributes = patches.REACHES["fuse_norms"][0]
    monkeypatch.setitem(patches.REACHES, "fuse_norms", [(path, (*attributes, "gone"))])
    assert lacking(generator, "fuse_norms") == [f"{path}.gone"]


@torch.no_grad()
def test_each_patch_changes_roundings_alone(mini_sd):
    """On a UNet and an autoencoder, one after the other; a patch that does nothing any more is seen too."""
    plain, patched = (OneStepGenerator.from_pretrained(mini_sd) for _ in range(2))
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = plain.encode(picture)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    expected = plain.predict(latents, noise).x0, plain.decode(latents)

    def check(count: int, patch: str) -> None:
        assert count, f"diffusers_patches.{patch} changed nothing"
        for found, wanted in zip((patched.predict(latents, noise).x0, patched.decode(latents)), expected):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, msg=f"diffusers_patches.{patch}")

    modules = lambda kind: sum(isinstance(m, kind) for p in (patched.unet, patched.codec) for m in p.modules())  # noqa: E731
    training_patches.keep_and_fold_upsampling(patched.codec)
    check(modules(training_patches._Upsampling), "keep_and_fold_upsampling")
    for part in (patched.unet, patched.codec):
        patches.norms_in_own_precision(part)
    check(modules(patches._GroupNorm), "norms_in_own_precision")
    patches.transformers_channels_last(patched.unet)
    own = [m for m in patched.unet.modules() if "_get_output_for_continuous_inputs" in vars(m)]
    check(len(own), "transformers_channels_last")
    for part in (patched.unet, patched.codec):
        patches.fuse_attention(part)
    check(sum(hasattr(m, "to_qkv") for m in patched.unet.modules()), "fuse_attention")
    for part in (patched.unet, patched.codec):
        patches.fuse_norms(part)
    check(modules(patches.FusedGroupNorm), "fuse_norms")
    for part in (patched.unet, patched.codec):
        patches.skip_divisions(part)
        patches.fuse_residuals(part)
    own = [m for p in (patched.unet, patched.codec) for m in p.modules() if hasattr(m, "added")]
    check(len(own), "fuse_residuals")
    assert all(m.added.any() for m in own) and all(m.conv2.bias is not None for m in own)  # and they are saved
    patches.fuse_gates(patched.unet)
    check(sum(type(m).__name__ == "GEGLU" and "forward" in vars(m) for m in patched.unet.modules()), "fuse_gates")


@torch.no_grad()
def test_a_constant_time_is_not_scaled_by_doras_magnitudes(mini_sd):
    """DoRA takes a layer's own bias off again, and would keep what is added with it."""
    generator = OneStepGenerator.from_pretrained(mini_sd)
    lora.add(generator.unet, 2, ["conv1"], dora=True)
    for name, p in lora.parameters(generator.unet).items():
        if "magnitude" in name:
            p.mul_(1.5)
    latents, noise = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2))
    expected = generator.predict(latents, noise).x0
    training_patches.constant_time(generator.unet, generator.t_diffusion)
    patches.fuse_norms(generator.unet)
    torch.testing.assert_close(generator.predict(latents, noise).x0, expected, rtol=1e-4, atol=1e-4)


def test_lora_layers_have_what_is_switched(mini_sd):
    """peft's part: the casts that autocast makes needless, and adapters that go on and off."""
    unet = OneStepGenerator.from_pretrained(mini_sd).unet
    lora.add(unet, 2, lora.UNET_TARGETS)
    layers = lora_layers.layers(unet)
    needed = ("cast_input_dtype_enabled", "_disable_adapters", "_active_adapter", "active_adapters", "get_base_layer")
    needed += ("lora_A", "lora_B", "lora_dropout", "lora_variant", "scaling", "merged")
    missing = [name for name in needed if not all(hasattr(layer, name) for layer in layers)]
    assert layers and not missing, f"gdpo.model.lora does not fit peft {peft.__version__}: no {', '.join(missing)}"
