"""Text prompts to embeddings, computed once per distinct prompt by the model folder's own CLIP text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gdpo.model.parts import first_line, load_pretrained

# Training (design of the paper): image tags, and for VSD these two; at inference the positive one follows the tags.
POSITIVE_PROMPT = "clean, high-resolution, 8k"
NEGATIVE_PROMPT = (
    "painting, oil painting, illustration, drawing, art, sketch, cartoon, CG Style, 3D render, unreal engine, "
    "blurring, dirty, messy, worst quality, low quality, frames, watermark, signature, jpeg artifacts, deformed, "
    "lowres, over-smooth"
)
_CACHED = 1024  # of the size that Stable Diffusion 2.1 has, 315 KB each


class PromptEncoder:
    """Caches embeddings of prompts; the text encoder is loaded at the first prompt and can be released."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.device: torch.device | str = "cpu"
        self.dtype = torch.float32
        self._models: tuple | None = None
        self._cache: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> torch.Tensor:
        """prompts (B strings) -> [B,L,D] on `device` in `dtype`."""
        for prompt in dict.fromkeys(prompts):  # those in use become the newest
            self._cache[prompt] = self._cache.pop(prompt) if prompt in self._cache else self._encode(prompt)
        for prompt in list(self._cache)[: -max(_CACHED, len(prompts))]:
            del self._cache[prompt]
        return torch.stack([self._cache[p] for p in prompts]).to(self.device, self.dtype)

    def release(self) -> None:
        """Free the text encoder; the cached embeddings stay."""
        self._models = None

    def _encode(self, prompt: str) -> torch.Tensor:
        if self._models is None:
            from transformers import CLIPTextModel, CLIPTokenizer

            for part in ("tokenizer", "text_encoder"):
                if not (self.folder / part).is_dir():
                    raise FileNotFoundError(
                        f"{self.folder / part}: no such folder, but a prompt must be encoded; use a complete model "
                        "folder or one that was saved with its prompt embedding"
                    )
            self._models = (
                self._tokenizer(CLIPTokenizer),
                load_pretrained(CLIPTextModel, self.folder / "text_encoder").float().eval(),
            )
        tokenizer, encoder = self._models
        ids = tokenizer(
            prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        return encoder(ids)[0][0].float()

    def _tokenizer(self, kind: Any) -> Any:
        try:
            return kind.from_pretrained(str(self.folder / "tokenizer"), local_files_only=True)
        except Exception as error:  # a damaged vocabulary raises a bare Exception
            raise ValueError(
                f"{self.folder / 'tokenizer'}: cannot be loaded ({type(error).__name__}: {first_line(error)})"
            ) from error
