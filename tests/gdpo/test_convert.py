"""gdpo.convert and gdpo.merge: both released forms, LoRA scale and merge against independent float64 arithmetic."""

import json
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from engine.runtime import manifest
from gdpo.convert import convert
from gdpo.generator import OneStepGenerator
from gdpo.merge import main as merge_main
from gdpo.merge import merge
from gdpo.model.released import read_released
from tests.support import commands

# ---- Files as the authors release them, made the way their code makes them: diffusers and peft, three adapters.

UNET_PATTERNS = ("to_k", "to_q", "to_v", "to_out.0", "conv", "proj_out", "proj_in", "ff.net.2", "ff.net.0.proj")
VAE_PATTERNS = ("conv", "to_k", "to_q", "to_v", "to_out.0")


def adapted_unet(folder: Path, rank: int, *, train_conv_in: bool):
    """(UNet with three live adapters, their module lists), LoRA weights as after training: nowhere zero."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    groups: dict[str, list[str]] = {"encoder": [], "decoder": [], "others": []}
    for name in _weights(unet, UNET_PATTERNS):
        down, up = "down_blocks" in name or "conv_in" in name, "up_blocks" in name
        groups["encoder" if down else "decoder" if up else "others"].append(name)
    _adapt(unet, groups, rank)
    if train_conv_in:
        with torch.no_grad():
            for p in unet.conv_in.base_layer.parameters():
                p += 0.1 * torch.randn_like(p)
    return unet, groups


def adapted_vae(folder: Path, rank: int):
    """(VAE with two adapters of which the decoder's is untrained: B = 0, their module lists)."""
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    groups: dict[str, list[str]] = {"encoder": [], "decoder": []}
    for name in _weights(vae, VAE_PATTERNS):
        groups["encoder" if name.startswith(("encoder", "quant_conv")) else "decoder"].append(name)
    _adapt(vae, groups, rank)
    with torch.no_grad():
        for name, p in vae.named_parameters():
            if "lora_B.default_decoder" in name:
                p.zero_()
    return vae, groups


def _weights(model, patterns):
    names = [n for n, _ in model.named_parameters() if "bias" not in n and "norm" not in n]
    return [n.removesuffix(".weight") for n in names if any(p in n for p in patterns)]


def _adapt(model, groups, rank):
    for group, modules in groups.items():
        config = LoraConfig(r=rank, init_lora_weights="gaussian", target_modules=modules)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            model.add_adapter(config, adapter_name=f"default_{group}")
    model.set_adapter([f"default_{group}" for group in groups])
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.05 * torch.randn(p.shape, generator=generator))


def released_dict(unet, unet_groups, rank, vae=None, vae_groups=None, rank_vae=None) -> dict:
    """The dict of a released file: stage one with a VAE, stage two without."""
    content = {f"unet_lora_{group}_modules": modules for group, modules in unet_groups.items()}
    content["rank_unet"] = rank
    content["state_dict_unet"] = {k: v for k, v in unet.state_dict().items() if "lora" in k or "conv_in" in k}
    if vae is not None:
        content |= {f"vae_lora_{group}_modules": modules for group, modules in vae_groups.items()}
        content |= {"vae_lora_others_modules": [], "rank_vae": rank_vae}
        content["state_dict_vae"] = {k: v for k, v in vae.state_dict().items() if "lora" in k}
    return content


# ---- The tests

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def stage_one(mini_sd, tmp_path_factory):
    """(file, content, UNet and VAE with live adapters) of a stage-one release, ranks 4 and 2."""
    unet, unet_groups = adapted_unet(mini_sd, 4, train_conv_in=True)
    vae, vae_groups = adapted_vae(mini_sd, 2)
    content = released_dict(unet, unet_groups, 4, vae, vae_groups, 2)
    file = tmp_path_factory.mktemp("released") / "model_1001.pkl"
    torch.save(content, file)
    return file, content, unet, vae


