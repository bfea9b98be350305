"""A penalty on grids: what a pixel shuffle leaves at fixed places, and a feature distance rewards on flat areas."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gdpo.scores.metrics.artefacts import lattice_peaks

_PERIOD, _BLOCK = 8, 32  # whatever repeats every 2 or 4 pixels repeats every 8
_EPS = 1e-7  # of [-1,1] squared: a 25th of an 8-bit level


def grid_penalty(restored: Tensor, target: Tensor) -> Tensor:
    """RMS of the part of the error that repeats every 8 pixels, averaged over blocks of 32x32 and channels.

    The mean over a block's 16 repeats keeps a grid and averages noise and texture out. The root makes the gradient of
    a faint grid as long as that of a strong one. The same pattern is measured by gdpo.scores.metrics.grid_artefact.

    Args:
        restored, target: [N,3,H,W] in [-1,1], sides of at least 32; what is left of a multiple of 32 is not seen.

    Returns: a scalar >= 0.
    """
    n, c, height, width = restored.shape
    rows, columns, repeats = height // _BLOCK, width // _BLOCK, _BLOCK // _PERIOD
    error = (restored - target)[..., : rows * _BLOCK, : columns * _BLOCK]
    folded = error.reshape(n, c, rows, repeats, _PERIOD, columns, repeats, _PERIOD).mean((3, 6))  # [N,3,rows,8,cols,8]
    folded = folded - folded.mean((3, 5), keepdim=True)
    return (folded.square().mean((3, 5)) + _EPS).sqrt().mean()


def lattice_penalty(restored: Tensor, target: Tensor) -> Tensor:
    """How far the spectrum peaks where a pixel shuffle by 4 peaks, more than the target's does, in nats.

    It sees what grid_penalty does not: faint dots in textures. The spectrum is a mean over the batch, which keeps its
    random part small (gdpo.scores.metrics.lattice_artefact is the same of one picture). Only the peaks have a gradient:
    they are to go down, not their neighbours up.

    Args:
        restored, target: [N,3,H,W] in [-1,1], sides of at least 32.

    Returns: a scalar >= 0.
    """
    peaks, around = (p.mean(0) for p in lattice_peaks(restored * 127.5))
    with torch.no_grad():
        target_peaks, target_around = (p.mean(0) for p in lattice_peaks(target * 127.5))
    return F.relu(peaks - around.detach() - (target_peaks - target_around)).mean()


def spectrum_penalty(restored: Tensor, target: Tensor) -> Tensor:
    """How far the mean log spectrum is from the target's, in nats; what is above it counts three times.

    A feature distance pays for a mesh of dots at periods beside those of lattice_penalty, a pixel loss for blur. Both
    leave the spectrum of the target: the mesh above it, the blur below. The mean over all windows, pictures and
    channels is compared, so that where in a picture the detail lies does not matter.

    Args:
        restored, target: [N,3,H,W] in [-1,1], sides of at least 32.

    Returns: a scalar >= 0.
    """
    difference = _mean_log_power(restored) - _mean_log_power(target).detach()
    return 3 * F.relu(difference).mean() + F.relu(-difference).mean()


def _mean_log_power(x: Tensor) -> Tensor:
    """[N,3,H,W] in [-1,1] -> [32,32] in nats, over windows of 32x32 that lie 16 apart."""
    hann = torch.hann_window(_BLOCK + 2, periodic=False, device=x.device)[1:-1]
    windows = x.float().unfold(2, _BLOCK, _BLOCK // 2).unfold(3, _BLOCK, _BLOCK // 2)
    windows = (windows - windows.mean((-2, -1), keepdim=True)) * (127.5 * hann[:, None] * hann)
    rounding = hann.square().sum().square() / 12  # what rounding to 8 bits leaves at each frequency
    return (torch.fft.fft2(windows).abs().square() + rounding).log().mean((0, 1, 2, 3))
