"""What diffusers and peft, unmodified, make of our folders, and what we make of theirs: the same pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from gdpo.generator import OneStepGenerator
from gdpo.model import lora, lora_files

RANK = 4
PEFT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def stir(parameters, seed: int = 4) -> None:
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.05 * torch.randn(p.shape, generator=draws))


def adapted(base: Path, alpha: int, whole: bool, variant: str = "") -> OneStepGenerator:
    generator = OneStepGenerator.from_pretrained(base)
    train_whole = ("conv_in",) if whole else ()
    options = {variant: True} if variant else {}
    lora.add(generator.unet, RANK, lora.UNET_TARGETS, alpha=alpha, train_whole=train_whole, **options)
    lora.add(generator.vae, RANK, lora.VAE_ENCODER_TARGETS, alpha=alpha, **options)
    stir([*lora.parameters(generator.unet).values(), *lora.parameters(generator.vae).values()])
    return generator


@torch.no_grad()
def pixels(unet, vae, text: torch.Tensor) -> torch.Tensor:
    """One step by diffusers' modules alone, in float64 sums of float32 weights: the paper's equation at 250 and 100."""
    draws = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 64, 64, generator=draws) * 2 - 1
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    a = torch.cumprod(1 - betas, 0)
    a_n, a_d = float(a[250]), float(a[100])
    latent = vae.encode(image).latent_dist.mode() * vae.config.scaling_factor
    noisy = a_n**0.5 * latent + (1 - a_n) ** 0.5 * torch.randn(latent.shape, generator=draws)
    noise = unet(noisy, torch.tensor([100]), encoder_hidden_states=text).sample
    return vae.decode((noisy - (1 - a_d) ** 0.5 * noise) / a_d**0.5 / vae.config.scaling_factor).sample.clamp(-1, 1)


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max())


KINDS = [
    pytest.param((RANK, False), marks=pytest.mark.slow),
    pytest.param((2 * RANK, False), marks=pytest.mark.slow),
    (2 * RANK, True),
    (2 * RANK, True, "rslora"),
    (2 * RANK, False, "dora"),
]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def saved(request, mini_sd, tmp_path_factory):
    """(folder, our picture, the base's picture, the text) of a model with a trained LoRA at this alpha."""
    generator = adapted(mini_sd, *request.param)
    folder = tmp_path_factory.mktemp("saved") / "model"
    generator.save_pretrained(folder)
    text = generator.text_embeds(1).clone()
    ours = pixels(generator.merge_lora().unet, generator.vae, text)
    base = OneStepGenerator.from_pretrained(mini_sd)
    assert off(ours, pixels(base.unet, base.vae, text)) > 1e-2, "teeth: the LoRA does something"
    return folder, ours, text


def adapted_vae(folder: Path, pipeline):
    return PeftModel.from_pretrained(pipeline.vae, str(folder / "vae_lora")).eval().base_model.model


# conv_in trained whole has a bias, and peft then wants one in every pair, also of layers that have none.
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("where", [".", "unet_lora"])
def test_a_pipeline_of_diffusers_gives_our_picture(saved, where):
    folder, ours, text = saved
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    without = pixels(pipeline.unet, pipeline.vae, text)
    pipeline.load_lora_weights(str(folder / where))
    assert off(pixels(pipeline.unet.eval(), adapted_vae(folder, pipeline), text), ours) < 1e-4 < off(without, ours)


def test_peft_gives_our_picture(saved):
    folder, ours, text = saved
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    unet = PeftModel.from_pretrained(pipeline.unet, str(folder / "unet_lora")).eval().base_model.model
    assert off(pixels(unet, adapted_vae(folder, pipeline), text), ours) < 1e-4


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_unet_and_vae_of_diffusers_take_the_adapter_files(saved):
    folder, ours, text = saved
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.unet.load_lora_adapter(
        str(folder / "unet_lora"), weight_name=lora_files.PEFT_WEIGHTS, prefix=None
    )  # fmt: skip
    pipeline.vae.load_lora_adapter(str(folder / "vae_lora"), weight_name=lora_files.PEFT_WEIGHTS, prefix=None)
    assert off(pixels(pipeline.unet.eval(), pipeline.vae.eval(), text), ours) < 1e-4


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_a_pipeline_takes_pefts_file_where_nothing_was_trained_whole(saved):
    folder, ours, text = saved
    if lora_files.read(folder / "unet_lora").whole:
        pytest.skip("diffusers takes no file with a name that is not of a LoRA")
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.load_lora_weights(str(folder / "unet_lora"), weight_name=lora_files.PEFT_WEIGHTS)
    assert off(pixels(pipeline.unet.eval(), adapted_vae(folder, pipeline), text), ours) < 1e-4


def test_a_merged_folder_is_a_pipeline_that_gives_our_picture(saved, tmp_path):
    folder, ours, text = saved
    OneStepGenerator.from_pretrained(folder).merge_lora().save_pretrained(tmp_path / "merged")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "merged", safety_checker=None)
    assert off(pixels(pipeline.unet, pipeline.vae, text), ours) < 1e-4
    assert pipeline.tokenizer is not None and pipeline.text_encoder is not None


