"""Eager torch on a generator's folder: the definition that the other backends are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from engine.backends import Options, check_inputs
from engine.export import descriptors, geometry_of, profile_of
from engine.manifest import Manifest
from gdpo.generator import OneStepGenerator


def open_generator(folder: Path, options: Options) -> tuple[Manifest, TorchSession]:
    """Load a generator's folder (not an engine folder) with everything an Upscaler needs."""
    generator = OneStepGenerator.from_pretrained(folder)
    return from_generator(generator, options)


def from_generator(generator: OneStepGenerator, options: Options | None = None) -> tuple[Manifest, TorchSession]:
    """The same for a generator in memory, which is used as it is."""
    options = options or Options()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    geometry = geometry_of(generator)
    profile = profile_of(geometry, batch=1, max_batch=64, tile=512, max_tile=4096, static=False)
    (_, entry), *_ = descriptors(generator, "fp32", split=False).values()
    precision = "bf16" if options.bf16 else "fp32"
    manifest = Manifest("torch", torch.__version__, precision, geometry, profile, {"generator": entry})
    return manifest, TorchSession(generator.to(device).eval(), manifest, device, options)


class TorchSession:
    """Encode, predict, decode, as training does."""

    def __init__(self, generator: OneStepGenerator, manifest: Manifest, device: torch.device, options: Options):
        self.generator, self.manifest, self.device, self.bf16 = generator, manifest, device, options.bf16
        if options.threads:
            torch.set_num_threads(options.threads)

    def compile(self) -> None:
        """Compile the UNet and the autoencoder (torch.compile), at the first call of each shape."""
        vae = self.generator.vae
        for part in (self.generator.unet, getattr(vae, "encoder", None), getattr(vae, "decoder", None)):
            if part is not None:
                part.compile(dynamic=False)

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        check_inputs(self.manifest.graphs["generator"], self.manifest, inputs)
        image, noise = (torch.from_numpy(np.ascontiguousarray(inputs[k])).to(self.device) for k in ("image", "noise"))
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            result = self.generator.decode(self.generator.predict(self.generator.encode(image), noise).x0)
        return result.float().cpu().numpy()
