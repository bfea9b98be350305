"""Options that cannot be meant as they are, paths as users write them, and folders that two runs would share."""

import json
import os
import signal
import sys
from dataclasses import replace
from operator import attrgetter

import pytest
from accelerate.state import AcceleratorState

from engine.io.cli import run
from engine.io.files import lock
from gdpo.train import __main__ as cli
from gdpo.train import loop, pictures
from gdpo.train.config import NAOSDConfig
from gdpo.train.methods.naosd import NAOSD as Method
from gdpo.train.step import StepFailed
from tests.support.training import GDPO, NAOSD, train_here


@pytest.fixture
def refused(monkeypatch, capsys):
    """Arguments -> the one line with which the command refuses them."""

    def line(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handlers of this process stay its own
        with pytest.raises(SystemExit) as end:
            run(cli.main)
        AcceleratorState._reset_state(reset_partial_state=True)
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and lines[-1].startswith("error: "), lines
        return lines[-1].removeprefix("error: ")

    return line


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--learning_rate=.inf", "learning_rate must be finite; got inf"),
        ("--vsd_t=[0.1,.nan]", "vsd_t must be finite; got (0.1, nan)"),
        ("--seed=9223372036854775808", "seed must be a number of 64 bits; got 9223372036854775808"),
        ("--data.crop_size=40", "data.crop_size must be a multiple of 4 and at least 44 for this degradation; got 40"),
    ],
)
def test_values_that_cannot_be_meant(option, message, crops, tmp_path, refused):
    assert refused(*NAOSD, f"--data.folder={crops}", f"--output_dir={tmp_path / 'o'}", option) == message
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["seed", "data.crop_size"])
def test_a_value_that_is_null_in_a_file_is_named(name, tmp_path, refused):
    part, _, leaf = name.rpartition(".")
    (tmp_path / "c.yaml").write_text(f"{part}:\n  {leaf}: null\n" if part else f"{leaf}: null\n")
    assert refused("naosd", f"--config={tmp_path / 'c.yaml'}") == f"{name} must be given; got null"


def test_weights_that_are_not_finite(crops, trained, tmp_path, refused):
    options = (f"--data.folder={crops}", f"--output_dir={tmp_path / 'o'}", f"--model.pretrained={trained}")
    assert refused(*GDPO, *options, "--reward_weights=[.inf,1]") == "reward_weights must be finite; got [inf, 1.0]"


@pytest.mark.parametrize("text", ["seed: 1\nseed: 2\n", "data:\n  crop_size: 64\n  crop_size: 128\n"])
def test_a_key_that_comes_twice_is_refused(text, tmp_path, refused):
    (tmp_path / "c.yaml").write_text(text)
    line = refused("naosd", f"--config={tmp_path / 'c.yaml'}")
    assert "comes twice" in line and text.split()[-2].rstrip(":") in line


PATHS = ("output_dir", "resume_from_checkpoint", "model.pretrained", "data.folder", "data.pairs.lr", "data.pairs.hr",
         "data.validation.lr", "data.validation.hr", "teacher.name", "teacher.folder", "teacher.cache")  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_every_path_is_filled_in_as_a_shell_does(name, monkeypatch):
    monkeypatch.setenv("CROPS", "/data")
    config = NAOSDConfig()
    part, _, leaf = name.rpartition(".")
    for text, filled in (("${CROPS}/a", "/data/a"), ("~/a", os.path.expanduser("~/a"))):
        setattr(attrgetter(part)(config) if part else config, leaf, text)
        assert attrgetter(name)(replace(config)) == filled
    setattr(attrgetter(part)(config) if part else config, leaf, "$NOT_SET/a")
    with pytest.raises(ValueError, match=rf"^{name} must name environment variables that are set; \$NOT_SET is not"):
        replace(config)


