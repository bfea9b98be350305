"""The ablation trains its variants, measures them at every checkpoint and goes on where it was."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import gdpo_ablation
from gdpo import evaluate
from gdpo.evaluation import before_after as gdpo_gain
from gdpo.generator import OneStepGenerator
from gdpo.model import lora
from gdpo.scores.group import GroupReward
from gdpo.train import checkpoint as checkpoints
from tests.support import commands


@pytest.mark.slow
def test_variants_are_trained_measured_and_resumed(tmp_path, crops, trained, monkeypatch, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {{pretrained: {trained}, lora_rank: 2}}\n"
        f"data: {{folder: {crops}, crop_size: 64}}\ndegradation: {{preset: light}}\n"
        "train_batch_size: 1\nnum_generations: 4\nlearning_rate: 1.0e-2\nmixed_precision: 'no'\n"
        "reward_funcs: [psnr_y, region_detail]\nvalidation_steps: 0\nvalidation_images: 0\n"
    )
    out = tmp_path / "ablation"
    call = ["ablation", "--config", str(config), "--out", str(out), "--steps", "2", "--every", "1", "--crops", "2"]
    monkeypatch.setattr(sys, "argv", [*call, "--variants", "GDPO", "DPO"])

    def forked(command, check):
        assert command[:3] == [sys.executable, "-m", "gdpo.train"] and check
        done = commands.run(*command[2:])
        assert done.returncode == 0, done.stderr

    monkeypatch.setattr(gdpo_ablation, "subprocess", SimpleNamespace(run=forked))
    assert gdpo_ablation.main() == 0
    assert "| DPO | 2 |" in (out / "table.md").read_text()
    assert (out / "curves.png").stat().st_size > 1000
    first = {v: (out / v / "gain" / "1.json").read_text() for v in ("GDPO", "DPO")}
    # All variants are compared with one and the same start.
    second = {v: json.loads((out / v / "gain" / "2.json").read_text()) for v in ("GDPO", "DPO")}
    assert second["GDPO"]["psnr_y_before"] == second["DPO"]["psnr_y_before"] != second["GDPO"]["psnr_y_after"]

    measured = []
    monkeypatch.setattr(gdpo_ablation, "measure", lambda *a: measured.append(a))
    assert gdpo_ablation.main() == 0
    assert not measured and first["GDPO"] == (out / "GDPO" / "gain" / "1.json").read_text()
    capsys.readouterr()

    # The last checkpoint is the finished model, an earlier one is not.
    finished = load_file(out / "GDPO" / "model" / "unet_lora" / "adapter_model.safetensors")
    for step, same in ((2, True), (1, False)):
        generator = gdpo_ablation.at_checkpoint(str(out / "GDPO" / "model"), out / "GDPO" / f"checkpoint-{step:07d}")
        own = {k.replace(".default", ""): p for k, p in lora.parameters(generator.unet).items()}
        found = [torch.equal(p, v) for k, p in own.items() for name, v in finished.items() if name.endswith(k)]
        assert len(found) == len(finished) and all(found) == same


def test_another_models_checkpoint_is_refused(tmp_path, trained):
    tensors, facts = {"trainable": {"x": torch.ones(1)}, "optimizer": {}}, checkpoints.Facts(1, {}, "crops", 1)
    folder = checkpoints.save(tmp_path, checkpoints.Checkpoint(tensors, facts), keep=2)
    with pytest.raises(ValueError, match="another model's checkpoint"):
        gdpo_ablation.at_checkpoint(str(trained), folder)


def gain(trained, folder, out, crops: int) -> str:
    """The table that gdpo.evaluation.before_after prints."""
    options = gdpo_gain.Options(
        str(trained), data=str(folder), out=str(out), crops=crops, crop_size=64, noises=1, reward_funcs=("psnr_y",),
        preset="light",
    )  # fmt: skip
    return gdpo_gain.table(gdpo_gain.measure(OneStepGenerator.from_pretrained(trained), options))


def test_the_command_takes_what_training_took(tmp_path, crops, trained, monkeypatch, capsys):
    shutil.copytree(crops, tmp_path / "crops" / "val")
    out, seen = tmp_path / "out", []
    monkeypatch.setattr(gdpo_gain, "GroupReward", lambda *a: seen.append(a[1:]) or GroupReward(*a))
    words = ["--before-after", trained, "--data", tmp_path / "crops", "--out", out, "--crops", 2, "--crop_size", 64]
    words += ["--noises", 1, "--preset", "light", "--reward_funcs=[psnr_y,region_detail]", "--reward_weights=[9,1]"]
    words += ["--reward_normalization", "weighted", "--rho", "0.5", "--texture_threshold", "40"]
    words += ["--metrics=[ssim_y]"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, words)])
    assert evaluate.main() == 0
    assert seen == [((9.0, 1.0), "weighted", 0.5, 40.0)]
    text = (out / "table.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip() and (out / "sheet.png").is_file()
    assert "| ssim_y |" in text and "grid_artefact" not in text
    with pytest.raises(ValueError, match="unknown metric 'nonsense'"):
        gdpo_gain.load_metrics(("nonsense",))
    assert {"grid_artefact", "lattice_artefact", "oversharpening"} <= gdpo_gain.load_metrics(("auto",)).keys()


def test_a_strength_goes_further_than_training(tmp_path, crops, trained, monkeypatch):
    shutil.copytree(crops, tmp_path / "crops" / "val")
    generator = OneStepGenerator.from_pretrained(trained)
    lora.add(generator.unet, 2, ["conv1"])
    with torch.no_grad():
        for name, parameter in lora.parameters(generator.unet).items():
            if ".lora_B." in name:
                parameter += 0.02
    generator.save_pretrained(tmp_path / "model")

    def shown(strength: str, model: Path) -> float:
        words = ["--before-after", model, "--data", tmp_path / "crops", "--out", tmp_path / "out", "--crops", 2]
        words += ["--crop_size", 64, "--noises", 1, "--preset", "light", "--reward_funcs=[psnr_y]", "--metrics=[]"]
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, words), "--strength", strength])
        assert evaluate.main() == 0
        _, before, after, *_ = next(
            line.strip("| ").split(" | ") for line in (tmp_path / "out" / "table.md").read_text().splitlines()
            if line.startswith("| psnr_y")
        )  # fmt: skip
        return abs(float(after) - float(before))

    change = [shown(strength, tmp_path / "model") for strength in ("0", "1", "2")]
    assert change[0] == 0 < change[1] < change[2]
    with pytest.raises(ValueError, match="has no LoRA apart; strength 2"):
        shown("2", trained)
    with pytest.raises(ValueError, match="strength must be at least 0 and finite"):
        shown("inf", trained)


def test_a_crop_is_counted_once_and_its_photo_is_told(tmp_path, crops, trained):
    folder = tmp_path / "crops"
    shutil.copytree(crops, folder / "val")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"crops must be at most 16, .*; got 17"):
        gain(trained, folder, tmp_path / "out", 17)
    assert gain(trained, folder, tmp_path / "out", 2).startswith("2 held-out crops, 1 noises")

    # Crops 0, 5 and 10 are taken: with six crops a photo the first two are of one photo.
    names = sorted(p.name for p in (folder / "val").iterdir())
    rows = [{"file": f"val/{n}", "size": 96, "source": f"photo{i // 6}"} for i, n in enumerate(names)]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert gain(trained, folder, tmp_path / "out", 3).startswith("3 held-out crops of 2 photo(s), 1 noises")