def test_our_own_reading_gives_our_picture_also_of_an_old_folder_and_of_diffusers_file(saved, tmp_path):
    folder, ours, text = saved

    def old(where: Path) -> None:  # before both forms were written: bare names, no diffusers' file
        tensors = load_file(where / "unet_lora" / lora_files.PEFT_WEIGHTS)
        prefix = lora_files.PEFT_PREFIX
        bare = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        save_file(bare, where / "unet_lora" / lora_files.PEFT_WEIGHTS)
        (where / "unet_lora" / lora_files.DIFFUSERS_WEIGHTS).unlink()
        (where / lora_files.DIFFUSERS_WEIGHTS).unlink()

    def single_file(where: Path) -> None:
        shutil.rmtree(where / "unet_lora")

    def as_it_is(where: Path) -> None:
        pass

    for i, change in enumerate((as_it_is, old, single_file)):
        shutil.copytree(folder, copy := tmp_path / str(i))
        change(copy)
        generator = OneStepGenerator.from_pretrained(copy)
        assert lora.adapters(generator.unet)
        assert off(pixels(generator.unet, generator.vae, text), ours) < 1e-4


def test_dora_beside_a_module_trained_whole_is_written_as_peft_does_alone(mini_sd, tmp_path):
    """As pairs alone, which is diffusers' form, such a module needs a bias, and peft has none for DoRA."""
    generator = adapted(mini_sd, 2 * RANK, True, "dora")
    generator.save_pretrained(folder := tmp_path / "model")
    assert not list(folder.rglob(lora_files.DIFFUSERS_WEIGHTS))
    text = generator.text_embeds(1).clone()
    ours = pixels(generator.merge_lora().unet, generator.vae, text)
    again = OneStepGenerator.from_pretrained(folder)
    assert off(pixels(again.unet, again.vae, text), ours) < 1e-4
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    unet = PeftModel.from_pretrained(pipeline.unet, str(folder / "unet_lora")).eval().base_model.model
    assert off(pixels(unet, adapted_vae(folder, pipeline), text), ours) < 1e-4


def peft_wrote(unet, folder: Path, **options) -> torch.nn.Module:
    model = get_peft_model(unet, LoraConfig(r=4, target_modules=PEFT_TARGETS, init_lora_weights=False, **options))
    model.save_pretrained(folder)
    return model.eval().base_model.model


VARIANTS = [
    {"lora_alpha": 4},
    {"lora_alpha": 8},
    {"lora_alpha": 8, "use_rslora": True},
    {"lora_alpha": 8, "use_dora": True},
    {"lora_alpha": 8, "rank_pattern": {"to_v": 2}, "alpha_pattern": {"to_v": 16}},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_lora_that_peft_wrote_is_read(options, mini_sd, tmp_path):
    shutil.copytree(mini_sd, tmp_path / "model")
    theirs = peft_wrote(UNet2DConditionModel.from_pretrained(mini_sd / "unet"), tmp_path / "model/unet_lora", **options)
    read = OneStepGenerator.from_pretrained(tmp_path / "model")
    read.save_pretrained(tmp_path / "again")
    again = OneStepGenerator.from_pretrained(tmp_path / "again")
    text = read.text_embeds(1)
    expected = pixels(theirs, read.vae, text)
    assert off(pixels(read.unet, read.vae, text), expected) < 1e-5
    assert off(pixels(again.unet, read.vae, text), expected) < 1e-5
    assert off(pixels(again.merge_lora().unet, read.vae, text), expected) < 1e-4


def in_old_names(layers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As diffusers wrote them before it used peft's names."""
    names = {k: k.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.") for k in layers}
    return {names[k]: v for k, v in layers.items()}


@pytest.mark.parametrize("names", ["new", "old", "new with metadata"])
@pytest.mark.parametrize("where", ["unet_lora", "."])
def test_a_lora_that_diffusers_wrote_is_read(names, where, mini_sd, tmp_path):
    shutil.copytree(mini_sd, tmp_path / "model")
    alpha = 8 if "metadata" in names else 4
    unet = UNet2DConditionModel.from_pretrained(mini_sd / "unet")
    unet.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=PEFT_TARGETS, init_lora_weights=False))
    layers = get_peft_model_state_dict(unet)
    more = {"unet_lora_adapter_metadata": unet.peft_config["default"].to_dict()} if "metadata" in names else {}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "model" / where, in_old_names(layers) if names == "old" else layers, **more
    )
    read = OneStepGenerator.from_pretrained(tmp_path / "model")
    text = read.text_embeds(1)
    assert off(pixels(read.unet, read.vae, text), pixels(unet.eval(), read.vae, text)) < 1e-5


