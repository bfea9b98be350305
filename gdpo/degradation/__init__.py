"""Degradation of HR crops to LR inputs (design: second-order Real-ESRGAN and milder presets)."""

from gdpo.degradation.config import DegradationConfig, Pass
from gdpo.degradation.pipeline import Degradation

__all__ = ["Degradation", "DegradationConfig", "Pass"]