@pytest.fixture(scope="module")
def converted(stage_one, mini_sd, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "naosd"
    convert(stage_one[0], out, mini_sd)
    return out


def expected_weights(base: Path, state: dict, rank: int, strength: float) -> dict[str, torch.Tensor]:
    """Merged weights in float64, from the released tensors alone: W + strength * 8/rank * sum_r B[:,r] A[r]."""
    weights = {name: w.double() for name, w in load_file(base / WEIGHTS).items()}
    for key, a in state.items():
        if ".lora_A." not in key:
            continue
        module = key.split(".lora_A.")[0]
        a, b = a.double(), state[key.replace("lora_A", "lora_B")].double()
        delta = sum(torch.outer(b.reshape(len(b), rank)[:, r], a[r].reshape(-1)) for r in range(rank))
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + strength * 8 / rank * delta.reshape(
            weights[f"{module}.weight"].shape
        )
    for leaf in ("weight", "bias"):  # trained whole: what the file holds replaces what the base has
        if (trained := state.get(f"conv_in.base_layer.{leaf}")) is not None:
            base_value = load_file(base / WEIGHTS)[f"conv_in.{leaf}"].double()
            weights[f"conv_in.{leaf}"] += strength * (trained.double() - base_value)
    return weights


def worst_error(folder: Path, expected: dict[str, torch.Tensor]) -> float:
    """The largest relative L2 error of any tensor."""
    got = load_file(folder / WEIGHTS)
    assert got.keys() == expected.keys()
    return max(float((got[k].double() - v).norm() / (v.norm() + 1e-12)) for k, v in expected.items())


@pytest.mark.parametrize("strength", [0.3, *(pytest.param(end, marks=pytest.mark.slow) for end in (0.0, 1.0))])
def test_lora_scale_and_merge_match_float64(converted, stage_one, mini_sd, tmp_path, strength):
    merge(converted, tmp_path / "merged", strength)
    _, content, _, _ = stage_one
    for part, rank in (("unet", 4), ("vae", 2)):
        expected = expected_weights(mini_sd / part, content[f"state_dict_{part}"], rank, strength)
        assert worst_error(tmp_path / "merged" / part, expected) < 2e-7  # float32 rounding alone
        if strength:  # teeth: alpha = rank in place of alpha = 8 would be seen
            wrong = expected_weights(mini_sd / part, content[f"state_dict_{part}"], rank, strength * rank / 8)
            assert worst_error(tmp_path / "merged" / part, wrong) > 1e-3
    assert not list((tmp_path / "merged").glob("*_lora"))


def test_linear_and_convolution_layers_are_both_there(stage_one):
    dims = {v.dim() for k, v in stage_one[1]["state_dict_unet"].items() if "lora_A" in k}
    assert dims == {2, 4}


def test_the_live_and_the_merged_folder_predict_what_the_authors_model_predicts(converted, stage_one, tmp_path):
    _, _, unet, vae = stage_one
    merge(converted, tmp_path / "merged")
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    for folder in (converted, tmp_path / "merged"):
        generator = OneStepGenerator.from_pretrained(folder)
        text = generator.text_embeds(1)
        with torch.no_grad():
            latents = generator.encode(images)
            torch.testing.assert_close(latents, vae.encode(images).latent_dist.mode() * 0.18215, rtol=1e-4, atol=1e-6)
            expected = unet(noise, 100, encoder_hidden_states=text).sample
            got = generator.unet(noise, 100, encoder_hidden_states=text).sample
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert (generator.t_noise, generator.t_diffusion) == (250, 100)


def test_with_the_lora_switched_off_the_converted_unet_is_the_base(converted, mini_sd):
    live, base = OneStepGenerator.from_pretrained(converted), OneStepGenerator.from_pretrained(mini_sd)
    z, text = torch.randn(1, 4, 8, 8), base.text_embeds(1)
    with torch.no_grad(), live.reference():
        assert torch.equal(live.unet(z, 100, text).sample, base.unet(z, 100, text).sample)


def test_stage_two_needs_no_vae_part_and_notes_another_base(mini_sd, converted, stage_one, tmp_path, capsys):
    merge(converted, tmp_path / "naosd")
    unet, groups = adapted_unet(tmp_path / "naosd", 4, train_conv_in=False)
    torch.save(released_dict(unet, groups, 4), tmp_path / "gdpo.pkl")
    convert(tmp_path / "gdpo.pkl", tmp_path / "out", tmp_path / "naosd")
    assert capsys.readouterr().err == ""
    assert (tmp_path / "out" / "unet_lora").is_dir() and not (tmp_path / "out" / "vae_lora").exists()
    convert(tmp_path / "gdpo.pkl", tmp_path / "other", mini_sd)
    assert "belongs on the NAOSD model" in capsys.readouterr().err


def test_lora_alpha_changes_the_scale(stage_one, mini_sd, tmp_path):
    convert(stage_one[0], tmp_path / "live", mini_sd, lora_alpha=4, t_noise=200, t_diffusion=90)
    merge(tmp_path / "live", tmp_path / "merged")
    expected = expected_weights(mini_sd / "vae", stage_one[1]["state_dict_vae"], 2, 0.5)
    assert worst_error(tmp_path / "merged" / "vae", expected) < 2e-7
    remembered = json.loads((tmp_path / "live" / "generator.json").read_text())
    assert (remembered["t_noise"], remembered["t_diffusion"]) == (200, 90)


@pytest.mark.parametrize("complete", [True, False])
def test_the_merged_folder_form(mini_sd, tmp_path, complete):
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler") if complete else ("unet", "vae"):
        shutil.copytree(mini_sd / part, tmp_path / "released" / part)
    for part in ("unet", "vae"):  # a release differs from its base
        file = tmp_path / "released" / part / WEIGHTS
        save_file({k: v + 0.01 for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    convert(tmp_path / "released", tmp_path / "out", None if complete else mini_sd)
    for part in ("unet", "vae"):
        got, theirs = load_file(tmp_path / "out" / part / WEIGHTS), load_file(tmp_path / "released" / part / WEIGHTS)
        assert got.keys() == theirs.keys() and all(torch.equal(got[k], theirs[k]) for k in got)
    generator = OneStepGenerator.from_pretrained(tmp_path / "out")
    assert (generator.t_noise, generator.t_diffusion) == (250, 100)
    base = OneStepGenerator.from_pretrained(mini_sd)
    torch.testing.assert_close(generator.text_embeds(1), base.text_embeds(1), rtol=0, atol=0)


def damaged(content: dict, change) -> dict:
    copy = {k: dict(v) if isinstance(v, dict) else list(v) if isinstance(v, list) else v for k, v in content.items()}
    change(copy)
    return copy


A_KEY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.default_others.weight"
DAMAGES = {
    "no rank": (lambda c: c.pop("rank_unet"), "rank_unet must be a positive integer; got None"),
    "rank of text": (lambda c: c.update(rank_unet="4"), "rank_unet must be a positive integer; got '4'"),
    "another rank": (lambda c: c.update(rank_unet=3), r"must have the shapes \(3, "),
    "no list": (lambda c: c.pop("unet_lora_decoder_modules"), "unet_lora_decoder_modules must be a list of module"),
    "no state": (lambda c: c.pop("state_dict_unet"), "state_dict_unet must be a dict; got NoneType"),
    "no A": (lambda c: c["state_dict_unet"].pop(A_KEY), "differ by 1 modules, such as 'mid_block.attentions.0"),
    "no B": (lambda c: c["state_dict_vae"].pop(next(k for k in c["state_dict_vae"] if "lora_B" in k)), "differ by 1"),
    "unlisted": (lambda c: c["unet_lora_others_modules"].pop(), "differ by 1 modules"),
    "integers": (lambda c: c["state_dict_unet"].update({A_KEY: torch.zeros(4, 32).int()}), "names 'torch.IntStorage'"),
    "not a tensor": (lambda c: c["state_dict_unet"].update({A_KEY: "weights"}), "floating-point tensor"),
    "NaN": (lambda c: c["state_dict_unet"].update({A_KEY: torch.full((4, 32), torch.nan)}), "to_q holds values that"),
    "endless view": (
        lambda c: c["state_dict_unet"].update({A_KEY: torch.zeros(1).expand(2**40)}),
        r"must have the shapes .* got \(1099511627776,\)",
    ),
    "another model": (
        lambda c: (
            c["unet_lora_others_modules"].append("mid_block.else"),
            c["state_dict_unet"].update(
                {f"mid_block.else.lora_{s}.default_others.weight": torch.zeros(4, 4) for s in "AB"}
            ),
        ),
        "'mid_block.else', a layer that the base does not have",
    ),
    "foreign key": (lambda c: c["state_dict_unet"].update({"x": torch.zeros(1)}), "'x', which is neither LoRA nor"),
    "conv_in shape": (
        lambda c: c["state_dict_unet"].update({"conv_in.base_layer.weight": torch.zeros(16, 8, 3, 3)}),
        r"conv_in must have the shapes .* got .*\(16, 8, 3, 3\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_lora_file_is_named_and_leaves_nothing(damage, stage_one, mini_sd, tmp_path):
    change, message = DAMAGES[damage]
    torch.save(damaged(stage_one[1], change), tmp_path / "bad.pkl")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "bad.pkl", tmp_path / "out", mini_sd)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.pkl"]


def test_an_intact_file_passes_the_reader(stage_one):
    unet, vae, osediff = read_released(stage_one[0])
    assert not osediff
    assert unet.rank == 4 and vae is not None and vae.rank == 2 and set(unet.conv_in) == {"weight", "bias"}


def test_existing_folders_are_refused_and_overwritten_only_on_demand(converted, mini_sd, tmp_path):
    out = tmp_path / "out"
    merge(converted, out, 0.0)
    before = (out / "unet" / WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError, match="out exists; give another folder, or --overwrite"):
        merge(converted, out)
    assert (out / "unet" / WEIGHTS).read_bytes() == before
    merge(converted, out, 1.0, overwrite=True)
    assert (out / "unet" / WEIGHTS).read_bytes() != before
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="not a model folder"):
        merge(converted, tmp_path / "home", overwrite=True)
    with pytest.raises(ValueError, match="must not be an input"):
        merge(converted, converted, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "out"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda base, tmp: merge(base, tmp / "out"), "there is nothing to merge"),
        (lambda base, tmp: merge(tmp / "none", tmp / "out"), "none: no such folder"),
        (lambda base, tmp: convert(tmp / "none.pkl", tmp / "out", base), "none.pkl: no such file"),
        (lambda base, tmp: convert(base / "vae", tmp / "out", base), "unet: no such folder"),
    ],
)
def test_wrong_inputs_are_named(call, message, mini_sd, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(mini_sd, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_lora_file_without_a_base_and_parts_of_different_models(stage_one, mini_sd, tmp_path):
    with pytest.raises(ValueError, match="--base must name the model folder"):
        convert(stage_one[0], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="text_encoder: no such folder; name a --base that has it"):
        shutil.copytree(mini_sd / "unet", tmp_path / "parts" / "unet")
        shutil.copytree(mini_sd / "vae", tmp_path / "parts" / "vae")
        shutil.copytree(mini_sd / "scheduler", tmp_path / "parts" / "scheduler")
        convert(tmp_path / "parts", tmp_path / "out")
    other = tmp_path / "other"
    shutil.copytree(mini_sd, other)
    config = json.loads((other / "text_encoder" / "config.json").read_text())
    (other / "text_encoder" / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    with pytest.raises(ValueError, match=r"text of width 32; .* the text encoder 48"):
        convert(tmp_path / "parts", tmp_path / "out", other)


def test_the_command_lines(stage_one, mini_sd, tmp_path, monkeypatch, capsys):
    live, merged = tmp_path / "live", tmp_path / "merged"
    done = commands.run("gdpo.convert", stage_one[0], "--base", mini_sd, "--out", live)
    assert done.returncode == 0 and f"python -m gdpo.merge {live}" in done.stdout
    monkeypatch.setattr(sys, "argv", ["merge", str(live), "--out", str(merged), "--strength", "0.5"])
    merge_main()
    assert "merged at strength 0.5" in capsys.readouterr().out
    done = commands.run("gdpo.merge", live, "--out", merged)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: {merged} exists; give another folder, or --overwrite"
    monkeypatch.setattr(sys, "argv", ["merge", str(live), "--out", str(tmp_path / "x"), "--strength", "-0.5"])
    with pytest.raises(SystemExit, match="2"):
        merge_main()
    assert "strength" in capsys.readouterr().err and not (tmp_path / "x").exists()


# ---- This project's own form: an exported tiny model.


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[OneStepGenerator, Path]:
    """A tiny generator whose timestep matters, and its export (which folds a copy in place)."""
    from engine.export.generator import export_generator
    from gdpo.model.tiny import TinyUNetConfig
    from gdpo.randomness import normal

    folder = tmp_path_factory.mktemp("exported")
    shape = TinyUNetConfig(block_out_channels=(8, 24), layers_per_block=1, head_channels=(16, 8))
    generator = OneStepGenerator.tiny(shape, t_noise=70, t_diffusion=40)
    for i, parameter in enumerate(generator.unet.parameters()):
        parameter.data += 0.05 * normal(parameter.shape, 0, "stir", i)
    generator.save_pretrained(folder / "model")
    export_generator(OneStepGenerator.from_pretrained(folder / "model"), folder / "onnx")
    return generator, folder / "onnx"


def test_an_exported_tiny_model_comes_back(exported, tmp_path):
    generator, folder = exported
    convert(folder, tmp_path / "model")
    again = OneStepGenerator.from_pretrained(tmp_path / "model")
    assert (again.t_noise, again.t_diffusion) == (70, 40)
    image, noise = torch.rand(2, 3, 64, 32) * 2 - 1, torch.randn(2, 48, 16, 8)
    with torch.no_grad():
        a, b = (g.decode(g.predict(g.encode(image), noise).x0) for g in (generator, again))
        start = (a - image).abs().mean()
    assert (a - b).abs().max() < 1e-5 < 1e-3 < start
    assert torch.count_nonzero(again.unet.encoder[0][0].time.weight) == 0
    assert torch.count_nonzero(generator.unet.encoder[0][0].time.weight) > 0, "else nothing had been folded"


def test_a_bundled_model_by_its_name(tmp_path):
    convert("tiny", tmp_path / "model")
    assert OneStepGenerator.from_pretrained(tmp_path / "model").t_noise == 60


def test_exports_that_cannot_come_back_are_refused(exported, tmp_path):
    _, folder = exported
    with pytest.raises(ValueError, match="is an exported model, whole as it is: no --base"):
        convert(folder, tmp_path / "model", tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    content = bytearray((damaged / "generator.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "generator.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"generator\.onnx"):
        convert(damaged, tmp_path / "model")
    half = replace(manifest.load(folder), precision="bf16")
    shutil.copytree(folder, tmp_path / "half")
    half.save(tmp_path / "half")
    with pytest.raises(ValueError, match=r"whole and in fp32 .*got residual, bf16, onnx, generator"):
        convert(tmp_path / "half", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_osediffs_file_adapts_the_vaes_encoder_alone_and_lists_no_more_of_it(stage_one, converted, mini_sd, tmp_path):
    content = {
        k: v for k, v in stage_one[1].items() if k not in ("vae_lora_decoder_modules", "vae_lora_others_modules")
    }
    listed = set(content["vae_lora_encoder_modules"])
    assert listed, "teeth: the encoder is adapted"
    content["state_dict_vae"] = {
        k: v for k, v in content["state_dict_vae"].items() if k.split(".lora_")[0] in listed and "default_encoder" in k
    }
    torch.save(content, tmp_path / "osediff.pkl")
    convert(tmp_path / "osediff.pkl", tmp_path / "out", mini_sd)
    unet, theirs = (load_file(f / "unet_lora" / "adapter_model.safetensors") for f in (tmp_path / "out", converted))
    assert unet.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in unet.items())
    vae = load_file(tmp_path / "out" / "vae_lora" / "adapter_model.safetensors")
    modules = {k.removeprefix("base_model.model.").split(".lora_")[0] for k in vae}
    assert modules == listed
    generator = OneStepGenerator.from_pretrained(tmp_path / "out")
    assert (generator.t_noise, generator.t_diffusion) == (-1, 999)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    x0 = generator.predict(latents, noise).x0
    # OSEDiff's code: no noise, one step of a one-step schedule at 999 (which later versions of diffusers must be told).
    schedule = DDPMScheduler.from_pretrained(mini_sd / "scheduler", timestep_spacing="trailing")
    schedule.set_timesteps(1)
    predicted = generator.unet(latents, torch.tensor([999]), encoder_hidden_states=generator.text_embeds(1)).sample
    expected = schedule.step(predicted, 999, latents).prev_sample
    assert float((x0 - expected).norm() / expected.norm()) < 1e-5
    convert(tmp_path / "osediff.pkl", tmp_path / "asked", mini_sd, t_noise=250, t_diffusion=100)
    asked = OneStepGenerator.from_pretrained(tmp_path / "asked")
    assert (asked.t_noise, asked.t_diffusion) == (250, 100)


def test_pisasrs_file_is_named(tmp_path):
    torch.save({"unet_lora_encoder_modules_pix": [], "state_dict_unet": {}}, tmp_path / "pisa.pkl")
    with pytest.raises(ValueError, match="is PiSA-SR's"):
        read_released(tmp_path / "pisa.pkl")