def test_weights_in_half_precision_alone_are_read(mini_sd, tmp_path):
    """A folder of the hub's variant fp16: no other weights beside."""
    shutil.copytree(mini_sd, tmp_path / "model")
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        file = tmp_path / "model" / part / f"{name}.safetensors"
        halves = {k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}
        save_file(halves, file.with_name(f"{name}.fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()
    whole, half = (OneStepGenerator.from_pretrained(f) for f in (mini_sd, tmp_path / "model"))
    for a, b in zip(whole.state_dict().values(), half.state_dict().values()):
        torch.testing.assert_close(b, a.half().to(b.dtype))
    torch.testing.assert_close(half.text_embeds(1), whole.text_embeds(1), rtol=0.02, atol=0.02)


def change_config(**values):
    def change(folder: Path) -> None:
        file = folder / "unet_lora" / lora_files.PEFT_CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def change_tensors(how):
    def change(folder: Path) -> None:
        file = folder / "unet_lora" / lora_files.PEFT_WEIGHTS
        save_file(how(load_file(file)), file, metadata={"format": "pt"})

    return change


REFUSED = {
    "an absurd rank": (change_config(r=10**12), "must have rank 4"),
    "a rank that is a text": (change_config(r="many"), "must have rank 4"),
    "an endless pattern": (change_config(alpha_pattern={"(a+)+$": 8}), "alpha_pattern must name modules"),
    "alpha not a number": (change_config(lora_alpha="8"), "lora_alpha must be a number"),
    "alpha out of range": (change_config(lora_alpha=1e300), "lora_alpha must be a number"),
    "another method": (change_config(peft_type="LOKR"), "peft_type must be LORA"),
    "a flag that is none": (change_config(use_dora="yes"), "use_dora must be true or false"),
    "no LoRA": (change_tensors(lambda t: {"x.weight": torch.zeros(1)}), "there is no LoRA"),
    "half a pair": (
        change_tensors(lambda t: {k: v for k, v in t.items() if "lora_A" in k or "to_q" not in k}),
        "lora_B.weight is missing",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_lora_that_cannot_be_is_refused_before_anything_is_made(name, mini_sd, tmp_path):
    change, message = REFUSED[name]
    shutil.copytree(mini_sd, tmp_path / "model")
    unet = UNet2DConditionModel.from_pretrained(mini_sd / "unet")
    lora.add(unet, RANK, lora.UNET_TARGETS)
    lora.save(unet, tmp_path / "model" / "unet_lora")
    OneStepGenerator.from_pretrained(tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(ValueError, match=message) as refused:
        OneStepGenerator.from_pretrained(tmp_path / "model")
    assert str(tmp_path / "model" / "unet_lora") in str(refused.value) and len(str(refused.value)) < 600


def test_a_lora_is_written_as_the_same_bytes_every_time(tmp_path):
    """A run that was killed and resumed ends with the bytes of one that was not."""
    tensors = {"to_q.lora_A.weight": torch.ones(2, 4), "to_q.lora_B.weight": torch.ones(4, 2)}
    files = []
    for i in range(16):  # two entries of metadata have two orders
        adapter = lora_files.Adapter(tensors, 2.0)
        lora_files.write(adapter, tmp_path / str(i), adapter, ("", "unet."))
        lora_files.write_diffusers(adapter, tmp_path / str(i))
        names = (lora_files.PEFT_WEIGHTS, lora_files.DIFFUSERS_WEIGHTS)
        files.append(tuple((tmp_path / str(i) / name).read_bytes() for name in names))
    assert len(set(files)) == 1
    read = load_file(tmp_path / "0" / lora_files.DIFFUSERS_WEIGHTS)
    assert {k.removeprefix("unet."): v.tolist() for k, v in read.items()} == {k: v.tolist() for k, v in tensors.items()}


def test_no_file_says_where_on_this_machine_the_base_was_read(mini_sd, tmp_path):
    base = tmp_path / "of-a-private-project"
    shutil.copytree(mini_sd, base)
    generator = adapted(base, alpha=8, whole=True)
    assert generator.unet.config._name_or_path, "diffusers remembers it"
    generator.save_pretrained(tmp_path / "out")
    texts = [f for f in (tmp_path / "out").rglob("*") if f.suffix in (".json", ".py", ".md")]
    assert texts and not [f for f in texts if base.name in f.read_text()]
    assert UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet").config.in_channels == 4
