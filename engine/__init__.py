"""The engine: export a generator to ONNX, build it for a backend, upscale pictures with it.

from engine import Upscaler
sr = Upscaler.load().upscale(rgb_uint8_hwc, seed=0)
"""

import os
from typing import TYPE_CHECKING

from engine.io.early import prepare_command

if TYPE_CHECKING:
    from engine.runtime.upscaler import Upscaler

__all__ = ["Upscaler"]
# From 1.29 on ONNX Runtime reports its use to its maker, and keeps an identifier in the user's cache. Not from here.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
prepare_command()


def __getattr__(name: str):
    if name != "Upscaler":
        raise AttributeError(f"module 'engine' has no attribute {name!r}; it has Upscaler")
    from engine.runtime.upscaler import Upscaler

    return Upscaler
