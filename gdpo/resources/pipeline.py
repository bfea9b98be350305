"""x4 super-resolution in one step, as a pipeline of diffusers; this file is part of the model folder FOLDER.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
    pipe(image, generator=torch.manual_seed(0)).images[0].save("out.png")

The LoRA of a folder that has one: pipe.load_lora_weights(FOLDER). It needs torch and diffusers alone.
"""

# mypy: ignore-errors
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput, StableDiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

T_NOISE, T_DIFFUSION, VAE_LORA, PROMPT = 250, 100, False, "clean, high-resolution, 8k"
SCALE = 4


class OneStepUpscalePipeline(StableDiffusionPipeline):
    """LR, enlarged by bicubic -> latents -> noise of T_NOISE -> one UNet call at T_DIFFUSION -> picture."""

    @torch.no_grad()
    def __call__(
        self,
        image,
        generator: torch.Generator | list[torch.Generator] | None = None,
        *,
        prompt: str = PROMPT,
        prompt_embeds: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        color: str = "wavelet",
        output_type: str = "pil",
        return_dict: bool = True,
    ):
        """Enlarge pictures.

        Args:
            image: a PIL picture or a list of them of one size; an array [H,W,3] or [B,H,W,3], uint8 or in [0,1]; or a
                tensor [B,3,H,W] in [0,1].
            generator: of the noise.
            prompt: the text that the model is conditioned on.
            prompt_embeds: [1,L,D] in its place, for a folder without a text encoder.
            noise: [B,4,h,w], instead of a draw of the generator.
            color: "wavelet" gives the low frequencies of the input, "none" leaves the colours as they are.
            output_type: "pil", "np" ([B,4H,4W,3] in [0,1]) or "pt" ([B,3,4H,4W] in [0,1]).
            return_dict: an object with .images; else a tuple of them.
        """
        if color not in ("wavelet", "none"):
            raise ValueError(f"color must be wavelet or none; got {color!r}")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be pil, np or pt; got {output_type!r}")
        if VAE_LORA:
            raise ValueError("this folder's VAE has a LoRA that diffusers does not load: python -m gdpo.merge it first")
        device, dtype = self._execution_device, self.unet.dtype
        lr = _tensor(image).to(device)
        height, width = (SCALE * side for side in lr.shape[2:])
        large = F.interpolate(lr, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
        multiple = self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        padded = _mirrored(large, [-(-side // multiple) * multiple for side in (height, width)])

        latents = self.vae.encode((2 * padded - 1).to(dtype))
        latents = latents.latent_dist.mode() if hasattr(latents, "latent_dist") else latents.latents
        latents = latents * self.vae.config.scaling_factor
        if noise is None:
            noise = randn_tensor(latents.shape, generator, device, dtype)
        if prompt_embeds is None:
            if self.text_encoder is None:
                raise ValueError(
                    "this folder has no text encoder: pass prompt_embeds (prompt_embeds.safetensors in it)"
                )
            prompt_embeds, _ = self.encode_prompt(prompt, device, 1, False)
        text = prompt_embeds.to(device, dtype).expand(len(latents), -1, -1)
        a = self.scheduler.alphas_cumprod.double()
        a_n, a_d = 1.0 if T_NOISE < 0 else float(a[T_NOISE]), float(a[T_DIFFUSION])
        noisy = a_n**0.5 * latents + (1 - a_n) ** 0.5 * noise.to(device, dtype)
        predicted = self.unet(noisy, torch.tensor([T_DIFFUSION], device=device), encoder_hidden_states=text).sample
        x0 = (noisy - (1 - a_d) ** 0.5 * predicted) / a_d**0.5
        pictures = self.vae.decode(x0 / self.vae.config.scaling_factor).sample.float().clamp(-1, 1) / 2 + 0.5
        pictures = pictures[:, :, :height, :width]
        if color == "wavelet":
            pictures = (pictures + _lowpass(large - pictures)).clamp(0, 1)
        if output_type != "pt":
            pictures = pictures.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            pictures = [Image.fromarray(np.uint8(picture * 255 + 0.5)) for picture in pictures]
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)


def _tensor(image) -> torch.Tensor:
    """Pictures as [B,3,H,W] float32 in [0,1]."""
    if isinstance(image, torch.Tensor):
        found = image.float()
    else:
        if isinstance(image, Image.Image):
            image = [image]
        if isinstance(image, (list, tuple)):
            image = np.stack([np.asarray(i.convert("RGB") if isinstance(i, Image.Image) else i) for i in image])
        array = np.asarray(image)
        array = array[None] if array.ndim == 3 else array
        scale = 255 if array.dtype == np.uint8 else 1
        found = torch.from_numpy(np.moveaxis(array.astype(np.float32) / scale, -1, 1).copy())
    if found.ndim != 4 or found.shape[1] != 3 or not found.numel():
        raise ValueError(f"image must be pictures of three colours; got {tuple(found.shape)} as [B,3,H,W]")
    return found


def _mirrored(x: torch.Tensor, size: list[int]) -> torch.Tensor:
    """Padded at the right and the bottom by its own mirror image, again and again where that is too short."""
    for axis, (new, old) in enumerate(zip(size, x.shape[2:]), 2):
        index = torch.arange(new, device=x.device) % (2 * old)
        x = x.index_select(axis, torch.minimum(index, 2 * old - 1 - index))
    return x


def _lowpass(x: torch.Tensor) -> torch.Tensor:
    """Five a-trous passes of [1 2 1]/4 along rows and columns, edges replicated."""
    for dilation in (1, 2, 4, 8, 16):
        for axis in (2, 3):
            index = torch.arange(x.shape[axis], device=x.device)
            before, after = (index - dilation).clamp(min=0), (index + dilation).clamp(max=len(index) - 1)
            x = x / 2 + (x.index_select(axis, before) + x.index_select(axis, after)) / 4
    return x
