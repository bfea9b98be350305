"""A distance of colours alone: a small generator that is taught texture is free to tint it otherwise."""

from __future__ import annotations

from torch import Tensor

from gdpo.scores.luma import BT601, weighted


def chroma_distance(restored: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of what is left of R, G and B when the luma is taken off.

    Args:
        restored, target: [N,3,H,W] in [-1,1].

    Returns: a scalar >= 0, unchanged when gray is added to a picture.
    """
    error = restored - target
    return (error - weighted(error, BT601)[:, None]).abs().mean()
