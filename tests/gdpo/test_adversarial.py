"""The discriminator of NAOSD: what it learns, whom its losses move, and that a checkpoint keeps it."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from gdpo.train.losses.adversarial import Discriminator, SpectralConv2d
from tests.support.training import NAOSD, train_here

OWN = ("--adversarial_weight=0.1", "--train_batch_size=2", "--validation_images=0", "--checkpointing_steps=2")


def test_it_tells_blurred_from_sharp_and_the_generator_is_pushed_to_the_sharp():
    rng = torch.Generator().manual_seed(1)
    judge = Discriminator(seed=0, width=8)
    optimiser = torch.optim.Adam(judge.parameters(), lr=2e-3)

    def pictures() -> tuple[torch.Tensor, torch.Tensor]:
        sharp = torch.rand(4, 3, 32, 32, generator=rng) * 2 - 1
        return torch.nn.functional.avg_pool2d(sharp, 3, 1, 1), sharp

    for _ in range(60):
        optimiser.zero_grad()
        judge.own_loss(*pictures()).backward()
        optimiser.step()
    blurred, sharp = pictures()
    assert judge(sharp).mean() > judge(blurred).mean() + 1
    assert judge.own_loss(blurred, sharp) < 1 < 2 < judge.own_loss(sharp, blurred)
    towards = blurred.clone().requires_grad_()
    judge.generator_loss(towards).backward()
    moved = blurred - 0.5 * towards.grad / towards.grad.abs().amax()
    assert judge.generator_loss(moved) < judge.generator_loss(blurred)


def test_each_loss_moves_its_own_side_alone():
    judge = Discriminator(seed=0, width=4)
    restored = torch.rand(1, 3, 16, 16, requires_grad=True)
    judge.own_loss(restored, torch.rand(1, 3, 16, 16)).backward()
    assert restored.grad is None and all(p.grad is not None for p in judge.parameters())
    judge.zero_grad()
    judge.generator_loss(restored).backward()
    assert restored.grad is not None and all(p.grad is None for p in judge.parameters())
    assert all(p.requires_grad for p in judge.parameters())


def test_a_convolution_has_a_largest_singular_value_of_one():
    conv = SpectralConv2d(5, 7, 1, bias=False)
    with torch.no_grad():
        conv.weight.mul_(100)
        matrix = conv(torch.eye(5)[:, :, None, None])[:, :, 0, 0]
    assert torch.allclose(torch.linalg.matrix_norm(matrix, 2), torch.tensor(1.0), atol=1e-5)


def test_a_resumed_run_ends_at_the_same_bytes(crops, tmp_path, monkeypatch):
    common = (*NAOSD, *OWN, f"--data.folder={crops}")
    for run, stops in (("straight", [4]), ("resumed", [2, 4])):
        for steps in stops:
            more = (f"--max_train_steps={steps}", "--resume_from_checkpoint=auto")
            train_here(monkeypatch, *common, *more, f"--output_dir={tmp_path / run}")
    a, b = (
        load_file(tmp_path / run / "checkpoint-0000004" / "trainable.safetensors") for run in ("straight", "resumed")
    )
    of_judge = [name for name in a if name.startswith("discriminator/")]
    assert of_judge and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    fresh = dict(Discriminator(seed=0).named_parameters())
    assert any(not torch.equal(a[name], fresh[name.removeprefix("discriminator/")]) for name in of_judge)
