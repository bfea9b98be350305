"""What training checks before it starts, and the precisions that it runs in."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from matplotlib.axes import Axes
from PIL import Image

from engine.io.cli import run
from gdpo.generator import OneStepGenerator
from gdpo.train import __main__ as cli
from gdpo.train import checkpoint as checkpoints
from gdpo.train.config import GDPOConfig, NAOSDConfig, TrainConfig
from gdpo.train.setup import precision
from gdpo.train.state import flat
from tests.support.training import GDPO, NAOSD, train, train_here


@pytest.mark.parametrize("config", [NAOSDConfig, GDPOConfig])
def test_fp16_needs_a_gpu(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"mixed_precision must be bf16 or no .*got fp16"):
        precision(config(mixed_precision="fp16"))
    for has, auto in ((True, "bf16"), (False, "no")):  # emulated bf16 is slower than fp32
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"avx512_bf16": has})
        assert [precision(config(mixed_precision=m)) for m in ("auto", "bf16", "no")] == [auto, "bf16", "no"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert precision(config(mixed_precision="fp16")) == "fp16"
    for has, auto in ((True, "bf16"), (False, "no")):  # by default torch also counts GPUs that emulate it
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, has=has: including_emulation or has
        )
        assert precision(config()) == auto


@pytest.mark.slow
@pytest.mark.parametrize(("method", "figure"), [("naosd", "l2"), ("gdpo", "rewards/psnr_y/mean")])
def test_bf16_trains_in_bf16(method, figure, crops, trained, tmp_path):
    """Near the run in fp32, but not equal to it: a precision that is silently dropped would be."""
    options = {"naosd": NAOSD, "gdpo": [*GDPO, f"--model.pretrained={trained}"]}[method]
    found = {}
    for kind in ("no", "bf16"):
        out = tmp_path / kind
        short = ("--max_train_steps=2", "--validation_images=0", f"--mixed_precision={kind}")
        train(*options, *short, f"--data.folder={crops}", f"--output_dir={out}")
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [r["step"] for r in rows] == [1, 2]
        found[kind] = rows[1][figure]
    assert found["bf16"] != found["no"]
    assert found["bf16"] == pytest.approx(found["no"], rel=0.02)


@pytest.mark.parametrize(("name", "module", "extra"), [("wandb", "wandb", "cluster"), ("tensorboard", None, "train")])
def test_missing_tracker_is_refused_before_training(name, module, extra, crops, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module or "torch.utils.tensorboard", None)  # importing it now fails
    config = NAOSDConfig(output_dir=str(tmp_path / "run"), report_to=name)
    config.data.folder = str(crops)
    with pytest.raises(ValueError, match=rf"report_to {name} .*gdpo-sr\[{extra}\]"):
        cli.train("naosd", config)
    assert not (tmp_path / "run").exists()


def test_a_folder_called_wandb_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # wandb leaves one in the working directory
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="cluster"):
        cli.train("naosd", TrainConfig(report_to="wandb"))


OPTIONS = {
    NAOSDConfig: [
        "--validation_images=-1", "--validation_steps=-1", "--lr_warmup_steps=-1", "--data.num_workers=-1",
        "--data.crop_size=0", "--adam_beta1=1", "--adam_beta2=-0.1", "--adam_epsilon=0", "--adam_weight_decay=-1",
        "--model.block_out_channels=[]", "--model.block_out_channels=[8,0]", "--model.layers_per_block=0",
        "--model.lora_alpha=0", "--perceptual_size=-1", "--perceptual_blocks=6", "--vsd_lora_rank=0",
        "--vsd_learning_rate=0", "--learning_rate=.nan",
    ],
    GDPOConfig: ["--sample_batch_size=-1", "--lr_warmup_steps=-1", "--beta=0"],
}  # fmt: skip


def refused(capsys, monkeypatch, *arguments: str) -> str:
    """The one line with which the command refuses its arguments (in this process: a start costs seconds)."""
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handlers of this process stay its own
    with pytest.raises(SystemExit) as end:
        run(cli.main)
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps what it was started with
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize(("config", "option"), [(c, o) for c, options in OPTIONS.items() for o in options])
def test_options_out_of_range(config, option, crops, trained, tmp_path, monkeypatch, capsys):
    common = {NAOSDConfig: NAOSD, GDPOConfig: [*GDPO, f"--model.pretrained={trained}"]}[config]
    line = refused(capsys, monkeypatch, *common, f"--data.folder={crops}", f"--output_dir={tmp_path / 'o'}", option)
    name = option.removeprefix("--").split("=")[0]
    assert line.startswith(f"error: {name} must be ") and "; got " in line
    assert not (tmp_path / "o").exists()


# What `identity` held before options were marked where they are defined; the checkpoints of then hold it.
KEPT = [
    "seed",
    "model.pretrained",
    "model.t_noise",
    "model.t_diffusion",
    "model.full",
    "model.lora_rank",
    "model.lora_alpha",
    "model.prompt",
    "model.channels_last",
    "model.block_out_channels",
    "model.layers_per_block",
    "data.crop_size",
    "data.captions",
    "degradation.preset",
    "learning_rate",
    "lr_scheduler",
    "lr_warmup_steps",
    "adam_beta1",
    "adam_beta2",
    "adam_weight_decay",
    "adam_epsilon",
    "max_grad_norm",
    "ema_decay",
    "mixed_precision",
]
KEPT_OF = {
    NAOSDConfig: [
        "pixel",
        "pixel_weight",
        "perceptual",
        "perceptual_weight",
        "perceptual_size",
        "perceptual_blocks",
        "num_noises",
        "diversity",
        "grid_weight",
        "lattice_weight",
        "vsd_weight",
        "vsd_cfg",
        "vsd_t",
        "vsd_lora_rank",
        "vsd_learning_rate",
        "negative_prompt",
    ],
    GDPOConfig: [
        "algorithm",
        "num_generations",
        "beta",
        "epsilon",
        "kl",
        "nft_strength",
        "num_pairs",
        "mean_reward_std",
        "reward_funcs",
        "reward_weights",
        "rho",
        "texture_threshold",
        "texture_weighted_loss",
        "shared_noise",
        "reuse_latents",
        "compile_frozen",
    ],
}
FREE = [
    "output_dir",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "validation_steps",
    "validation_images",
    "logging_steps",
    "report_to",
    "train_batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
    "sample_batch_size",
    "backend",
    "data.num_workers",
    "data.folder",
    "model.gradient_checkpointing",
]


@pytest.mark.parametrize("kind", [NAOSDConfig, GDPOConfig])
def test_what_a_resumed_run_must_keep_is_what_it_was(kind):
    for scheduler in ("constant", "cosine", "linear"):  # a schedule ends with the run
        config = kind(lr_scheduler=scheduler)
        own = flat(config.identity())
        assert set(KEPT) | set(KEPT_OF[kind]) <= own.keys() and not own.keys() & set(FREE)
        assert ("max_train_steps" in own) == (scheduler != "constant")
        assert own == {k: v for k, v in flat(asdict(config)).items() if k in own}


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\x00\xff", b"a: [1,", b"just words", b""])
def test_a_config_that_is_no_config_is_named(content, tmp_path, monkeypatch, capsys):
    (tmp_path / "c.yaml").write_bytes(content)
    assert f"{tmp_path / 'c.yaml'}" in refused(capsys, monkeypatch, "naosd", f"--config={tmp_path / 'c.yaml'}")


def test_the_hint_can_be_pasted(monkeypatch, capsys):
    line = refused(capsys, monkeypatch, "naosd", "--no_such_option=1")
    assert line.endswith("(see: python -m gdpo.train naosd --help)")
    monkeypatch.setattr(sys, "argv", ["train", "naosd", "--help"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match="0"):
        run(cli.main)
    shown = capsys.readouterr().out
    assert "usage: python -m gdpo.train naosd [" in shown
    assert "learning rate schedule after the warm-up" in shown  # the options' words, which are in docstrings


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_bytes_of_a_model_folder_are_foreseen(mini_sd, tmp_path):
    generator = OneStepGenerator.from_pretrained(mini_sd)
    generator.save_pretrained(tmp_path / "model")
    assert generator.saved_bytes() == pytest.approx(folder_bytes(tmp_path / "model"), rel=0.05)


def test_a_disk_too_small_for_checkpoints_and_model_is_found_at_once(trained, crops, tmp_path, monkeypatch, capsys):
    run_folder, mib = tmp_path / "run", 1 << 20
    arguments = [*GDPO, f"--model.pretrained={trained}", f"--data.folder={crops}", f"--output_dir={run_folder}"]
    generator = OneStepGenerator.from_pretrained(trained)
    monkeypatch.setattr(OneStepGenerator, "saved_bytes", lambda self: 3000 * mib)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3000 * mib))  # for the model alone
    line = refused(capsys, monkeypatch, *arguments)
    assert f"{run_folder} has 3000 MiB free" in line and "checkpoints and the trained model need 30" in line
    assert not any(run_folder.iterdir())

    # The same disk will do where the model is as small as it is.
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=17 * mib + generator.saved_bytes()))
    train_here(monkeypatch, *arguments, "--max_train_steps=1")


def test_the_log_has_trls_names_and_every_one_gets_a_curve(trained, crops, tmp_path, monkeypatch):
    arguments = [*GDPO, f"--model.pretrained={trained}", f"--data.folder={crops}", f"--output_dir={tmp_path / 'run'}"]
    drawn: list[str] = []
    title = Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda self, name, *a, **k: (drawn.append(name), title(self, name, *a, **k)))
    train_here(monkeypatch, *arguments, "--max_train_steps=3", "--train_batch_size=2", curves=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [r for r in rows if "loss" in r]
    names = {"reward", "reward_std", "rewards/psnr_y/mean", "rewards/naturalness/mean", "frac_reward_zero_std"}
    names |= {"rewards/margins", "rewards/accuracies", "grad_norm", "loss", "advantages/max", "advantages/min"}
    assert len(rows) == 3 and all(names | {"step", "step_time"} <= row.keys() for row in rows)
    assert names <= set(drawn) and drawn[0] == "loss" and drawn[1].startswith("reward")
    for row in rows:  # advantages of three: mean 0, deviation 1
        assert 0.57 < row["advantages/max"] < 1.16 and -1.16 < row["advantages/min"] < -0.57
    with Image.open(tmp_path / "run" / "curves.png") as picture:
        picture.verify()


def test_a_checkpoint_from_before_an_option_existed_is_resumed_from(crops, tmp_path, monkeypatch, capfd):
    """An option that it does not know had its default; another value is refused, and an unknown one of old is none."""
    run_folder = tmp_path / "run"
    common = [*NAOSD, f"--data.folder={crops}", f"--output_dir={run_folder}", "--validation_images=0"]
    train_here(monkeypatch, *common, "--max_train_steps=1")
    newest = run_folder / "checkpoint-0000001"
    saved = checkpoints.load(newest)
    del saved.state.identity["grid_weight"], saved.state.identity["model"]["prompt"]
    saved.state.identity["gone"] = 1
    checkpoints.save(run_folder, saved, keep=2)
    resumed = [*common, "--max_train_steps=2", "--resume_from_checkpoint=latest"]
    with pytest.raises(ValueError, match=r"was made with grid_weight=0\.0, now it is 0\.5"):
        train_here(monkeypatch, *resumed, "--grid_weight=0.5")
    train_here(monkeypatch, *resumed)
    assert "resumed from" in capfd.readouterr().err


def test_a_resumed_run_may_change_what_only_the_future_depends_on(crops, tmp_path, monkeypatch, capfd):
    run_folder = tmp_path / "run"
    common = [*NAOSD, f"--data.folder={crops}", f"--output_dir={run_folder}", "--validation_images=0"]
    train_here(monkeypatch, *common, "--max_train_steps=1")
    resumed = [*common, "--max_train_steps=2", "--resume_from_checkpoint=latest"]
    train_here(monkeypatch, *resumed, "--learning_rate=2e-3", "--lr_scheduler=linear", "--max_grad_norm=0.5")
    said = capfd.readouterr().err
    for change in ("learning_rate=0.002 (was 0.001)", "lr_scheduler='linear' (was 'constant')", "max_grad_norm=0.5"):
        assert "from step 2 on, " in said and change in said
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["learning_rate"] for row in rows] == [1e-3, 1e-3]  # the second of a linear schedule: half of 2e-3
    saved = checkpoints.load(run_folder / "checkpoint-0000002").state.identity
    assert (saved["learning_rate"], saved["lr_scheduler"]) == (2e-3, "linear")


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml")), ids=lambda f: f.name
)
def test_every_config_of_the_repository_is_read(file):
    method = "gdpo" if "gdpo" in file.name else "naosd"
    options = cli.parser().parse_args([method, "--config", str(file)])[method]
    assert options.output_dir == yaml.safe_load(file.read_text())["output_dir"]


def test_a_config_is_yaml_1_2(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "teacher: {name: no, on: clean}\nlearning_rate: 1e-4\ndiversity: .5\nmodel: {full: true}\n"
    )
    options = cli.parser().parse_args(["naosd", "--config", str(tmp_path / "c.yaml")]).naosd
    assert (options.teacher.name, options.teacher.on, options.model.full) == ("no", "clean", True)
    assert (options.learning_rate, options.diversity) == (1e-4, 0.5)
