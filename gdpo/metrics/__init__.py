"""Image quality metrics in plain torch: float [N,3,H,W] in [0,1] in, one number per picture [N] out.

Against a reference: psnr_y, ssim_y. Without one: naturalness.
"""

from .fidelity import psnr_y, ssim_y
from .natural_scene import naturalness

__all__ = ["naturalness", "psnr_y", "ssim_y"]
