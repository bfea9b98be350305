"""Image quality metrics in plain torch: float [N,3,H,W] in [0,1] in, one number per picture [N] out.

Against a reference: psnr_y, psnr_rgb, ssim_y, and grid_artefact, lattice_artefact and oversharpening (which also
work without one).
Without: niqe, piqe, naturalness, brisque. The VGG16 distance is in gdpo.scores.features.
"""

from gdpo.scores.metrics.artefacts import flat_hatch, grid_artefact, lattice_artefact, oversharpening
from gdpo.scores.metrics.brisque_model import brisque
from gdpo.scores.metrics.fidelity import psnr_rgb, psnr_y, ssim_y
from gdpo.scores.metrics.natural_scene import naturalness
from gdpo.scores.metrics.niqe_model import load_niqe, niqe
from gdpo.scores.metrics.piqe_blocks import piqe

__all__ = [
    "brisque",
    "flat_hatch",
    "grid_artefact",
    "lattice_artefact",
    "load_niqe",
    "naturalness",
    "niqe",
    "oversharpening",
    "piqe",
    "psnr_rgb",
    "psnr_y",
    "ssim_y",
]
