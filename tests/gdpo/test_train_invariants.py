"""The invariants of training, through the real command line: each pair of runs must end at the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

from gdpo.generator import OneStepGenerator
from gdpo.model import tiny
from gdpo.model.tiny import TinyUNetConfig
from gdpo.train.record import Record
from gdpo.train.state import State
from tests.support.training import GDPO, NAOSD, train, train_here


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


@pytest.mark.parametrize(
    ("method", "torchrun"),
    [pytest.param("naosd", True, marks=pytest.mark.slow), ("gdpo", False)],
    indirect=["method"],
    ids=["naosd-torchrun", "gdpo"],
)
def test_two_processes_equal_one(method, torchrun, straight, tmp_path):
    out = tmp_path / "run"
    lengths = ("--max_train_steps=4", "--train_batch_size=2")
    train(*method, f"--output_dir={out}", *lengths, processes=2, torchrun=torchrun)
    assert distance(weights(straight), weights(out)) < 2e-5


@pytest.mark.parametrize("steps", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_fused_kernels_equal_reference(steps, crops, trained, tmp_path):
    # The interpreter takes about a second for the patches of a picture: a small picture, a small group.
    small = ("--data.crop_size=48", "--num_generations=2", "--reward_funcs=[psnr_y,region_detail]")
    small += ("--validation_images=0",)
    common = (*GDPO, *small, f"--data.folder={crops}", f"--model.pretrained={trained}", f"--max_train_steps={steps}")
    for backend, extra in (("torch", {}), ("triton", {"TRITON_INTERPRET": "1"})):
        train(*common, f"--output_dir={tmp_path / backend}", f"--backend={backend}", **extra)
    assert distance(weights(tmp_path / "torch"), weights(tmp_path / "triton")) < 2e-5


SHORT = ("--max_train_steps=6", "--checkpointing_steps=1", "--checkpoints_total_limit=9", "--validation_images=0")


def cut_after(run: Path, step: int) -> None:
    """Leave what a run would have left that was killed after this step."""
    shutil.rmtree(run / "model")
    for folder in sorted(run.glob("checkpoint-*"))[step:]:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant", [1 / 2, 1, 1, 1, 1, 1]),
        ("linear", [1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", [1 / 2, 1, 1, (1 + 0.5**0.5) / 2, 1 / 2, (1 - 0.5**0.5) / 2]),
    ],
)
def test_learning_rate_after_warmup_also_when_resumed(scheduler, expected, crops, tmp_path, monkeypatch):
    out = tmp_path / "run"
    common = (*NAOSD, *SHORT, f"--data.folder={crops}", f"--output_dir={out}", f"--lr_scheduler={scheduler}")
    for resume in ((), ("--resume_from_checkpoint=latest",)):
        train_here(monkeypatch, *common, "--lr_warmup_steps=2", "--learning_rate=4e-3", *resume)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [r["learning_rate"] / 4e-3 for r in rows] == pytest.approx(expected, rel=1e-12)
        assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
        cut_after(out, 3)


def test_average_of_the_weights_also_when_resumed(crops, tmp_path, monkeypatch):
    out, decay = tmp_path / "run", 0.15  # the young average's decay, (1 + n) / (10 + n), passes it on the way
    common = (*NAOSD, *SHORT, f"--data.folder={crops}", f"--output_dir={out}", f"--ema_decay={decay}")
    train_here(monkeypatch, *common)
    straight, start = (
        weights(out),
        OneStepGenerator.tiny(TinyUNetConfig(block_out_channels=(8, 16), layers_per_block=1)),
    )
    average = {k: p.detach().double() for k, p in start.unet.named_parameters()}
    for step in range(6):
        trained = load_file(out / f"checkpoint-{step + 1:07d}" / "trainable.safetensors")
        kept = min(decay, (1 + step) / (10 + step))
        average = {k: kept * v + (1 - kept) * trained[f"generator/unet.{k}"].double() for k, v in average.items()}
    average = {f"unet/{k}": v for k, v in average.items()}
    last = {f"unet/{k.removeprefix('generator/unet.')}": v.double() for k, v in trained.items()}
    assert distance(straight, average) < 1e-6 < 1e-4 < distance(straight, last), "the model saved is the average"

    cut_after(out, 3)
    train_here(monkeypatch, *common, "--resume_from_checkpoint=latest")
    again = weights(out)
    assert all(torch.equal(v, again[k]) for k, v in straight.items())


def test_gradient_checkpointing_changes_no_weight(crops, tmp_path, monkeypatch):
    recomputed = []
    monkeypatch.setattr(tiny, "checkpoint", lambda *a, **k: recomputed.append(a) or checkpoint(*a, **k))
    common = (*NAOSD, *SHORT, f"--data.folder={crops}")
    train_here(monkeypatch, *common, f"--output_dir={tmp_path / 'plain'}")
    assert not recomputed
    train_here(monkeypatch, *common, f"--output_dir={tmp_path / 'saving'}", "--model.gradient_checkpointing=true")
    assert recomputed
    a, b = weights(tmp_path / "plain"), weights(tmp_path / "saving")
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_sheets_and_their_rows_come_once_also_when_resumed(crops, trained, tmp_path, monkeypatch):
    """Stopped at a step with a sheet, and run again when it was finished: as if never stopped."""
    common = [*GDPO, f"--model.pretrained={trained}", f"--data.folder={crops}", "--validation_steps=2", *SHORT[1:3]]
    common += ["--validation_images=1"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"

    def rows(out: Path) -> list[dict]:
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k != "step_time"} for row in lines]

    def sheets(out: Path) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (out / "sheets").iterdir()}

    train_here(monkeypatch, *common, f"--output_dir={straight}", "--max_train_steps=5")
    assert [r["step"] for r in rows(straight) if "gain/reward" in r] == [2, 4, 5]

    class Killed(Exception):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):  # between the checkpoint and the sheet of step 2
        patch.setattr(Record, "sheet", killed)
        train_here(monkeypatch, *common, f"--output_dir={stopped}", "--max_train_steps=5")
    assert [r["step"] for r in rows(stopped)] == [1, 2] and not (stopped / "sheets").exists()
    for _ in range(2):
        train_here(
            monkeypatch, *common, f"--output_dir={stopped}", "--max_train_steps=5", "--resume_from_checkpoint=latest"
        )
        assert rows(stopped) == rows(straight) and sheets(stopped) == sheets(straight)


def test_half_precision_leaves_the_base_as_it_was_read(crops, trained, tmp_path, monkeypatch):
    """Strength 0 of the knob is the model before GDPO, to the bit."""
    out = tmp_path / "run"
    common = (*GDPO, *SHORT, f"--data.folder={crops}", f"--model.pretrained={trained}", f"--output_dir={out}")
    train_here(monkeypatch, *common, "--max_train_steps=2", "--mixed_precision=bf16")
    before, after = (load_file(m / "unet" / "diffusion_pytorch_model.safetensors") for m in (trained, out / "model"))
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())
    assert any((v.bfloat16().float() != v).any() for v in before.values()), "else bf16 could not be seen"
    lora = load_file(out / "model" / "unet_lora" / "adapter_model.safetensors")
    saved = load_file(out / "checkpoint-0000002" / "trainable.safetensors")
    assert len(lora) == len(saved) and max(float(v.abs().max()) for k, v in lora.items() if "lora_B" in k) > 0


def test_a_base_that_changes_while_a_run_trains_on_it_is_noticed(crops, trained, tmp_path, monkeypatch):
    """Its LoRA would be saved on weights that it never saw."""
    base, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(trained, base)
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    common = (*GDPO, *SHORT, f"--data.folder={crops}", f"--model.pretrained={base}", f"--output_dir={out}")
    before = weights.read_bytes()

    def overwritten(*arguments):
        real(*arguments)
        tensors = load_file(weights)
        tensors["head.out.bias"] += 0.01
        save_file(tensors, weights)

    real = State.save
    with monkeypatch.context() as patch:
        patch.setattr(State, "save", overwritten)
        with pytest.raises(ValueError, match=r"base has changed since training read it .*head\.out"):
            train_here(patch, *common, "--max_train_steps=2", "--mixed_precision=bf16")
    assert not (out / "model").exists()
    weights.write_bytes(before)
    train_here(monkeypatch, *common, "--max_train_steps=2", "--mixed_precision=bf16", "--resume_from_checkpoint=latest")
    assert (out / "model").is_dir()


def test_going_back_to_an_earlier_checkpoint_takes_the_later_ones_out_of_the_way(crops, tmp_path, monkeypatch, capfd):
    out = tmp_path / "run"
    common = (*NAOSD, *SHORT, f"--data.folder={crops}", f"--output_dir={out}", "--checkpointing_steps=1")
    train_here(monkeypatch, *common, "--max_train_steps=3")
    capfd.readouterr()
    train_here(monkeypatch, *common, "--max_train_steps=2", "--resume_from_checkpoint=checkpoint-0000001")
    assert "set-aside-checkpoint-0000003" in capfd.readouterr().err
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-0000001", "checkpoint-0000002"]
