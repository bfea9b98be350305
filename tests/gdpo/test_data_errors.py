"""A picture that turns out damaged in the middle of a run: nothing is lost, and the run can go on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gdpo.train.step import StepFailed
from tests.support.training import NAOSD, train, train_here


@pytest.fixture
def data(crops, tmp_path) -> Path:
    """Eight crops of which crop07.png ends too early: its header is fine, so that the start does not see it."""
    folder = tmp_path / "data"
    folder.mkdir()
    for k in range(8):
        shutil.copy(crops / f"crop{k:02d}.png", folder)
    damaged = folder / "crop07.png"
    damaged.write_bytes(damaged.read_bytes()[:5000])
    return folder


def options(data: Path, out: Path, *more: str) -> list[str]:
    return [
        *NAOSD,
        f"--data.folder={data}",
        f"--output_dir={out}",
        "--validation_images=0",
        "--max_train_steps=12",
        *more,
    ]


def rows(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "step_time"} for row in lines]


def trained(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "unet" / "diffusion_pytorch_model.safetensors")


def test_the_steps_before_are_saved_and_the_run_goes_on_when_it_is_mended(data, crops, tmp_path, monkeypatch, capfd):
    out = tmp_path / "run"
    with pytest.raises(StepFailed, match=r"at step \d+: .*crop07\.png.*The steps before it are saved") as error:
        train_here(monkeypatch, *options(data, out))
    done = len(rows(out))
    said = str(error.value)
    assert 0 < done < 12 and f"at step {done + 1}:" in said and f"checkpoint-{done:07d}" in said
    assert "--data.on_error skip" in said and "--allow_data_change true" in said
    resumed = options(data, out, "--resume_from_checkpoint=latest")
    with pytest.raises(StepFailed, match=r"crop07\.png"):  # as it is
        train_here(monkeypatch, *resumed)
    shutil.copy(crops / "crop07.png", data)
    with pytest.raises(ValueError, match=r"trained on other crops .* --allow_data_change true"):
        train_here(monkeypatch, *resumed)
    capfd.readouterr()
    train_here(monkeypatch, *resumed, "--allow_data_change=true")
    assert "trained on other crops" in capfd.readouterr().err
    assert [r["step"] for r in rows(out)] == list(range(1, 13))
    whole = tmp_path / "whole"  # sample numbers went on as they were: as if the picture had never been damaged
    train_here(monkeypatch, *options(data, whole))
    assert all(torch.equal(v, trained(out)[k]) for k, v in trained(whole).items())


def test_skipped_pictures_are_named_counted_and_the_same_when_resumed(data, tmp_path, monkeypatch, capfd):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train_here(monkeypatch, *options(data, straight, "--data.on_error=skip"))
    said = [line for line in capfd.readouterr().err.splitlines() if "skipped, and another picture" in line]
    count = sum(r["skipped"] for r in rows(straight))
    assert count == len(said) >= 1 and "crop07.png" in said[0]  # 12 samples: an epoch of 8 and half of one
    train_here(monkeypatch, *options(data, stopped, "--data.on_error=skip", "--checkpointing_steps=1"))
    shutil.rmtree(stopped / "model")
    for folder in sorted(stopped.glob("checkpoint-*")):
        if int(folder.name[-7:]) > 10:
            shutil.rmtree(folder)
    train_here(monkeypatch, *options(data, stopped, "--data.on_error=skip", "--resume_from_checkpoint=latest"))
    assert rows(stopped) == rows(straight)
    assert all(torch.equal(v, trained(stopped)[k]) for k, v in trained(straight).items())


@pytest.mark.slow
def test_skips_on_two_processes_equal_those_on_one(data, tmp_path):
    more = ("--data.on_error=skip", "--max_train_steps=4")
    train(*options(data, tmp_path / "one", "--train_batch_size=4", *more))
    train(*options(data, tmp_path / "two", "--train_batch_size=2", *more), processes=2)
    counts = [[r["skipped"] for r in rows(tmp_path / n)] for n in ("one", "two")]
    assert counts[0] == counts[1] and sum(counts[0])
    a, b = trained(tmp_path / "one"), trained(tmp_path / "two")
    apart = sum(float((a[k] - b[k]).double().square().sum()) for k in a)
    assert (apart / sum(float(v.double().square().sum()) for v in a.values())) ** 0.5 < 2e-5


def test_a_folder_of_nothing_but_damaged_pictures_ends_the_run(data, tmp_path, monkeypatch):
    for file in data.iterdir():
        file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(StepFailed, match=r"at step 1: .*No step was done before it"):
        train_here(monkeypatch, *options(data, tmp_path / "run", "--data.on_error=skip"))
