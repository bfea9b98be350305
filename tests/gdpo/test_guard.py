"""The guard: what a limit means, what the best checkpoint is, and a reward that likes a grid, stopped."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gdpo.generator import OneStepGenerator
from gdpo.train import checkpoint as checkpoints
from gdpo.train.guard import Limit, judge
from tests.support.training import GDPO, NAOSD, train, train_here


@pytest.mark.parametrize(
    ("name", "allowed", "inside", "outside"),
    [
        ("psnr_y", -0.3, 29.71, 29.69),  # of a start at 30
        ("psnr_y", "-1%", 29.71, 29.69),
        ("lattice_artefact", "+10%", 32.9, 33.1),
        ("brisque", 2, 31.9, 32.1),
    ],
)
def test_a_limit_is_a_change_for_the_worse(name, allowed, inside, outside):
    limit = Limit.of(name, allowed)
    assert limit.broken(inside, 30.0, "start") is None
    line = limit.broken(outside, 30.0, "start")
    assert line and name in line and "from 30 (start)" in line
    better = 30 + (30 - outside)
    assert limit.broken(better, 30.0, "start") is None
    assert Limit.of(name, "log").broken(-1e9, 30.0, "start") is None


def test_ten_percent_of_a_negative_score_is_counted_from_its_size():
    limit = Limit.of("naturalness", "-10%")
    assert limit.broken(-2.19, -2.0, "start") is None and limit.broken(-2.21, -2.0, "start")


@pytest.mark.parametrize("wrong", [0.3, "+5%", "much", float("nan"), 0])
def test_a_limit_that_is_none_is_named(wrong):
    with pytest.raises(ValueError, match=r"guard\.psnr_y must be a change for the worse, such as -0\.3, -10% or log"):
        Limit.of("psnr_y", wrong)


def rows(*values: float, name: str = "psnr_y") -> list[dict]:
    return [{"step": 10 * i, f"guard/{name}": v} for i, v in enumerate(values)] + [{"step": 5, "loss": 1.0}]


def test_the_best_is_the_last_within_the_limits_or_the_one_with_the_best_value():
    limits = [Limit.of("psnr_y", -0.3)]
    assert judge(rows(30, 30.5, 29.8, 29.6), limits, "start", "last").best == 20
    assert judge(rows(30, 30.5, 29.8, 29.6), limits, "start", "psnr_y").best == 10
    assert judge(rows(30, 29), limits, "start", "last").best == 0
    assert judge(rows(30, 29), limits, "start", "last").broken
    assert not judge(rows(30, 29, 30), limits, "start", "last").broken, "the last evaluation counts"


def test_from_the_best_a_rise_tightens_the_limit():
    limits = [Limit.of("psnr_y", -0.3)]
    assert judge(rows(20, 28, 27.8, 27.6), limits, "best", "last").best == 20
    assert judge(rows(20, 28, 27.8, 27.6), limits, "start", "last").best == 30


CHEAT = """
import torch
def grid(samples, target):
    x = samples.mean(1)
    pattern = torch.tensor([1.0, -1.0]).repeat(x.shape[2] // 2)
    return (x * pattern * pattern[:, None]).mean((1, 2)).abs()
grid.kind = "perceptual"
"""
SHORT = ("--max_train_steps=40", "--train_batch_size=2", "--checkpointing_steps=40", "--validation_images=0")
GUARD = ("--guard={grid_artefact: +10%, lattice_artefact: log}", "--guard_steps=2", "--guard_images=2")


def evaluations(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if "guard/grid_artefact" in row]


def test_a_reward_that_likes_a_grid_is_stopped_and_the_model_is_the_one_before(
    crops, trained, tmp_path, monkeypatch, capfd
):
    (tmp_path / "cheat.py").write_text(CHEAT)
    monkeypatch.syspath_prepend(tmp_path)
    run = tmp_path / "run"
    common = [*GDPO, f"--data.folder={crops}", f"--model.pretrained={trained}", f"--output_dir={run}", *SHORT, *GUARD]
    common += ["--reward_funcs=[cheat:grid]", "--learning_rate=5e-3", "--rho=0", "--shared_noise=true"]
    train_here(monkeypatch, *common)
    said = capfd.readouterr().err
    seen = evaluations(run)
    values = [row["guard/grid_artefact"] for row in seen]
    onset = next(i for i, v in enumerate(values) if v > values[0] * 1.02)  # the grid has begun to show
    stopped = seen[-1]["step"]
    assert values[-1] > 1.1 * values[0] and max(values[:-1]) <= 1.1 * values[0]
    assert stopped < 40 and len(values) - 1 - onset <= 2, "stopped within two evaluations"
    assert seen[-1]["drift/pixels"] > 0 == seen[0]["drift/pixels"]
    best = run / "best" / f"checkpoint-{seen[-2]['step']:07d}"
    assert [p.name for p in (run / "best").iterdir()] == [best.name] and f"the best checkpoint is {best}" in said
    assert "the limit is +10%" in said

    # The model is the best checkpoint's.
    lora = load_file(run / "model" / "unet_lora" / "adapter_model.safetensors")
    kept = checkpoints.load(best).tensors["trainable"]
    for name, value in kept.items():
        bare = name.removeprefix("policy/").replace(".default", "")
        assert torch.equal(next(v for k, v in lora.items() if k.endswith(bare)), value)
    OneStepGenerator.from_pretrained(run / "model")

    # Run again, it looks again and ends again at the same place; the best checkpoint stays.
    model = {p: p.read_bytes() for p in (run / "model").rglob("*.safetensors")}
    train_here(monkeypatch, *common, "--resume_from_checkpoint=latest")
    assert evaluations(run) == seen and best.is_dir() and all(p.read_bytes() == b for p, b in model.items())


@pytest.mark.slow
def test_two_processes_with_a_guard_and_a_remote_reward_stop_where_one_does(crops, trained, tmp_path):
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    from tests.gdpo.test_remote_rewards import serving

    (tmp_path / "cheat.py").write_text(CHEAT)
    common = [*GDPO, f"--data.folder={crops}", f"--model.pretrained={trained}", *SHORT, *GUARD, "--learning_rate=5e-3"]
    common += ["--rho=0", "--shared_noise=true", "--reward_weights=[1,0.05]"]
    with serving("naturalness") as url:
        common.append(f"--reward_funcs=[cheat:grid,'{url}/naturalness']")
        for processes in (1, 2):
            more = [f"--train_batch_size={2 // processes}", f"--output_dir={tmp_path / str(processes)}"]
            train(*common, *more, processes=processes, PYTHONPATH=str(tmp_path))
    one, two = (evaluations(tmp_path / name) for name in "12")
    assert 0 < one[-1]["step"] == two[-1]["step"] < 40, "the guard ended both"
    for a, b in zip(one, two, strict=True):  # steps this long make more of rounding: up to 2e-3, by CPU
        assert a == pytest.approx(b, rel=5e-3, abs=1e-6)
    assert [p.name for p in (tmp_path / "1" / "best").iterdir()] == [
        p.name for p in (tmp_path / "2" / "best").iterdir()
    ]
    a, b = (load_file(tmp_path / name / "model" / "unet_lora" / "adapter_model.safetensors") for name in "12")
    apart = sum(float((a[k].double() - b[k]).square().sum()) for k in a) ** 0.5
    assert apart < 3e-3 * sum(float(v.double().square().sum()) for v in a.values()) ** 0.5


def test_naosd_logs_held_out_scores_with_each_sheet_and_takes_a_guard(crops, tmp_path, monkeypatch):
    run = tmp_path / "run"
    common = [*NAOSD, f"--data.folder={crops}", f"--output_dir={run}", "--max_train_steps=4", "--validation_steps=2"]
    train_here(monkeypatch, *common, "--guard={psnr_y: -3}", "--guard_action=keep_best", "--guard_best=psnr_y")
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    sheets = [row for row in found if "heldout/psnr_y" in row]
    assert [row["step"] for row in sheets] == [2, 4]
    assert {k for k in sheets[0] if k.startswith("heldout/")} == {
        f"heldout/{name}" for name in ("psnr_y", "ssim_y", "grid_artefact", "lattice_artefact")
    }
    values = {row["step"]: row["guard/psnr_y"] for row in found if "guard/psnr_y" in row}
    assert list(values) == [0, 2, 4]
    (best,) = (run / "best").iterdir()
    assert int(best.name.removeprefix("checkpoint-")) == max(values, key=lambda step: (values[step], step))
