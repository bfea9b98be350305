"""The second-order degradation one image at a time, in numpy and OpenCV as a dataset's worker usually has it.

It does what `gdpo.degradation` does, from the same drawn parameters, and shares no other code with it: kernels,
resizes, noise and JPEG are its own. So it is the baseline of the benchmark and an independent check in the tests. It
differs in numpy's generator for the noise, and in OpenCV's area filter, which weighs the pixels at a cell's border by
their covered share, where torch takes them whole.
"""

from __future__ import annotations

import cv2
import numpy as np
from scipy import special

from gdpo.degradation.draw import KernelDraw, NoiseDraw, SampleDraw

_MODES = {"area": cv2.INTER_AREA, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


def degrade_one(
    hr: np.ndarray, draw: SampleDraw, rng: np.random.Generator, scale: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """(lr, lr_up) of one crop, fp32 [H,W,3] in [0,1] each."""
    height, width = hr.shape[:2]
    small = height // scale, width // scale
    image = hr
    for number, step in enumerate(draw.passes):
        last = number == len(draw.passes) - 1
        if step.kernel:
            image = _blur(image, step.kernel)
        base = small if last else (height, width)
        image = _resize(image, (int(base[0] * step.scale), int(base[1] * step.scale)), step.resize_mode)
        image = np.clip(image + _noise(image, step.noise, rng), 0, 1)
        if not last:
            image = _jpeg(image, step.quality)
    quality = draw.passes[-1].quality
    if not draw.jpeg_last:
        image = _jpeg(image, quality)
    image = _resize(image, small, draw.final_mode)
    if draw.final_sinc:
        image = _blur(image, draw.final_sinc)
    if draw.jpeg_last:
        image = _jpeg(image, quality)
    lr = np.float32(np.clip((image * 255).round(), 0, 255) / 255)
    return lr, np.clip(_resize(lr, (height, width), draw.upsample_mode), 0, 1)


def kernel_of(draw: KernelDraw) -> np.ndarray:
    """A blur kernel of the drawn size, float64 [size,size], by the definitions' matrices."""
    axis = np.arange(draw.size) - draw.size // 2
    x, y = np.meshgrid(axis, axis)
    if draw.kind == "sinc":
        r = np.sqrt(x**2 + y**2)
        with np.errstate(invalid="ignore", divide="ignore"):
            kernel = draw.cutoff * special.j1(draw.cutoff * r) / (2 * np.pi * r)
        kernel[draw.size // 2, draw.size // 2] = draw.cutoff**2 / (4 * np.pi)
        return kernel / kernel.sum()
    turn = np.array([[np.cos(draw.angle), -np.sin(draw.angle)], [np.sin(draw.angle), np.cos(draw.angle)]])
    covariance = turn @ np.diag([draw.sigma_x**2, draw.sigma_y**2]) @ turn.T
    grid = np.stack((x, y), -1)
    q = np.einsum("hwi,ij,hwj->hw", grid, np.linalg.inv(covariance), grid) ** draw.beta
    kernel = 1 / (q + 1) if "plateau" in draw.kind else np.exp(-0.5 * q)
    return kernel / kernel.sum()


def _blur(image: np.ndarray, draw: KernelDraw) -> np.ndarray:
    return cv2.filter2D(image, -1, kernel_of(draw), borderType=cv2.BORDER_REFLECT_101)


def _resize(image: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    if image.shape[:2] == size:
        return image
    return cv2.resize(image, size[::-1], interpolation=_MODES[mode])


def _noise(image: np.ndarray, draw: NoiseDraw, rng: np.random.Generator) -> np.ndarray:
    shape = image.shape[:2] + (1 if draw.gray else 3,)
    if draw.kind == "gaussian":
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(draw.strength / 255)
    levels = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] if draw.gray else image
    levels = np.clip((levels * 255).round(), 0, 255) / 255
    values = 2 ** np.ceil(np.log2(len(np.unique(levels))))
    return np.float32((rng.poisson(levels * values) / values - levels) * draw.strength)


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    pixels = np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)
    _, stream = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.cvtColor(cv2.imdecode(stream, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    return np.float32(decoded) / np.float32(255)
