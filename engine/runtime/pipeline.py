"""The graphs of a folder as one function."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engine.runtime.backends import Session


class Pipeline:
    """All graphs of a folder, one after another, on one batch of tiles.

    Args:
        sessions: "generator", or "encoder", "unet" and "decoder".
    """

    def __init__(self, sessions: Mapping[str, Session]):
        self.sessions = sessions

    def __call__(self, image: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """image [B,3,H,W] in [-1,1], noise [B,C,h,w], float32 -> output like image; the next call may overwrite it."""
        if "generator" in self.sessions:
            return self.sessions["generator"]({"image": image, "noise": noise})
        latent = self.sessions["encoder"]({"image": image})
        return self.sessions["decoder"]({"x0": self.sessions["unet"]({"latent": latent, "noise": noise})})
