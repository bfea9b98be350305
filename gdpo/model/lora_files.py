"""The two forms in which a LoRA is stored: peft's folder, and diffusers' single file.

    adapter_config.json, adapter_model.safetensors   peft.PeftModel.from_pretrained(unet, FOLDER)
    pytorch_lora_weights.safetensors                 pipeline.load_lora_weights(FOLDER)

Both are written; either is read. Diffusers also takes peft's file, but not the scale beside it; so that holds the LoRA
a second time, with the scale multiplied into B, under the names that diffusers looks for.

A file is judged by its tensors: which layers, which rank. From its configuration come the scale and the variant
(rsLoRA, DoRA) alone, so a stranger's configuration cannot ask for more than its file holds.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gdpo.model.parts import first_line, read_json, read_tensors

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_PREFIX, DIFFUSERS_PREFIX = "base_model.model.", "unet."
_METADATA = "lora_adapter_metadata"  # diffusers' key in the header of a safetensors file
_LORA = re.compile(r"(?P<module>.+)\.(lora_A\.weight|lora_B\.(weight|bias)|lora_magnitude_vector(\.weight)?)")
_MAX_ALPHA = 1e6
Shape = tuple[int, ...]


@dataclass
class Adapter:
    """A LoRA of one model.

    Attributes:
        tensors: by bare name: MODULE.lora_A.weight [r,in] or [r,in,k,k], MODULE.lora_B.weight [out,r] or [out,r,1,1],
            perhaps MODULE.lora_B.bias and MODULE.lora_magnitude_vector; and the weights of modules trained whole.
        alpha: the scale is alpha / rank (rsLoRA: alpha / sqrt(rank)).
        alphas: of modules that have another one.
        rslora, dora: the variants of peft's LoraConfig.
    """

    tensors: dict[str, torch.Tensor]
    alpha: float | None = None
    alphas: dict[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each adapted module."""
        a = ".lora_A.weight"
        return {k.removesuffix(a): len(v) for k, v in self.tensors.items() if k.endswith(a)}

    @property
    def rank(self) -> int:
        """The rank that most modules have."""
        ranks = list(self.ranks.values())
        return max(sorted(set(ranks)), key=ranks.count)

    @property
    def whole(self) -> list[str]:
        """Modules that were trained as they are."""
        return sorted({k.rpartition(".")[0] for k in self.tensors if not _LORA.fullmatch(k)})

    def options(self) -> dict[str, Any]:
        """What peft's LoraConfig takes, complete."""
        rank, alpha = self.rank, self.rank if self.alpha is None else self.alpha
        return {
            "r": rank,
            "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
            "target_modules": sorted(self.ranks),
            "rank_pattern": {f"^{m}": r for m, r in sorted(self.ranks.items()) if r != rank},
            "alpha_pattern": {f"^{m}": a for m, a in sorted(self.own_alphas().items()) if a != alpha},
            "modules_to_save": self.whole or None,
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "lora_bias": any(k.endswith(".lora_B.bias") for k in self.tensors),
        }

    def own_alphas(self) -> dict[str, float]:
        """Without an alpha the scale is 1, also where a module has another rank."""
        return (self.ranks if self.alpha is None else {}) | self.alphas


def read(folder: Path) -> Adapter:
    """The LoRA in a folder, written by this project, peft or diffusers.

    Raises:
        FileNotFoundError, ValueError: naming the file and what in it is wrong.
    """
    if (folder / DIFFUSERS_WEIGHTS).is_file() and not (folder / PEFT_WEIGHTS).is_file():
        return read_diffusers(folder / DIFFUSERS_WEIGHTS)
    config_file, weights = folder / PEFT_CONFIG, folder / PEFT_WEIGHTS
    for file, other in ((weights, config_file), (config_file, weights)):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; {folder.name}/ needs it beside {other.name}")
    config, tensors = read_json(config_file), read_tensors(weights)
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(f"{config_file}: peft_type must be LORA; got {kind!r:.40}")
    forms: dict[bool, dict[str, torch.Tensor]] = {True: {}, False: {}}
    for key, value in tensors.items():
        forms[key.startswith(PEFT_PREFIX)][key.removeprefix(PEFT_PREFIX)] = value
    peft, bare = forms[True], forms[False]  # with both, the second is for diffusers
    adapter = _options(config_file, config, peft or bare)
    for module, rank in adapter.ranks.items():
        told = _of_module(_mapping(config_file, config, "rank_pattern"), module, config.get("r"))
        if told is not None and told != rank:
            raise ValueError(f"{config_file}: {module} must have rank {rank}, as in {weights.name}; got {told!r:.40}")
    return adapter


