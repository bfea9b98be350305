"""The ablation trains its variants, measures them at every checkpoint and goes on where it was."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import gdpo_ablation
from gdpo import lora
from gdpo.train import checkpoint as checkpoints


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
    folder = checkpoints.save(
        tmp_path, checkpoints.Checkpoint({"trainable": {"x": torch.ones(1)}}, {"step": 1}), keep=2
    )
    with pytest.raises(ValueError, match="another model's checkpoint"):
        gdpo_ablation.at_checkpoint(str(trained), folder)
