"""The complexity map as it is usually written: OpenCV and numpy, one patch after the other.

The baseline of `attribute_ratios`, and an independent computation of the same definition for its tests.
"""

from __future__ import annotations

import cv2
import numpy as np


def patch_complexity(patch: np.ndarray) -> float:
    """Entropy of the Sobel magnitudes of one float32 patch [h,w] in [0,1], times its area."""
    resized = cv2.resize(patch, (64, 64), interpolation=cv2.INTER_LINEAR)
    dx = cv2.Sobel(resized, cv2.CV_32F, 1, 0, ksize=3, borderType=cv2.BORDER_REPLICATE)
    dy = cv2.Sobel(resized, cv2.CV_32F, 0, 1, ksize=3, borderType=cv2.BORDER_REPLICATE)
    histogram = cv2.calcHist([cv2.magnitude(dx, dy)], [0], None, [512], [-5.5, 5.5]).ravel()
    p = histogram / (histogram.sum() + 1e-5)
    return float(-(p * np.log2(p + 1e-10)).sum()) * patch.size


def complexity_map(gray: np.ndarray, patch_size: int = 10) -> np.ndarray:
    """[H,W] float32 in [0,1] -> [H,W] float32."""
    out = np.empty_like(gray)
    for y in range(0, gray.shape[0], patch_size):
        for x in range(0, gray.shape[1], patch_size):
            patch = gray[y : y + patch_size, x : x + patch_size]
            out[y : y + patch_size, x : x + patch_size] = patch_complexity(patch)
    return out


def attribute_ratios(
    gray: np.ndarray, patch_size: int = 10, threshold: float = 50.0
) -> tuple[float, float, np.ndarray]:
    """Shares of smooth and textured area, rounded to hundredths, and the texture mask."""
    mask = complexity_map(gray, patch_size) > threshold
    return round(1 - mask.mean(), 2), round(mask.mean(), 2), mask
