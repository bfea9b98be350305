"""A model from any checkpoint, whatever the schedule, the precision or the method: what the run itself would save."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gdpo import evaluate
from gdpo.merge import merge
from gdpo.train.at_checkpoint import generator_at
from tests.support.training import GDPO, NAOSD, train_here

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SHORT = ("--train_batch_size=2", "--checkpointing_steps=2", "--validation_images=0")


def same(a: Path, b: Path) -> bool:
    x, y = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    return x.keys() == y.keys() and all(torch.equal(v, y[k]) for k, v in x.items())


@pytest.fixture
def run(request, crops, trained, tmp_path, monkeypatch) -> Path:
    method, *options = request.param
    start = {"naosd": NAOSD, "gdpo": [*GDPO, f"--model.pretrained={trained}"]}[method]
    common = (*start, *SHORT, f"--data.folder={crops}", *options)
    train_here(monkeypatch, *common, f"--output_dir={tmp_path / 'run'}", "--max_train_steps=4")
    return tmp_path / "run"


RUNS = [
    ("naosd", "--lr_scheduler=cosine"),
    ("naosd", "--ema_decay=0.9", "--adversarial_weight=0.1"),
    ("gdpo", "--model.lora_alpha=5", "--lr_scheduler=linear"),
    ("gdpo", "--mixed_precision=bf16"),
]


@pytest.mark.parametrize("run", RUNS, ids=" ".join, indirect=True)
def test_the_last_checkpoint_gives_the_trained_model_and_an_earlier_one_another(run, tmp_path):
    merge(run / "checkpoint-0000004", tmp_path / "last")
    merge(run / "checkpoint-0000002", tmp_path / "earlier")
    expected = run / "model"
    if (expected / "unet_lora").is_dir():
        merge(expected, expected := tmp_path / "merged")
        merge(run / "checkpoint-0000004", tmp_path / "none", strength=0)
        assert same(tmp_path / "none", run / "model")
    assert same(tmp_path / "last", expected) and not same(tmp_path / "earlier", expected)


@pytest.mark.parametrize("run", [("gdpo",)], ids=["gdpo"], indirect=True)
def test_what_meets_a_checkpoint_names_the_command(run, crops, tmp_path, monkeypatch, capsys):
    checkpoint = run / "checkpoint-0000002"
    from engine.export.__main__ import main as export

    monkeypatch.setattr(sys, "argv", ["engine.export", str(checkpoint), "--out", str(tmp_path / "onnx")])
    with pytest.raises(ValueError, match=f"gdpo.merge {checkpoint} --out"):
        export()
    arguments = ["--lr", crops, "--hr", crops, "--model", checkpoint, "--out", tmp_path / "report"]
    monkeypatch.setattr(sys, "argv", ["gdpo.evaluate", *map(str, arguments)])
    with pytest.raises(ValueError, match=f"gdpo.merge {checkpoint} --out"):
        evaluate.main()
    with pytest.raises(ValueError, match=f"{run} is the folder of a training run; take {run}/model"):
        merge(run, tmp_path / "merged")

    damaged = tmp_path / "checkpoint-0000002"
    shutil.copytree(checkpoint, damaged)
    file = damaged / "trainable.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"trainable\.safetensors is not what was saved"):
        generator_at(damaged)


@pytest.mark.parametrize("run", [("naosd",)], ids=["naosd"], indirect=True)
def test_a_model_of_new_weights_is_interpolated_with_the_base_that_is_named(run, trained, tmp_path):
    start, end = load_file(trained / WEIGHTS), load_file(run / "model" / WEIGHTS)
    for source, strength in ((run / "model", 0.25), (run / "checkpoint-0000004", 0.25), (run / "model", 2)):
        merge(source, out := tmp_path / f"{source.name}-{strength}", strength=strength, base=trained)
        found = load_file(out / WEIGHTS)
        assert all(torch.allclose(found[k], start[k] + strength * (end[k] - start[k]), atol=1e-6) for k in end)
        assert not same(out, run / "model")
    merge(run / "model", tmp_path / "base", strength=0, base=trained)
    assert same(tmp_path / "base", trained)
    with pytest.raises(ValueError, match="trained all weights; say with --base"):
        merge(run / "checkpoint-0000004", tmp_path / "x", strength=0.5)
    with pytest.raises(ValueError, match="strength must be at least 0 and finite; got -1"):
        merge(run / "model", tmp_path / "x", strength=-1, base=trained)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge(run / "model", tmp_path / "x", strength=0.5)
    with pytest.raises(ValueError, match="--base: another architecture"):
        merge(run / "model", tmp_path / "x", strength=0.5, base="tiny")
    assert not (tmp_path / "x").exists()
