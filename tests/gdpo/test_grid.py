"""The penalty sees a grid, and neither noise, texture nor a wrong colour."""

import pytest
import torch

from gdpo.randomness import normal
from gdpo.train.losses.chroma import chroma_distance
from gdpo.train.losses.grid import grid_penalty, lattice_penalty, spectrum_penalty


def level(x: torch.Tensor) -> float:
    """The penalty of an error, in 8-bit levels."""
    return float(grid_penalty(x, torch.zeros_like(x))) * 127.5


@pytest.mark.parametrize("period", [2, 4, 8])
def test_a_grid_is_measured_by_its_rms(period):
    pattern = normal((1, 3, period, period), 0, "pattern")
    pattern = pattern - pattern.mean((2, 3), keepdim=True)
    pattern = pattern / pattern.square().mean((2, 3), keepdim=True).sqrt()
    grid = pattern.repeat(1, 1, 64 // period, 64 // period) / 127.5
    assert level(grid) == pytest.approx(1, rel=0.01)
    assert float(grid_penalty(grid, grid)) * 127.5 < 0.05


def test_what_is_no_grid_counts_little():
    noise = normal((1, 3, 64, 64), 0, "noise") / 127.5
    assert level(noise) < 0.3  # a sixteenth of its energy
    assert level(torch.full((1, 3, 64, 64), 0.3)) < 0.05
    moved = torch.sin(torch.arange(64) * 2 * torch.pi / 6.4).expand(1, 3, 64, 64) / 127.5  # a texture of another period
    assert level(moved) < 0.3


def test_descent_takes_the_grid_off_and_leaves_the_rest():
    target = normal((2, 3, 70, 64), 1, "target") * 0.3
    grid = normal((1, 3, 4, 4), 1, "grid").repeat(2, 1, 18, 16)[:, :, :70] * 0.02
    restored = (target + grid - grid.mean()).requires_grad_()
    before = grid_penalty(restored, target).detach()
    for _ in range(200):
        (gradient,) = torch.autograd.grad(grid_penalty(restored, target), restored)
        restored = (restored - 2.0 * gradient).detach().requires_grad_()
    assert grid_penalty(restored, target).detach() < 0.3 * before
    assert float((restored - target).detach()[:, :, 64:].abs().max()) > 0.005  # beyond the last block nothing is seen


def dots(strength: float) -> torch.Tensor:
    """[2,3,96,96] of a texture, and dots of period 4 in its left half."""
    pattern = ((torch.arange(96)[:, None] + torch.arange(96)) % 4 < 2).float() - 0.5
    return normal((2, 3, 96, 96), 2, "texture") * 0.1 + strength * pattern * (torch.arange(96) < 48)


def test_the_lattice_penalty_sees_dots_in_a_texture_that_the_grid_penalty_hardly_sees():
    clean, dotted = dots(0), dots(0.02)
    assert float(lattice_penalty(clean, clean)) == 0
    other = dots(0).flip(0).flip(2)  # another texture of the same kind
    assert float(lattice_penalty(dotted, clean)) > 3 * float(lattice_penalty(other, clean))
    assert float(lattice_penalty(dotted, dotted)) == 0


def test_descent_on_the_lattice_penalty_takes_the_dots_off_and_leaves_the_texture():
    clean, restored = dots(0), dots(0.05).requires_grad_()
    before = lattice_penalty(restored, clean).detach()
    for _ in range(150):
        (gradient,) = torch.autograd.grad(lattice_penalty(restored, clean), restored)
        restored = (restored - 0.2 * gradient).detach().requires_grad_()
    assert lattice_penalty(restored, clean).detach() < 0.3 * before
    assert float((restored - clean).detach().square().mean()) < float((dots(0.05) - clean).square().mean())


def test_the_spectrum_tells_a_mesh_and_blur_from_other_detail_of_the_same_kind():
    texture, other = normal((4, 3, 64, 64), 0, "texture") * 0.1, normal((4, 3, 64, 64), 0, "other") * 0.1
    blurred = torch.nn.functional.avg_pool2d(texture, 3, stride=1, padding=1)
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    mesh = texture + 0.1 * torch.cos(2 * torch.pi * x / 4.6) * torch.cos(2 * torch.pi * y / 4.6)
    same, soft, meshed = (float(spectrum_penalty(z, texture)) for z in (other, blurred, mesh))
    assert float(spectrum_penalty(texture, texture)) == 0
    assert same < 0.4 and soft > 3 * same and meshed > 0.1
    restored = blurred.clone().requires_grad_()
    spectrum_penalty(restored, texture).backward()
    assert restored.grad.isfinite().all() and restored.grad.abs().max() > 0


def test_the_chroma_distance_sees_a_tint_and_no_gray():
    torch.manual_seed(0)
    target = torch.rand(2, 3, 32, 32) - 0.5
    assert chroma_distance(target + 0.3 * torch.rand(2, 1, 32, 32), target) < 1e-6
    tint = torch.tensor([0.1, 0.0, 0.0])[:, None, None]  # luma 0.0299: what is left is 0.0701, 0.0299, 0.0299
    assert chroma_distance(target + tint, target) == pytest.approx((0.0701 + 2 * 0.0299) / 3, rel=1e-4)
