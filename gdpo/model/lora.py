"""LoRA on any module, by peft: add, switch off, switch between, merge at a strength, save and load."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gdpo.model.parts import first_line, read_json, read_tensors
from gdpo.randomness import seed_of

# The layers that OSEDiff and the released GDPO code adapt; conv_in of the UNet is trained whole.
UNET_TARGETS = (
    r"(.*\.)?(to_q|to_k|to_v|to_out\.0|conv|conv1|conv2|conv_shortcut|conv_out|"
    r"proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2)"
)
VAE_ENCODER_TARGETS = (
    r"encoder\.(.*\.)?(conv|conv1|conv2|conv_in|conv_out|conv_shortcut|to_q|to_k|to_v|to_out\.0)|quant_conv"
)
TINY_TARGETS = r"conv_in|downs\.\d+|ups\.\d+|.*\.(conv1|conv2)|head\.(up1|up2|out)"


def add(
    model: Any,
    rank: int,
    targets: str | list[str],
    *,
    alpha: int | None = None,
    train_whole: tuple[str, ...] = (),
    adapter: str = "default",
    seed: int = 0,
) -> None:
    """Add a LoRA adapter in place; the output is unchanged until it is trained (B starts at zero).

    Args:
        rank: of every adapted layer.
        targets: a regular expression that full module names must match, or the names themselves.
        alpha: the scale is alpha/rank; None means alpha = rank.
        train_whole: modules to copy and train as they are, beside the LoRA.
        seed: of the random A matrices.
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
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is meant (VSD's fake)
        torch.manual_seed(seed_of(seed, "lora", adapter))
        inject_adapter_in_model(config, model, adapter)
    # The base may be bf16; what is trained stays fp32.
    for parameter in parameters(model, adapter).values():
        parameter.data = parameter.data.float()


def _layers(model: Any) -> Iterator[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            yield module


def adapters(model: Any) -> tuple[str, ...]:
    """The names of the adapters that a model carries (without importing peft when it carries none)."""
    return tuple(getattr(model, "peft_config", {}))


def parameters(model: Any, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The adapter's own parameters by full name."""
    marks = (f".lora_A.{adapter}.", f".lora_B.{adapter}.", f".modules_to_save.{adapter}.")
    return {n: p for n, p in model.named_parameters() if any(m in f".{n}" for m in marks)}


def activate(model: Any, adapter: str | None) -> None:
    """Use one adapter, or the base alone (None). `requires_grad` flags are left as they are."""
    layers = list(_layers(model))
    flags = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(adapter is not None)
        if adapter is not None:
            layer.set_adapter(adapter)
    for p, flag in flags:  # peft flips these when switching
        p.requires_grad_(flag)


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
    for layer in _layers(model):
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
                    delta = module.get_delta_weight(adapter)
                    plain.weight.copy_((plain.weight.double() + strength * delta.double()).to(plain.weight.dtype))
        else:
            plain = module.original_module
            trained = dict(module.modules_to_save[adapter].named_parameters())
            with torch.no_grad():
                for key, p in plain.named_parameters():
                    p.copy_(torch.lerp(p.double(), trained[key].double(), strength).to(p.dtype))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    del model.peft_config


def save(model: Any, folder: Path, adapter: str = "default") -> None:
    """Write adapter_config.json and adapter_model.safetensors, as peft names them."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config[adapter].to_dict()
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / "adapter_model.safetensors")


def load(model: Any, folder: Path, adapter: str = "default") -> None:
    """Add the adapter of a folder written by `save` (or by peft) and load its weights; the adapter is active after."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    config_file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such file; {folder.name}/ needs it beside adapter_config.json")
    if not config_file.is_file():
        raise FileNotFoundError(
            f"{config_file}: no such file; {folder.name}/ needs it beside adapter_model.safetensors"
        )
    read_json(config_file)
    state = read_tensors(weights)
    try:
        inject_adapter_in_model(LoraConfig.from_pretrained(str(folder)), model, adapter)
    except Exception as error:  # peft checks the values of a config here and there, or not at all
        raise ValueError(
            f"{config_file}: does not fit this model ({type(error).__name__}: {first_line(error)})"
        ) from error
    for parameter in parameters(model, adapter).values():
        parameter.data = parameter.data.float()
    own = len(parameters(model, adapter))
    try:
        report: Any = set_peft_model_state_dict(model, state, adapter_name=adapter)
    except RuntimeError as error:  # other shapes
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{weights} does not fit this model ({reason}); is it another model's?") from None
    if report.unexpected_keys or len(state) != own:
        raise ValueError(
            f"{weights} holds {len(state)} tensors that do not fit this model's {own}; is it another model's?"
        )
