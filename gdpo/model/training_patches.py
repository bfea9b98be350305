"""Networks of diffusers in training, cheaper: the same numbers, and every weight where it was, so that it is saved.

As in gdpo.model.diffusers_patches, REACHES lists what each patch needs.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gdpo.model.diffusers_patches import is_3x3
from gdpo.model.layers import subpixel, tokens
from gdpo.model.lora_layers import Shifted, base_of

REACHES: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "undivided_attention": [
        (
            "diffusers.models.attention_processor.Attention",
            ("to_q", "to_k", "to_v", "to_out", "heads", "group_norm", "norm_q", "norm_k", "norm_cross", "spatial_norm")
            + ("add_k_proj", "residual_connection", "rescale_output_factor", "processor", "set_processor"),
        ),
    ],
    "keep_and_fold_upsampling": [("diffusers.models.upsampling.Upsample2D", ("conv", "interpolate", "norm"))],
    "constant_time": [
        (
            "diffusers.models.resnet.ResnetBlock2D",
            ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut", "nonlinearity", "skip_time_act")
            + ("time_embedding_norm", "upsample", "downsample", "dropout", "output_scale_factor"),
        ),
        ("diffusers.UNet2DConditionModel", ("time_embedding", "get_time_embed", "time_embed_act", "config")),
    ],
}


class _Undivided:
    """diffusers' AttnProcessor2_0 for plain attention, without the division of its result by 1."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: None = None,
        temb: None = None,
    ) -> torch.Tensor:
        x, picture = tokens(attn, hidden_states), hidden_states.ndim == 4
        context = x if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (attn.to_q(x), attn.to_k(context), attn.to_v(context))
        )
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        out = attn.to_out[0](out.to(query.dtype))
        out = out.transpose(1, 2).reshape(hidden_states.shape) if picture else out
        return out + hidden_states if attn.residual_connection else out


def undivided_attention(module: nn.Module) -> None:
    """Keep plain attention from dividing its result by 1, in place: equal to the bit."""
    parts: list[Any] = [part for part in module.modules() if type(part).__name__ == "Attention"]
    for part in parts:
        extras = (part.spatial_norm, part.norm_q, part.norm_k, part.norm_cross or None, part.add_k_proj)
        plain = part.rescale_output_factor == 1 and part.to_out[1].p == 0 and all(extra is None for extra in extras)
        if plain and type(part.processor).__name__ == "AttnProcessor2_0":
            part.set_processor(_Undivided())


@torch.no_grad()
def constant_time(unet: Any, timestep: int) -> None:
    """Add what each residual block adds for the timestep with the bias ahead of it, in place. Weights stay as they are.

    For a UNet that is called at one timestep. One with another kind of embedding, or a LoRA on this one, is left alone.
    """
    blocks = [part for part in unet.modules() if type(part).__name__ == "ResnetBlock2D"]
    odd = ("class_embed_type", "addition_embed_type", "time_cond_proj_dim", "encoder_hid_dim_type")
    linear = [unet.time_embedding.linear_1, unet.time_embedding.linear_2, *(part.time_emb_proj for part in blocks)]
    if any(unet.config.get(k) for k in odd) or any(type(part) is not nn.Linear for part in linear):
        return
    convolutions: list[Any] = [base_of(part.conv1) for part in blocks]
    if unet.time_embed_act is not None or not all(map(_is_plain, blocks)):
        return
    if any(type(conv) is not nn.Conv2d or conv.bias is None for conv in convolutions):  # DoRA's are None
        return
    parameter = next(unet.parameters())
    sample = torch.zeros(1, dtype=parameter.dtype, device=parameter.device)
    time = unet.time_embedding(unet.get_time_embed(sample, timestep))
    for part, conv in zip(blocks, convolutions):
        shifted = conv.bias + part.time_emb_proj(part.nonlinearity(time))[0]
        conv.register_buffer("shifted", shifted, persistent=False)
        conv.__class__, part.forward = Shifted, MethodType(_without_time, part)
    unet.get_time_embed = unet.time_embedding.forward = lambda *args, **kwargs: None


def _is_plain(block: Any) -> bool:
    """A ResnetBlock2D as Stable Diffusion has it."""
    other = block.upsample or block.downsample or block.skip_time_act or block.dropout.p
    return not other and block.time_embedding_norm == "default" and block.output_scale_factor == 1


def _without_time(self: Any, x: torch.Tensor, temb: None, *args: Any, **kwargs: Any) -> torch.Tensor:
    h = self.conv1(self.nonlinearity(self.norm1(x)))
    h = self.conv2(self.nonlinearity(self.norm2(h)))
    return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class _Upsampling(nn.Conv2d):
    """What nearest x2 and this 3x3 convolution behind it make, by `folded` (gdpo.model.layers.subpixel)."""

    folded: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose2d(x, self.folded, self.bias, stride=2, padding=1)


def keep_and_fold_upsampling(module: nn.Module) -> None:
    """diffusers_patches.fold_upsampling of frozen parts, in place, with the weights that are saved kept beside.

    Fold what is still as precise as its files: sums of weights are rounded once then, as the weights themselves are.
    """
    parts: list[Any] = [part for part in module.modules() if type(part).__name__ == "Upsample2D"]
    for part in parts:
        if part.interpolate and part.norm is None and is_3x3(getattr(part, "conv", None), stride=1, padding=1):
            part.conv.register_buffer("folded", subpixel(part.conv).weight, persistent=False)
            part.conv.__class__, part.interpolate = _Upsampling, False