def read_diffusers(file: Path) -> Adapter:
    """The UNet's LoRA in a file that diffusers' save_lora_weights wrote, now or before it used peft's names."""
    tensors = read_tensors(file)
    bare: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    for key, value in tensors.items():
        if not key.startswith(DIFFUSERS_PREFIX):
            remedy = "load it with diffusers and save it again" if key.startswith("lora_") else "only a UNet's is read"
            raise ValueError(f"{file}: {key!r:.80} is not of a UNet's LoRA as diffusers writes it; {remedy}")
        name = key.removeprefix(DIFFUSERS_PREFIX)
        if name.endswith(".alpha"):
            alphas[name.removesuffix(".alpha").removesuffix(".lora")] = _number(file, key, value.item())
            continue
        for old, new in ((".lora.down.", ".lora_A."), (".lora.up.", ".lora_B."), (".processor.", ".")):
            name = name.replace(old, new)
        for attention in ("to_q", "to_k", "to_v", "to_out"):
            name = re.sub(rf"\.{attention}_lora\.down\.", f".{attention}.lora_A.", name)
            name = re.sub(rf"\.{attention}_lora\.up\.", f".{attention}.lora_B.", name)
        bare[name.replace(".to_out.lora_", ".to_out.0.lora_")] = value
    adapter = _options(file, _header(file), bare)
    adapter.alphas |= alphas
    return adapter


def _header(file: Path) -> dict[str, Any]:
    """The configuration in a safetensors file's metadata, or nothing."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get(_METADATA)
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: its {_METADATA} is not valid JSON ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: its {_METADATA} must be a JSON object; got {type(content).__name__}")
    return {str(k).removeprefix(DIFFUSERS_PREFIX): v for k, v in content.items()}


def _options(file: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Adapter:
    """The adapter of these tensors, with the scale and the variant that a configuration gives."""
    alpha = config.get("lora_alpha")
    adapter = Adapter(tensors, None if alpha is None else _number(file, "lora_alpha", alpha))
    for option, name in (("use_rslora", "rslora"), ("use_dora", "dora")):
        value = config.get(option, False)
        if not isinstance(value, bool | None):
            raise ValueError(f"{file}: {option} must be true or false; got {value!r:.40}")
        setattr(adapter, name, bool(value))
    if not adapter.ranks:
        raise ValueError(f"{file}: there is no LoRA beside it or in it (names that end in .lora_A.weight)")
    pattern = _mapping(file, config, "alpha_pattern")
    for module in adapter.ranks:
        if (found := _of_module(pattern, module, None)) is not None:
            adapter.alphas[module] = _number(file, f"alpha_pattern of {module}", found)
    return adapter


def _mapping(file: Path, config: dict[str, Any], option: str) -> dict[str, Any]:
    value = config.get(option) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{file}: {option} must be an object; got {type(value).__name__}")
    for key in value:
        if not re.fullmatch(r"\^?[\w.]{1,200}", key):  # peft takes regular expressions; a stranger's may run for years
            raise ValueError(f"{file}: {option} must name modules; got {key!r:.80}")
    return value


def _of_module(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """What a pattern says of a module: by its whole name, or by its last parts as peft matches them."""
    for key, value in pattern.items():
        name = key.removeprefix("^")
        if module == name or (not key.startswith("^") and module.endswith(f".{name}")):
            return value
    return default


def _number(file: Path, name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < abs(value) <= _MAX_ALPHA:
        raise ValueError(f"{file}: {name} must be a number up to {_MAX_ALPHA:.0e}; got {value!r:.40}")
    return float(value)


def check(adapter: Adapter, model: Any, where: str) -> None:
    """Whether a LoRA fits a model, before anything of its size is made.

    Raises:
        ValueError: a layer that the model does not have, or other shapes; `where` is named.
    """
    layers = dict(model.named_modules())
    ranks = adapter.ranks
    for name in adapter.whole:
        own = {f"{name}.{k}": tuple(p.shape) for k, p in layers[name].named_parameters()} if name in layers else {}
        got = {k: tuple(v.shape) for k, v in adapter.tensors.items() if k.rpartition(".")[0] == name}
        if own != got or not own:
            raise ValueError(
                f"{where} does not fit this model: {name[:80]!r} has {own or 'no weights'} there; got {got}"
            )
    for key, value in adapter.tensors.items():
        match = _LORA.fullmatch(key)
        if match is None:
            continue
        name = match["module"]
        layer = layers.get(name)
        if name not in ranks or not isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            raise ValueError(f"{where} does not fit this model: it adapts {name[:80]!r}; is it another model's?")
        expected = _shape(layer, key.removeprefix(f"{name}."), ranks[name])
        if tuple(value.shape) != expected:
            raise ValueError(f"{where} does not fit this model: {key} must be {expected}; got {tuple(value.shape)}")
    for module in ranks:
        if f"{module}.lora_B.weight" not in adapter.tensors:
            raise ValueError(f"{where}: {module}.lora_B.weight is missing; is the file complete?")
        if adapter.dora and not any(k.startswith(f"{module}.lora_magnitude_vector") for k in adapter.tensors):
            raise ValueError(f"{where}: {module}.lora_magnitude_vector is missing; use_dora asks for it")


def _shape(layer: Any, part: str, rank: int) -> Shape:
    linear = isinstance(layer, torch.nn.Linear)
    out, into = (layer.out_features, layer.in_features) if linear else (layer.out_channels, layer.in_channels)
    if part == "lora_A.weight":
        return (rank, into) if linear else (rank, into, *layer.kernel_size)
    if part == "lora_B.weight":
        return (out, rank) if linear else (out, rank, 1, 1)
    if part == "lora_B.bias" or linear:
        return (out,)
    return (1, out, 1, 1)  # DoRA's magnitude of a convolution


def write(adapter: Adapter, folder: Path, pairs: Adapter | None = None, prefixes: tuple[str, ...] = ()) -> None:
    """Write peft's form.

    Args:
        pairs: the same change as pairs alone (`without_whole`), for diffusers.
        prefixes: of the names that it looks for: "" in a model's load_lora_adapter(prefix=None), "unet." in a pipeline.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = adapter.options()
    config = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "bias": "none"} | options
    (folder / PEFT_CONFIG).write_text(_json(config) + "\n")
    tensors = {f"{PEFT_PREFIX}{k}": v for k, v in adapter.tensors.items()}
    if pairs is not None:
        for prefix in prefixes:
            tensors |= {f"{prefix}{k}": v.clone() for k, v in _of_scale_1(pairs).items()}
    (folder / PEFT_WEIGHTS).write_bytes(_saved(tensors, {"format": "pt"}))


