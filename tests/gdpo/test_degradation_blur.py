"""Blur kernels against their definitions, and the convolutions against scipy."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from gdpo.degradation import blur as module
from gdpo.degradation.config import KERNEL_KINDS
from gdpo.degradation.draw import KernelDraw
from tests.support.degradation_baseline import kernel_of

DRAWS = [KernelDraw(kind, 15, 1.7, 0.6 if "aniso" in kind else 1.7, 0.4, 1.6) for kind in KERNEL_KINDS]
DRAWS += [KernelDraw("sinc", 15, cutoff=1.2), KernelDraw("sinc", 7, cutoff=math.pi), KernelDraw("iso", 21, 0.2, 0.2)]


@pytest.mark.parametrize("draw", DRAWS, ids=lambda draw: f"{draw.kind}{draw.size}")
def test_kernels_are_normalised_and_follow_their_definition(draw):
    kernel = module.make_kernel(draw)
    assert kernel.shape == (draw.size, draw.size)
    assert kernel.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(kernel, kernel_of(draw), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(kernel, kernel[::-1, ::-1], rtol=1e-12)  # so correlation is convolution


def test_an_anisotropic_gaussian_has_the_drawn_covariance():
    angle, sigma_x, sigma_y = 0.7, 2.2, 1.1
    kernel = module.make_kernel(KernelDraw("aniso", 21, sigma_x, sigma_y, angle))
    y, x = np.mgrid[-10:11, -10:11]
    measured = np.array([[(kernel * a * b).sum() for b in (x, y)] for a in (x, y)])
    long, short = sigma_x**2, sigma_y**2
    c, s = math.cos(angle), math.sin(angle)
    expected = [[long * c * c + short * s * s, (long - short) * c * s], [0, long * s * s + short * c * c]]
    expected[1][0] = expected[0][1]
    np.testing.assert_allclose(measured, expected, rtol=5e-3)


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_generalised_and_plateau_exponents(beta):
    generalised = module.make_kernel(KernelDraw("generalized_iso", 21, 2.0, 2.0, beta=beta))
    plateau = module.make_kernel(KernelDraw("plateau_iso", 21, 2.0, 2.0, beta=beta))
    # Along a row, relative to the centre.
    r = np.arange(11) / 2.0
    np.testing.assert_allclose(generalised[10, 10:] / generalised[10, 10], np.exp(-(r ** (2 * beta)) / 2), atol=1e-12)
    np.testing.assert_allclose(plateau[10, 10:] / plateau[10, 10], 1 / (1 + r ** (2 * beta)), rtol=1e-9)


@pytest.mark.parametrize("cutoff", [0.9, 1.4, 2.0])
def test_a_sinc_filter_passes_below_its_cutoff_and_stops_above(cutoff):
    response = np.abs(np.fft.fft2(module.make_kernel(KernelDraw("sinc", 21, cutoff=cutoff)), (512, 512)))[0, :257]
    frequency = np.arange(257) / 256 * math.pi
    assert np.abs(response[frequency < 0.7 * cutoff] - 1).max() < 0.2
    assert response[(frequency > 1.35 * cutoff) & (frequency < math.pi)].max() < 0.2
    half = frequency[np.argmax(response < 0.5)]
    assert half == pytest.approx(cutoff, abs=0.12)


@pytest.mark.parametrize("size", [(11, 40), (48, 33), (67, 64)])
def test_blur_equals_scipy_and_both_ways_agree(size):
    images = [torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(i)) for i in range(len(DRAWS))]
    images[1] = images[1][..., : size[1] - 3]  # another size, not contiguous
    kernels = [module.make_kernel(draw) for draw in DRAWS]
    each, together = module._blur_each(images, kernels), module._blur_together(images, kernels)
    for image, kernel, one, other in zip(images, kernels, each, together):
        exact = ndimage.convolve(image[0].double().numpy(), kernel[None], mode="mirror")
        np.testing.assert_allclose(one[0].numpy(), exact, atol=2e-6)
        np.testing.assert_allclose(other[0].numpy(), exact, atol=2e-6)


def test_images_without_a_kernel_are_untouched():
    images = [torch.rand(1, 3, 32, 32), torch.rand(1, 3, 40, 36)]
    kept, blurred = module.blur(images, [None, DRAWS[0]])
    assert kept is images[0]
    assert blurred.shape == images[1].shape and (blurred - images[1]).abs().max() > 0.05
