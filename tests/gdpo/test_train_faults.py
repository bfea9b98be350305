"""Kills, signals, damaged checkpoints and bad input, through the real command line."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from engine.io import cli
from gdpo.photos.dataset import Batch
from gdpo.train import checkpoint
from gdpo.train.config import GDPOConfig
from gdpo.train.loop import Stop
from gdpo.train.step import StepFailed, optimizer_step
from tests.support import faulty
from tests.support.training import GDPO, NAOSD, ROOT, command, environment, train


def tree_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        command(*arguments), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip


def wait_for_rows(process: subprocess.Popen, run: Path, rows: int) -> None:
    metrics = run / "metrics.jsonl"
    for _ in range(6000):
        if process.poll() is not None or (metrics.is_file() and metrics.read_text().count("\n") >= rows):
            return
        time.sleep(0.02)
    raise AssertionError("training did not start")


def killed_run_equals_straight(crops: Path, tmp_path: Path, kills: int, steps: int) -> int:
    """SIGKILL a run at random instants, resume it each time; the end must be byte-equal. Returns the kills that hit."""
    lengths = (f"--max_train_steps={steps}", "--checkpointing_steps=2", "--train_batch_size=2")
    common = (*NAOSD, f"--data.folder={crops}", *lengths)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train(*common, f"--output_dir={straight}")
    rng, hit = random.Random(0), 0
    for k in range(kills):
        process = start(*common, f"--output_dir={killed}", "--resume_from_checkpoint=auto")
        wait_for_rows(process, killed, min(steps, (k + 1) * steps // (kills + 1)))
        time.sleep(rng.random() * 0.2)
        if process.poll() is None:
            process.kill()
            hit += 1
        process.communicate()
    train(*common, f"--output_dir={killed}", "--resume_from_checkpoint=auto")
    assert tree_bytes(straight / "model") == tree_bytes(killed / "model")
    rows = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    steps_logged = [row["step"] for row in rows if "loss" in row]
    assert steps_logged == list(range(1, steps + 1)), "every step is logged once"
    assert not list(killed.glob(".*checkpoint*")), "nothing half-written is left"
    return hit


def test_killed_and_resumed_run_is_byte_equal(crops, tmp_path):
    assert killed_run_equals_straight(crops, tmp_path, kills=1, steps=20) == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills(crops, tmp_path):
    hit = killed_run_equals_straight(crops, tmp_path, kills=20, steps=400)
    print(f"\n{hit} SIGKILLs hit the run; its model and its log equal those of a run that was never killed")
    assert hit == 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_signals(crops, tmp_path):
    """SIGINT and SIGTERM in turn, at random instants of one run: each saves, none loses or repeats a step."""
    common = (*NAOSD, f"--data.folder={crops}", f"--output_dir={tmp_path / 'run'}", "--max_train_steps=100000")
    rng, rows = random.Random(1), 0
    for k in range(10):
        sent, code = ((signal.SIGINT, 130), (signal.SIGTERM, 143))[k % 2]
        process = start(*common, "--resume_from_checkpoint=auto")
        wait_for_rows(process, tmp_path / "run", rows + 2)
        time.sleep(rng.random() * 0.5)
        process.send_signal(sent)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == code, stderr
        logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in logged if "loss" in row]
        rows = len(steps)
        assert steps == list(range(1, rows + 1))
        assert (tmp_path / "run" / f"checkpoint-{rows:07d}" / "manifest.json").is_file()
    print(f"\n10 signals saved at once and exited with 130 or 143; {rows} steps in all, none lost or repeated")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_exits(crops, tmp_path, sent, code):
    common = (*NAOSD, f"--data.folder={crops}", f"--output_dir={tmp_path / 'run'}", "--max_train_steps=100000")
    process = start(*common)
    wait_for_rows(process, tmp_path / "run", 2)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert list((tmp_path / "run").glob("checkpoint-*/manifest.json")), stderr


def test_a_signal_that_an_import_swallowed_ends_the_run_after_its_first_step(monkeypatch):
    monkeypatch.setattr(cli, "asked", signal.SIGINT)
    with Stop(print) as stop, pytest.raises(cli.Interrupted):
        assert stop.agreed(SimpleNamespace(num_processes=1))
        stop.leave()


# ---- bad input, as a new user would give it: exit code 2, one line that says what and how to mend it


def refused(*arguments, code: int = 2, **extra) -> str:
    done = train(*arguments, check=False, **extra)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert lines[-1].startswith("error: "), done.stderr
    return lines[-1]


def test_empty_folder_and_text_called_png(tmp_path):
    (tmp_path / "none").mkdir()
    line = refused(*NAOSD, f"--data.folder={tmp_path / 'none'}", f"--output_dir={tmp_path / 'o'}")
    assert "none" in line
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.png").write_text("I am not a picture")
    line = refused(*NAOSD, f"--data.folder={tmp_path / 'text'}", f"--output_dir={tmp_path / 'o'}")
    assert "a.png" in line
    assert not (tmp_path / "o" / "model").exists()


def test_unknown_key_and_wrong_type(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("learning_rte: 1e-4\n")
    assert "learning_rte" in refused("naosd", f"--config={config}")
    config.write_text("train_batch_size: many\n")
    assert "train_batch_size" in refused("naosd", f"--config={config}")


def test_group_of_one_and_missing_weights(crops, trained, tmp_path):
    common = (*GDPO, f"--data.folder={crops}", f"--output_dir={tmp_path / 'o'}")
    assert "num_generations" in refused(*common, f"--model.pretrained={trained}", "--num_generations=1")
    line = refused(*common, f"--model.pretrained={tmp_path / 'nothing'}")
    assert "nothing" in line and "no such folder" in line
    import shutil

    shutil.copytree(trained, tmp_path / "model")
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "diffusion_pytorch_model.safetensors" in refused(*common, f"--model.pretrained={tmp_path / 'model'}")
    weights.unlink()
    assert "diffusion_pytorch_model.safetensors" in refused(*common, f"--model.pretrained={tmp_path / 'model'}")


def test_resume_without_checkpoint_other_model_and_existing_run(crops, tmp_path):
    common = (*NAOSD, f"--data.folder={crops}", f"--output_dir={tmp_path / 'run'}", "--checkpointing_steps=1")
    assert "no valid checkpoint" in refused(*common, "--max_train_steps=2", "--resume_from_checkpoint=latest")
    train(*common, "--max_train_steps=2")
    assert "already holds a run" in refused(*common, "--max_train_steps=2")
    line = refused(
        *common, "--max_train_steps=4", "--resume_from_checkpoint=latest", "--model.block_out_channels=[8,8]"
    )
    assert "block_out_channels" in line
    line = refused(*common, "--max_train_steps=4", "--resume_from_checkpoint=latest", "--pixel_weight=0.5")
    assert "pixel_weight" in line

    # The newest checkpoint damaged: the one before is used, and both are named.
    newest = tmp_path / "run" / "checkpoint-0000002" / "trainable.safetensors"
    content = bytearray(newest.read_bytes())
    content[-7] ^= 1
    newest.write_bytes(content)
    done = train(*common, "--max_train_steps=3", "--checkpointing_steps=9", "--resume_from_checkpoint=latest")
    assert "checkpoint-0000002" in done.stderr and "trainable.safetensors" in done.stderr
    assert "resumed from" in done.stderr and "checkpoint-0000001" in done.stderr
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        checkpoint.load(folder)  # nothing unreadable is left


def test_non_finite_loss_names_step_and_samples_and_keeps_the_checkpoint(crops, tmp_path):
    run = tmp_path / "run"
    common = (
        *NAOSD,
        f"--data.folder={crops}",
        f"--output_dir={run}",
        "--checkpointing_steps=1",
        "--max_train_steps=50",
    )
    line = refused(*common, "--learning_rate=1e30", "--max_grad_norm=0")
    assert "step" in line and "crop" in line and "checkpoint-" in line
    from safetensors.numpy import load_file

    newest = sorted(run.glob("checkpoint-*"))[-1]
    assert all(np.isfinite(v).all() for v in load_file(newest / "trainable.safetensors").values())


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ("samples.mean((1, 2, 3)) * float('nan')", "is nan for image 0, sample 0"),
        ("{}['weights']", r"failed \(KeyError: 'weights'\)"),
    ],
)
def test_a_reward_of_the_users_own_that_fails_is_named_with_step_and_samples(crops, trained, tmp_path, result, reason):
    (tmp_path / "mine.py").write_text(f"def f(samples, target):\n    return {result}\n")
    common = (*GDPO, f"--data.folder={crops}", f"--model.pretrained={trained}", f"--output_dir={tmp_path / 'o'}")
    done = train(*common, "--reward_funcs=[psnr_y,mine:f]", check=False, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(rf"error: at step 1, samples crop\d\d.png: reward 'mine:f' {reason}", done.stderr)


def test_a_gpu_that_is_too_small_is_named_with_the_remedy():
    def step(*arguments):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    config = GDPOConfig(sample_batch_size=3)
    method = SimpleNamespace(groups={}, step=step)
    state = SimpleNamespace(step=7, optimizer=SimpleNamespace(param_groups=[]))
    for checkpointing, remedy in ((False, "--model.gradient_checkpointing true or "), (True, "")):
        config.model.gradient_checkpointing = checkpointing
        remedy += "a smaller --sample_batch_size or a smaller --data.crop_size"
        batches = iter([Batch(["a.png"], None, [0], torch.zeros(1, 3, 8, 8))])
        with pytest.raises(StepFailed, match=f"at step 8, {remedy} needs less memory: CUDA out of memory"):
            optimizer_step(config, Accelerator(cpu=True), method, state, batches)


@pytest.mark.skipif(bool(faulty.missing()), reason=faulty.missing())
@pytest.mark.parametrize(
    ("where", "last"),
    [
        (".staged-checkpoint-0000002", 1),
        pytest.param(".model.staged", 3, marks=pytest.mark.slow),
        pytest.param("sheets", 2, marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fills_up_ends_the_run_in_one_line_that_names_the_last_checkpoint(crops, tmp_path, where, last):
    run = tmp_path / "run"
    common = (*NAOSD, f"--data.folder={crops}", f"--output_dir={run}", "--max_train_steps=3", "--checkpointing_steps=1")
    disk = faulty.environment(faulty.build(tmp_path), run / where, "full", at=1 if where == "sheets" else 3)
    line = refused(*common, "--validation_steps=2", code=1, **disk)
    assert "No space left on device" in line and f"the last checkpoint is {run}/checkpoint-000000{last}" in line
    assert "--resume_from_checkpoint latest" in line
    assert not [p.name for p in run.iterdir() if p.name.startswith(".")] and not (run / "model").exists()
    if where.startswith(".staged"):  # with space, the run goes on, and ends
        train(*common, "--resume_from_checkpoint=latest")
        assert (run / "model").is_dir()


def test_captions_that_are_not_there_are_missed_at_once(crops, tmp_path):
    line = refused(*NAOSD, f"--data.folder={crops}", "--data.captions=true", f"--output_dir={tmp_path / 'o'}")
    assert f"{crops} has no captions.jsonl" in line and not (tmp_path / "o").exists()


def test_unwritable_output(crops, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused(*NAOSD, f"--data.folder={crops}", f"--output_dir={tmp_path / 'file' / 'run'}")
