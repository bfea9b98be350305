"""The invariants of training, through the real command line: each pair of runs must end at the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import GDPO, NAOSD, train


def weights(run: Path) -> dict[str, torch.Tensor]:
    """All weights of a run's model by folder and name."""
    found = {}
    for file in sorted((run / "model").rglob("*.safetensors")):
        found |= {f"{file.parent.name}/{k}": v.double() for k, v in load_file(file).items()}
    return found


def distance(a: dict, b: dict) -> float:
    """Relative L2 between two sets of weights."""
    assert a.keys() == b.keys()
    apart = sum(float((a[k] - b[k]).square().sum()) for k in a)
    return (apart / sum(float(v.square().sum()) for v in a.values())) ** 0.5


@pytest.fixture(scope="module", params=["naosd", "gdpo"])
def method(request, crops, trained) -> list[str]:
    data = f"--data.folder={crops}"
    return [*NAOSD, data] if request.param == "naosd" else [*GDPO, data, f"--model.pretrained={trained}"]


@pytest.fixture(scope="module")
def straight(method, tmp_path_factory) -> Path:
    """Four steps of four samples, in one go."""
    out = tmp_path_factory.mktemp("straight") / "run"
    train(*method, f"--output_dir={out}", "--max_train_steps=4", "--train_batch_size=4")
    return out


def test_training_moves_the_weights_and_the_seed_matters(method, straight, tmp_path):
    train(*method, f"--output_dir={tmp_path / 'other'}", "--max_train_steps=4", "--train_batch_size=4", "--seed=1")
    assert distance(weights(straight), weights(tmp_path / "other")) > 1e-4


def test_resume_equals_straight_run(method, straight, tmp_path):
    out = tmp_path / "run"
    common = (*method, f"--output_dir={out}", "--train_batch_size=4", "--checkpointing_steps=1")
    train(*common, "--max_train_steps=2")
    done = train(*common, "--max_train_steps=4", "--resume_from_checkpoint=latest")
    assert "resumed from" in done.stderr and "checkpoint-0000002" in done.stderr
    a, b = weights(straight), weights(out)
    assert all(torch.equal(a[k], b[k]) for k in a), "a resumed run must end at the same bytes"


def test_accumulating_four_by_one_equals_one_by_four(method, straight, tmp_path):
    out = tmp_path / "run"
    train(
        *method, f"--output_dir={out}", "--max_train_steps=4", "--train_batch_size=1", "--gradient_accumulation_steps=4"
    )  # fmt: skip
    assert distance(weights(straight), weights(out)) < 2e-5


def test_two_processes_equal_one(method, straight, tmp_path):
    out = tmp_path / "run"
    train(*method, f"--output_dir={out}", "--max_train_steps=4", "--train_batch_size=2", processes=2)
    assert distance(weights(straight), weights(out)) < 2e-5


def test_fused_kernels_equal_reference_over_20_steps(crops, trained, tmp_path):
    # The interpreter takes about a second for the patches of a picture: a small picture, a small group.
    small = ("--data.crop_size=48", "--num_generations=2", "--reward_funcs=[psnr_y,region_detail]")
    common = (*GDPO, *small, f"--data.folder={crops}", f"--model.pretrained={trained}", "--max_train_steps=20")
    for backend, extra in (("torch", {}), ("triton", {"TRITON_INTERPRET": "1"})):
        train(*common, f"--output_dir={tmp_path / backend}", f"--backend={backend}", **extra)
    assert distance(weights(tmp_path / "torch"), weights(tmp_path / "triton")) < 2e-5
