"""A run that is stopped and resumed is one run in the tracker: no step twice, and its pictures are there."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.training import GDPO, NAOSD, train, train_here

LENGTH = ("--checkpointing_steps=4", "--validation_steps=2", "--resume_from_checkpoint=auto")


def stopped_after(run: Path, step: int) -> None:
    """What is left of a run that was killed before its next checkpoint."""
    shutil.rmtree(run / "model")
    for folder in run.glob("checkpoint-*"):
        if int(folder.name[-7:]) > step:
            shutil.rmtree(folder)


def test_tensorboard_shows_no_step_twice(crops, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    common = [*NAOSD, f"--data.folder={crops}", f"--output_dir={run}", "--report_to=tensorboard", *LENGTH]
    train_here(monkeypatch, *common, "--max_train_steps=6")
    stopped_after(run, 4)
    train_here(monkeypatch, *common, "--max_train_steps=8")
    events = EventAccumulator(str(run / "gdpo"), {"images": 0, "scalars": 0}).Reload()
    losses = {e.step: e.value for e in events.Scalars("loss")}
    assert [e.step for e in events.Scalars("loss")] == list(range(1, 9))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx({r["step"]: r["loss"] for r in rows if "loss" in r}, rel=1e-6)
    assert [e.step for e in events.Images("sheet")] == [2, 4, 6, 8]
    shown = Image.open(io.BytesIO(events.Images("sheet")[-1].encoded_image_string))
    assert np.array_equal(np.asarray(shown), np.asarray(Image.open(run / "sheets" / "step-0000008.png")))


def test_groups_are_pictures_in_the_order_of_their_rewards(crops, trained, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    options = [f"--model.pretrained={trained}", f"--data.folder={crops}", f"--output_dir={run}", "--max_train_steps=1"]
    train_here(monkeypatch, *GDPO, *options, "--report_to=tensorboard", "--reward_funcs=[psnr_y]", "--rho=1")
    events = EventAccumulator(str(run / "gdpo"), {"images": 0}).Reload()
    assert [e.step for e in events.Images("group")] == [1]
    group = np.asarray(Image.open(run / "sheets" / "group-0000001.png")).astype(float)[18:]
    hr = np.asarray(Image.open(run / "sheets" / "step-0000001.png")).astype(float)[18:, -64:]
    assert group.shape == (2 * 68 - 4, 3 * 68 - 4, 3)
    luma = np.array([0.299, 0.587, 0.114])
    for top in (0, 68):
        errors = [(((group[top : top + 64, x : x + 64] - hr[top : top + 64]) @ luma) ** 2).mean() for x in (0, 68, 136)]
        assert errors == sorted(errors) and errors[0] < errors[2]


def log_records(file: Path) -> list[bytes]:
    """The records of a wandb's offline file: LevelDB's log format (blocks of 32 KiB) after seven bytes."""
    data, block = file.read_bytes(), 1 << 15
    found, part, at = [], b"", 7
    while at + 7 <= len(data):
        if block - at % block < 7:  # too little for a header: filled up
            at += block - at % block
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(part)
            part = b""
    return found


def wandb_rows(folder: Path) -> list[tuple[str, int, list[str]]]:
    """(id of the run, step, keys) of each row in a wandb's offline folder."""
    from wandb.proto import wandb_internal_pb2

    [file] = folder.glob("*.wandb")
    run, found = "", []
    for data in log_records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        run = record.run.run_id or run
        if record.HasField("history"):
            keys = [item.key or "/".join(item.nested_key) for item in record.history.item]
            found.append((run, record.history.step.num, keys))
    return found


@pytest.mark.slow
def test_wandb_goes_on_in_the_same_run(crops, tmp_path):
    pytest.importorskip("wandb", reason="the extra cluster")
    run = tmp_path / "run"
    common = [*NAOSD, f"--data.folder={crops}", f"--output_dir={run}", "--report_to=wandb", *LENGTH]
    offline = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    offline |= {f"WANDB_{kind}_DIR": str(tmp_path / kind) for kind in ("CONFIG", "CACHE", "DATA")}
    train(*common, "--max_train_steps=6", **offline)
    stopped_after(run, 4)
    train(*common, "--max_train_steps=8", **offline)
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    records = [row for folder in folders for row in wandb_rows(folder)]
    assert len(folders) == 2 and {record[0] for record in records} == {(run / "wandb_id").read_text().strip()}
    steps = [step for _, step, keys in records if "loss" in keys]
    assert steps == list(range(1, 9))
    assert [step for _, step, keys in records if any(key.startswith("sheet") for key in keys)] == [2, 4, 6, 8]


def test_a_tracker_that_does_not_start_is_one_line_that_says_what_to_do(crops, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "gdpo").touch()  # where tensorboard's folder goes
    common = [*NAOSD, f"--data.folder={crops}", "--max_train_steps=1"]
    with pytest.raises(ValueError, match=r"^report_to tensorboard does not start \(.*\); its folder, RUN/gdpo"):
        train_here(monkeypatch, *common, f"--output_dir={tmp_path / 'run'}", "--report_to=tensorboard")

    class UsageError(Exception):
        """What wandb raises; neither a ValueError nor a RuntimeError."""

    def init(*_, **__):
        raise UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", init)
    monkeypatch.setattr("gdpo.train.setup.tracker", lambda config: None)
    line = r"^report_to wandb does not start \(No API key configured\.\); log in with: wandb login, or set WANDB_MODE="
    with pytest.raises(ValueError, match=line) as error:
        train_here(monkeypatch, *common, f"--output_dir={tmp_path / 'other'}", "--report_to=wandb")
    assert "\n" not in str(error.value) and "metrics.jsonl is written all the same" in str(error.value)


@pytest.mark.parametrize("method", ["log", "log_images", "finish"])
def test_a_run_goes_on_without_a_tracker_that_fails(method, crops, tmp_path, monkeypatch, capfd):
    from accelerate.tracking import TensorBoardTracker

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoardTracker, method, fail)
    run = tmp_path / "run"
    common = [*NAOSD, f"--data.folder={crops}", f"--output_dir={run}", "--report_to=tensorboard"]
    train_here(monkeypatch, *common, "--max_train_steps=3", "--validation_steps=1")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3] and (run / "model").is_dir()
    said = [line for line in capfd.readouterr().err.splitlines() if "nothing more goes there" in line]
    assert len(said) == 1 and said[0].strip().startswith("tensorboard failed ([Errno 28] No space left on device);")
