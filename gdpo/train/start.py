"""The generator that training starts from: a fresh one by name, or a model folder's."""

from __future__ import annotations

from collections.abc import Callable

from gdpo.generator import OneStepGenerator
from gdpo.model.compact import CompactUNetConfig, rebase, start_from
from gdpo.model.ncnn import load_ncnn
from gdpo.model.tiny import TinyUNetConfig
from gdpo.photos.drawn import small_pictures
from gdpo.train.options import ModelConfig


def starting_generator(model: ModelConfig, seed: int) -> OneStepGenerator:
    """The generator of `model.pretrained`, in the precision of its files, with earlier LoRA weights merged.

    Args:
        seed: of a fresh generator's weights.

    Raises:
        FileNotFoundError, ValueError: naming the file and what was expected in it. ConnectionError: no Hub.
    """
    if model.pretrained in FRESH:
        generator = FRESH[model.pretrained](model, seed).requires_grad_(False)
    else:
        generator = OneStepGenerator.from_pretrained(model.pretrained, model.t_noise, model.t_diffusion).merge_lora()
    if model.prompt is not None and generator.uses_text:
        generator.prompt, generator.prompt_embeds = model.prompt, None
    return generator


def _tiny(model: ModelConfig, seed: int) -> OneStepGenerator:
    shape = TinyUNetConfig(block_out_channels=model.block_out_channels, layers_per_block=model.layers_per_block)
    return OneStepGenerator.tiny(shape, seed=seed, t_noise=model.t_noise, t_diffusion=model.t_diffusion)


def _compact(model: ModelConfig, seed: int) -> OneStepGenerator:
    """The compact network with a published one's weights.

    Raises:
        FileNotFoundError: they have not been fetched; the message names the command that does.
    """
    from gdpo.assets import asset

    generator = OneStepGenerator.tiny(CompactUNetConfig(), t_noise=model.t_noise, t_diffusion=model.t_diffusion)
    layers = load_ncnn(asset("real-esrgan") / "REALESRGAN_ANIMAVIDEOV3_UP4X")
    start_from(generator.unet, layers, a_noise=generator.a_n)
    rebase(generator.unet, small_pictures(16))
    return generator


FRESH: dict[str, Callable[[ModelConfig, int], OneStepGenerator]] = {"tiny": _tiny, "compact": _compact}