def test_paths_may_start_at_home_and_name_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch")
    config = NAOSDConfig(output_dir="~/runs/a")
    assert config.output_dir == f"{tmp_path}/runs/a"
    config.data.folder = ["$SCRATCH/crops", "${SCRATCH}/more-{000..012}.tar"]
    assert NAOSDConfig(data=config.data).data.folder == ["/scratch/crops", "/scratch/more-{000..012}.tar"]
    monkeypatch.delenv("SCRATCH")
    with pytest.raises(ValueError, match=r"output_dir must name environment variables that are set; \$SCRATCH is not"):
        NAOSDConfig(output_dir="$SCRATCH/run")
    (tmp_path / "a$b").mkdir()  # what is there is meant
    assert NAOSDConfig(output_dir=str(tmp_path / "a$b")).output_dir == str(tmp_path / "a$b")


def test_output_among_the_pictures_is_refused(crops, tmp_path, refused):
    (tmp_path / "link").symlink_to(crops)
    for folder in (crops, tmp_path / "link"):
        line = refused(*NAOSD, f"--data.folder={folder}", f"--output_dir={crops / 'run'}")
        assert line.startswith("output_dir must lie outside the pictures") and not (crops / "run").exists()


def test_output_that_is_no_folder_is_refused(crops, tmp_path, refused):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        line = refused(*NAOSD, f"--data.folder={crops}", f"--output_dir={tmp_path / name}")
        assert line == f"output_dir must be a folder, or not exist yet; {tmp_path / name} is something else"


def test_two_runs_do_not_share_a_folder(crops, tmp_path, refused, monkeypatch):
    out = tmp_path / "run"
    options = (*NAOSD, f"--data.folder={crops}", f"--output_dir={out}", "--max_train_steps=1", "--validation_images=0")
    monkeypatch.setattr(loop, "_ENDING", 0.3)
    with loop.alone_in(out, main=True):
        assert refused(*options) == f"another run is writing to {out}; wait for it, or choose another output_dir"
    assert list(out.iterdir()) == []
    (out / ".lock").touch()  # as a killed run leaves it
    train_here(monkeypatch, *options)
    assert (out / "model").is_dir() and not (out / ".lock").exists()


def test_a_lock_that_its_owner_removes_is_not_taken_for_one(tmp_path, monkeypatch):
    """Between opening and locking the file its owner removed it: the next run would not see such a lock."""
    opened = []

    def late(handle: int, *, wait: bool = True) -> bool | None:
        opened.append(handle)
        if len(opened) == 1:
            (tmp_path / ".lock").unlink()
        return lock(handle, wait=wait)

    monkeypatch.setattr(loop, "lock", late)
    with loop.alone_in(tmp_path, main=True):
        assert (tmp_path / ".lock").exists() and len(opened) == 2


def test_rows_that_are_of_no_step_are_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'5\nnull\n{}\n[1]\n{"step": "x"}\n{"step": 1, "loss": 2}\n{"st\xff\n{"step": 2')
    assert pictures.read_metrics(file) == [{"step": 1, "loss": 2}]


def test_a_step_that_fails_in_any_way_keeps_the_steps_before(crops, tmp_path, monkeypatch):
    step, done = Method.step, []

    def failing(self, *arguments):
        if len(done) == 1:
            raise KeyError("weights")
        done.append(1)
        return step(self, *arguments)

    monkeypatch.setattr(Method, "step", failing)
    options = (f"--data.folder={crops}", f"--output_dir={tmp_path}", "--max_train_steps=3", "--validation_images=0")
    with pytest.raises(StepFailed, match=r"at step 2, samples crop\d\d.png: KeyError: 'weights'\. The steps before it"):
        train_here(monkeypatch, *NAOSD, *options)
    assert os.path.isdir(tmp_path / "checkpoint-0000001")
    monkeypatch.setattr(Method, "step", step)
    train_here(monkeypatch, *NAOSD, *options, "--resume_from_checkpoint=latest")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3]
