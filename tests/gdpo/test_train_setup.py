"""What training checks before it starts, and the precisions that it runs in."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from training import GDPO, NAOSD, train

from gdpo.train import __main__ as cli
from gdpo.train.config import GDPOConfig, NAOSDConfig, TrainConfig
from gdpo.train.setup import precision


@pytest.mark.parametrize("config", [NAOSDConfig, GDPOConfig])
def test_fp16_needs_a_gpu(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"mixed_precision must be bf16 or no .*got fp16"):
        precision(config(mixed_precision="fp16"))
    assert [precision(config(mixed_precision=m)) for m in ("auto", "bf16", "no")] == ["no", "bf16", "no"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert precision(config(mixed_precision="fp16")) == "fp16"


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
