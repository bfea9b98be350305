"""The discriminator on VGG features: its verdict in float64, whom its gradients reach, and that it learns."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training import NAOSD, train_here

from gdpo.randomness import normal
from gdpo.train.adversarial import FeatureDiscriminator


def maps(*stream: object, blocks: int = 2) -> list[torch.Tensor]:
    return [normal((3, (64, 128)[i], 8 >> i, 8 >> i), 0, *stream, i) for i in range(blocks)]


def verdict(head: torch.nn.Sequential, feature: torch.Tensor) -> torch.Tensor:
    """The head in float64, written out: unit vectors, unit filters, patches as matrices."""
    x = feature.double()
    x = x / x.square().mean(1, keepdim=True).sqrt()
    for i in (0, 2, 4):
        weight = head[i].weight.detach().double().flatten(1)
        if i < 4:
            weight = weight / weight.norm(dim=1, keepdim=True)
        side = head[i].kernel_size[0]
        patches = torch.nn.functional.unfold(x, side, padding=side // 2)
        x = (weight @ patches + head[i].bias.detach().double()[:, None]).unflatten(2, x.shape[2:])
        x = torch.where(x > 0, x, 0.2 * x) if i < 4 else x
    return x


def test_losses_are_those_of_the_definition():
    judge, restored, photo = FeatureDiscriminator(2, seed=3), maps("restored"), maps("photo")
    gaps = [verdict(h, p) - verdict(h, r) for h, p, r in zip(judge.heads, photo, restored)]
    own = sum(float((1 + (-gap).exp()).log().mean()) for gap in gaps) / 2
    generator = sum(float((1 + gap.exp()).log().mean()) for gap in gaps) / 2
    assert float(judge.loss(restored, photo).detach()) == pytest.approx(own, rel=1e-5)
    assert float(judge.generator_loss(restored, photo)) == pytest.approx(generator, rel=1e-5)
    assert abs(own - generator) > 1e-3, "who is who must matter here"
    assert float(judge.loss(photo, photo).detach()) == pytest.approx(math.log(2), rel=1e-6)


def test_gradients_reach_only_whom_they_are_for():
    judge, photo = FeatureDiscriminator(2, seed=0), maps("photo")
    restored = [f.requires_grad_() for f in maps("restored")]
    judge.generator_loss(restored, photo).backward()
    assert all(f.grad is not None and f.grad.norm() > 0 for f in restored)
    assert all(p.grad is None for p in judge.parameters())
    for f in restored:
        f.grad = None
    judge.loss(restored, photo).backward()
    assert all(f.grad is None for f in restored)
    assert all(p.grad is not None and p.grad.norm() > 0 for p in judge.parameters() if p.ndim > 1)


def test_it_learns_to_tell_and_shows_the_generator_the_way():
    judge = FeatureDiscriminator(2, seed=0)
    optimizer = torch.optim.Adam(judge.parameters(), 1e-2)

    def pair(i: int):
        photo = maps("learn", i)
        return [0.5 * (f + f.roll(1, 3)) for f in photo], photo  # a blurred one

    for i in range(20):
        optimizer.zero_grad()
        judge.loss(*pair(i)).backward()
        optimizer.step()
    restored, photo = pair(1000)
    with torch.no_grad():
        own, before = float(judge.loss(restored, photo)), float(judge.generator_loss(restored, photo))
    assert own < 0.5 < math.log(2) < before
    moved = [f.clone().requires_grad_() for f in restored]
    for _ in range(15):
        gradients = torch.autograd.grad(judge.generator_loss(moved, photo), moved)
        moved = [(f - 0.05 * f.norm() * g / g.norm()).detach().requires_grad_() for f, g in zip(moved, gradients)]
    assert float(judge.generator_loss(moved, photo).detach()) < before - 0.3


def test_a_resumed_run_ends_at_the_same_bytes(crops, tmp_path, monkeypatch):
    weights = tmp_path / "vgg16.safetensors"
    sizes = dict(zip(("0", "2"), ((64, 3, 3, 3), (64, 64, 3, 3))))
    save_file(
        {f"features.{i}.weight": normal(s, 0, "vgg", i) * (2 / (9 * s[1])) ** 0.5 for i, s in sizes.items()}
        | {f"features.{i}.bias": torch.zeros(s[0]) for i, s in sizes.items()},
        weights,
    )
    monkeypatch.setattr("gdpo.assets.asset", lambda name: weights)
    words = [w for w in NAOSD if not w.startswith("--perceptual_weight")]
    words += ["--perceptual=vgg", "--perceptual_weight=0.1", "--perceptual_blocks=1", "--adversarial_weight=0.1"]
    words += [f"--data.folder={crops}", "--train_batch_size=2", "--validation_images=0", "--checkpointing_steps=1"]
    for name, steps in (("straight", (4,)), ("resumed", (2, 4))):
        for n in steps:
            resume = ["--resume_from_checkpoint=auto"]
            train_here(monkeypatch, *words, f"--output_dir={tmp_path / name}", f"--max_train_steps={n}", *resume)
    a, b = (load_file(last(tmp_path / name)) for name in ("straight", "resumed"))
    assert any(k.startswith("discriminator/") for k in a)
    assert all(torch.equal(a[k], b[k]) for k in a)
    model = load_file(tmp_path / "straight" / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert not any("heads" in k for k in model), "the discriminator is no part of the model"


def last(run: Path) -> Path:
    return run / "checkpoint-0000004" / "trainable.safetensors"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--diversity=0.5", "diversity must be 0 with adversarial_weight"),
        ("--perceptual=lpips", "perceptual must be vgg with adversarial_weight"),
        ("--perceptual_weight=0", "perceptual_weight must be above 0"),
        ("--adversarial_weight=-1", "adversarial_weight must be at least 0"),
    ],
)
def test_what_it_cannot_do_is_refused(option, message, crops, tmp_path, monkeypatch, capsys):
    words = [*NAOSD, f"--data.folder={crops}", f"--output_dir={tmp_path / 'run'}", "--num_noises=2"]
    words += ["--perceptual=vgg", "--perceptual_weight=1", "--adversarial_weight=1", option]
    with pytest.raises(ValueError, match=message):
        train_here(monkeypatch, *words)
    assert not (tmp_path / "run").exists()