def _of_scale_1(adapter: Adapter) -> dict[str, torch.Tensor]:
    """The tensors of the same LoRA at a scale of 1, which is what is taken where none is told."""
    ranks, own = adapter.ranks, adapter.own_alphas()
    tensors = {}
    for key, value in adapter.tensors.items():
        module, side, _ = key.rpartition(".lora_B.")
        if side:
            rank = ranks[module]
            alpha = own.get(module, adapter.alpha if adapter.alpha is not None else rank)
            value = value * (alpha / (math.sqrt(rank) if adapter.rslora else rank))
        tensors[key] = value
    return tensors


def write_diffusers(adapter: Adapter, folder: Path) -> None:
    """Write diffusers' form of a UNet's LoRA, of pairs alone."""
    header = {f"{DIFFUSERS_PREFIX}{k}": v for k, v in adapter.options().items()}
    tensors = {f"{DIFFUSERS_PREFIX}{k}": v for k, v in adapter.tensors.items()}
    (folder / DIFFUSERS_WEIGHTS).write_bytes(_saved(tensors, {"format": "pt", _METADATA: _json(header)}))


def _saved(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file, the same at every call: the library writes several entries of metadata in random order."""
    from safetensors.torch import save

    content = save(tensors, metadata)
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]) | {"__metadata__": metadata}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True)


def without_whole(adapter: Adapter, base: dict[str, torch.Tensor]) -> Adapter:
    """The same change of the model as pairs alone, which is all that diffusers' file holds.

    Args:
        base: the weights, before training, of the modules trained whole.

    A convolution trained whole, trained - base, becomes the product of its singular vectors: a pair of full rank, exact
    to rounding. Its bias becomes that of B; peft then wants one in every pair, and the others are zero.
    """
    tensors = {k: v for k, v in adapter.tensors.items() if _LORA.fullmatch(k)}
    alphas = adapter.own_alphas()
    for module in adapter.whole:
        change = {k: v.double() - base[k].double() for k, v in adapter.tensors.items() if k.startswith(f"{module}.")}
        weight, bias = change[f"{module}.weight"], change.get(f"{module}.bias")
        u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        a, b = s.sqrt()[:, None] * v, u * s.sqrt()
        tensors[f"{module}.lora_A.weight"] = a.unflatten(1, weight.shape[1:]).float().contiguous()
        tensors[f"{module}.lora_B.weight"] = b[(...,) + (None,) * (weight.ndim - 2)].float().contiguous()
        alphas[module] = math.sqrt(len(s)) if adapter.rslora else len(s)  # a scale of 1
        if bias is not None and bias.any():
            tensors[f"{module}.lora_B.bias"] = bias.float()
    own = Adapter(tensors, adapter.alpha, alphas, adapter.rslora, adapter.dora)
    if any(k.endswith(".lora_B.bias") for k in tensors):
        for module in own.ranks:
            tensors.setdefault(f"{module}.lora_B.bias", torch.zeros(len(tensors[f"{module}.lora_B.weight"])))
    return own
