"""The options of a LoRA, from the command line to the files: which modules, DoRA, rsLoRA."""

import json

import pytest
import torch

from gdpo.generator import OneStepGenerator
from gdpo.model import lora
from gdpo.train.options import ModelConfig
from gdpo.train.setup import add_lora
from tests.support.training import GDPO, train_here


def test_a_run_with_named_modules_dora_and_rslora_is_a_model_and_its_checkpoint_too(
    crops, trained, tmp_path, monkeypatch
):
    from gdpo import merge

    run = tmp_path / "run"
    options = [f"--model.pretrained={trained}", f"--data.folder={crops}", f"--output_dir={run}", "--max_train_steps=2"]
    variant = ["--model.lora_target_modules=[conv1,head.out]", "--model.use_dora=true", "--model.use_rslora=true"]
    train_here(monkeypatch, *GDPO, *options, *variant, "--model.lora_alpha=3", "--validation_images=0")
    config = json.loads((run / "model" / "unet_lora" / "adapter_config.json").read_text())
    assert config["use_dora"] and config["use_rslora"] and config["lora_alpha"] == 3
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"conv1", "out"}

    live = OneStepGenerator.from_pretrained(run / "model")
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(live.encode(x).shape, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def picture(generator):
        return generator.decode(generator.predict(generator.encode(x), noise).x0)

    ours = picture(live)
    lora.activate(live.unet, None)
    assert (picture(live) - ours).abs().max() > 1e-4, "teeth: two steps have changed something"
    for source in ("model", "checkpoint-0000002"):
        merge.merge(run / source, tmp_path / source)
        again = OneStepGenerator.from_pretrained(tmp_path / source)
        assert (picture(again.merge_lora()) - ours).abs().max() < 1e-5


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 4), (True, 6 / 2)])
def test_the_scale_is_by_the_rank_or_its_root(rslora, scale):
    generator = OneStepGenerator.tiny()
    add_lora(generator, ModelConfig(lora_rank=4, lora_alpha=6, use_rslora=rslora, lora_target_modules=["conv1"]), 0)
    layers = [m for m in generator.unet.modules() if hasattr(m, "scaling")]
    assert layers and all(layer.scaling["default"] == scale for layer in layers)


def test_names_of_no_module_are_refused():
    line = r"model\.lora_target_modules must be .* such as .*conv1.*; got 'to_q'"
    with pytest.raises(ValueError, match=line):
        add_lora(OneStepGenerator.tiny(), ModelConfig(lora_target_modules=["conv1", "to_q"]), 0)
    with pytest.raises(ValueError, match="no LoRA for the modules"):
        add_lora(OneStepGenerator.tiny(), ModelConfig(lora_target_modules=["head"]), 0)
