"""A distance of colours alone: a small generator that is taught texture is free to tint it otherwise."""

from __future__ import annotations

from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def chroma_distance(restored: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of what is left of R, G and B when the luma is taken off.

    Args:
        restored, target: [N,3,H,W] in [-1,1].

    Returns: a scalar >= 0, unchanged when gray is added to a picture.
    """
    error = restored - target
    luma = (error * error.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
    return (error - luma).abs().mean()
