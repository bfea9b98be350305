"""LoRA on any module, by peft: add, switch off, switch between, merge at a strength, save and load."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gdpo.model import lora_files, lora_layers
from gdpo.randomness import seed_of

# The layers that OSEDiff and the released GDPO code adapt; conv_in of the UNet is trained whole.
UNET_TARGETS = (
    r"(.*\.)?(to_q|to_k|to_v|to_out\.0|conv|conv1|conv2|conv_shortcut|conv_out|"
    r"proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2)"
)
VAE_ENCODER_TARGETS = (
    r"encoder\.(.*\.)?(conv|conv1|conv2|conv_in|conv_out|conv_shortcut|to_q|to_k|to_v|to_out\.0)|quant_conv"
)


def add(
    model: Any,
    rank: int,
    targets: str | list[str],
    *,
    alpha: int | None = None,
    rslora: bool = False,
    dora: bool = False,
    train_whole: tuple[str, ...] = (),
    adapter: str = "default",
    seed: int = 0,
) -> None:
    """Add a LoRA adapter in place; the output is unchanged until it is trained (B starts at zero).

    Args:
        rank: of every adapted layer.
        targets: a regular expression that full module names must match, or the last parts of names.
        alpha: the scale is alpha/rank; None means alpha = rank.
        rslora: the scale is alpha/sqrt(rank) (arXiv 2312.03732).
        dora: the magnitude of each output channel is trained apart from its direction (arXiv 2402.09353).
        train_whole: modules to copy and train as they are, beside the LoRA.
        seed: of the random A matrices.

    Raises:
        ValueError: no module is called so, or one that a LoRA cannot adapt.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if rank < 1:
        raise ValueError(f"lora rank must be at least 1; got {rank}")
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        target_modules=targets,
        modules_to_save=list(train_whole) or None,
        init_lora_weights=True,
        use_rslora=rslora,
        use_dora=dora,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is meant (VSD's fake)
        torch.manual_seed(seed_of(seed, "lora", adapter))
        try:
            inject_adapter_in_model(config, model, adapter)
        except ValueError as error:
            raise ValueError(f"no LoRA for the modules {targets} of {type(model).__name__}: {error}") from error
    lora_layers.changed(model)
    # The base may be bf16; what is trained stays fp32.
    for parameter in parameters(model, adapter).values():
        parameter.data = parameter.data.float()


def adapters(model: Any) -> tuple[str, ...]:
    """The names of the adapters that a model carries (without importing peft when it carries none)."""
    return tuple(getattr(model, "peft_config", {}))


def parameters(model: Any, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The adapter's own parameters by full name."""
    kinds = ("lora_A", "lora_B", "lora_magnitude_vector", "modules_to_save")
    marks = [f".{kind}.{adapter}." for kind in kinds]
    return {n: p for n, p in model.named_parameters() if any(m in f".{n}" for m in marks)}


def activate(model: Any, adapter: str | None) -> None:
    """Use one adapter, or the base alone (None). `requires_grad` flags are left as they are, which peft changes."""
    for layer in lora_layers.layers(model):
        layer._disable_adapters = adapter is None
        if adapter is not None:
            layer._active_adapter = [adapter]


@contextmanager
def using(models: list[nn.Module], adapter: str | None, back_to: str = "default") -> Iterator[None]:
    """Run with another adapter (or none), then return to `back_to`, also after an error."""
    models = [m for m in models if adapters(m)]
    for m in models:
        activate(m, adapter)
    try:
        yield
    finally:
        for m in models:
            activate(m, back_to)


def leave_casts_to_autocast(model: Any) -> None:
    """Under autocast a half-precision input needs no fp32 copy on its way into an fp32 LoRA: autocast casts the weight.

    Same values, but without that copy, and the backward pass keeps the input itself instead of one more of its size.
    """
    for layer in lora_layers.layers(model):
        layer.cast_input_dtype_enabled = False


def merge(model: Any, strength: float = 1.0, adapter: str = "default") -> None:
    """Fold the adapter into the base weights in place: W + strength * scale * B A, and remove every adapter.

    Modules trained whole become (1 - strength) * base + strength * trained.
    """
    from peft.tuners.lora import LoraLayer as _LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    if not adapters(model):
        return
    LoraLayer: Any = _LoraLayer
    for name, module in list(model.named_modules()):
        if not isinstance(module, (LoraLayer, ModulesToSaveWrapper)):
            continue
        if isinstance(module, LoraLayer):
            plain = module.get_base_layer()
            if adapter in module.lora_A:
                with torch.no_grad():
                    _merge_pair(module, plain, strength, adapter)
        else:
            plain = module.original_module
            trained = dict(module.modules_to_save[adapter].named_parameters())
            with torch.no_grad():
                for key, p in plain.named_parameters():
                    p.copy_(torch.lerp(p.double(), trained[key].double(), strength).to(p.dtype))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    del model.peft_config
    lora_layers.changed(model)


def _merge_pair(module: Any, plain: Any, strength: float, adapter: str) -> None:
    """Fold one layer's pair into its base layer `plain`."""
    if module.use_dora.get(adapter):  # not a sum: the magnitude of every column is another
        before = plain.weight.clone()
        module.merge(adapter_names=[adapter])
        plain.weight.copy_(torch.lerp(before.double(), plain.weight.double(), strength).to(before.dtype))
        return
    delta = module.get_delta_weight(adapter)
    plain.weight.copy_((plain.weight.double() + strength * delta.double()).to(plain.weight.dtype))
    bias = module.lora_B[adapter].bias
    if bias is None or not bias.any():
        return
    if plain.bias is None:
        raise ValueError("this LoRA gives a bias to a layer that has none: it cannot be merged")
    change = strength * module.scaling[adapter] * bias.double()
    plain.bias.copy_((plain.bias.double() + change).to(plain.bias.dtype))


@torch.no_grad()
def check_strength(strength: float) -> None:
    """Refuse a strength that is below 0 or not finite: ValueError."""
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength must be at least 0 and finite; got {strength}")


def scale(model: Any, strength: float, adapter: str = "default") -> None:
    """Make the live adapter's change `strength` times what it was.

    Raises:
        ValueError: a DoRA or modules trained whole, whose change is no product.
    """
    own = parameters(model, adapter)
    if not all(".lora_A." in name or ".lora_B." in name for name in own):
        raise ValueError("only a plain LoRA can be scaled as it is; python -m gdpo.merge takes every kind")
    for name, parameter in own.items():
        if ".lora_B." in name:
            parameter.mul_(strength)


def save(model: Any, folder: Path, adapter: str = "default", *, part: str | None = None) -> None:
    """Write the adapter as peft does and, for a part of a diffusers pipeline ("unet" or "vae"), as diffusers does."""
    from peft import get_peft_model_state_dict

    config = model.peft_config[adapter]
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    stored = lora_files.Adapter(tensors, float(config.lora_alpha), rslora=config.use_rslora, dora=config.use_dora)
    stored.alphas = {m: a for m in stored.ranks if (a := _alpha_of(model, m, adapter)) != stored.alpha}
    pairs = None
    # As pairs alone, modules trained whole need a bias, which peft does not have for DoRA.
    if part is not None and not (stored.dora and stored.whole):
        originals = {name: model.get_submodule(name).original_module for name in stored.whole}
        base = {f"{name}.{k}": p.detach().cpu() for name, m in originals.items() for k, p in m.named_parameters()}
        pairs = lora_files.without_whole(stored, base)
    # A pipeline refuses a file with a name that is not of a LoRA.
    in_pipeline = part == "unet" and not stored.whole
    lora_files.write(stored, folder, pairs, ("", lora_files.DIFFUSERS_PREFIX) if in_pipeline else ("",))
    if pairs is not None and part == "unet":
        lora_files.write_diffusers(pairs, folder)


def _alpha_of(model: Any, module: str, adapter: str) -> float:
    return float(model.get_submodule(module).lora_alpha[adapter])


def load(model: Any, folder: Path, adapter: str = "default") -> None:
    """Add the adapter of a folder written by `save`, by peft or by diffusers, and load its weights; it is active after.

    Raises:
        FileNotFoundError, ValueError: naming the file, and what in it does not fit.
    """
    attach(model, lora_files.read(folder), str(folder), adapter)


def attach(model: Any, stored: lora_files.Adapter, where: str, adapter: str = "default") -> None:
    """Add an adapter with its weights, active.

    Raises:
        ValueError: it does not fit the model; `where` says whose it is.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    lora_files.check(stored, model, where)
    options = stored.options()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`lora_bias=True` was passed but")  # `merge` sees to it
        inject_adapter_in_model(LoraConfig(**options), model, adapter)
    lora_layers.changed(model)
    own = parameters(model, adapter)
    for parameter in own.values():
        parameter.data = parameter.data.float()
    report: Any = set_peft_model_state_dict(model, dict(stored.tensors), adapter_name=adapter)
    if report.unexpected_keys or len(stored.tensors) != len(own):
        raise ValueError(
            f"{where} holds {len(stored.tensors)} tensors that do not fit this model's {len(own)}; is it another "
            "model's?"
        )
