"""Random-weight folders: diffusers itself loads them, a seed alone determines them, and they are whole or absent."""

import json

import pytest
import torch
from safetensors.torch import load_file

from engine.io.files import sha256
from gdpo.model import random_folder
from gdpo.model.random_folder import build_folder


def test_diffusers_and_transformers_load_every_part(mini_sd):
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    unet = UNet2DConditionModel.from_pretrained(mini_sd / "unet")
    vae = AutoencoderKL.from_pretrained(mini_sd / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(mini_sd / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(mini_sd / "text_encoder")
    scheduler = DDPMScheduler.from_pretrained(mini_sd / "scheduler")
    assert sum(p.numel() for p in unet.parameters()) < 1_000_000
    ids = tokenizer("Clean photo", padding="max_length", return_tensors="pt").input_ids
    words = tokenizer.convert_ids_to_tokens(ids[0])
    assert words[:5] == ["<|startoftext|>", "clean</w>", "photo</w>", "<|endoftext|>", "!"] and len(words) == 77
    with torch.no_grad():
        text = text_encoder(ids)[0]
        z = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode()
        noise = unet(z, 100, encoder_hidden_states=text).sample
        image = vae.decode(noise).sample
    assert text.shape == (1, 77, 32) and z.shape == (1, 4, 8, 8) and image.shape == (1, 3, 64, 64)
    # The schedule's two ends, from the definition.
    expected = torch.tensor([1 - 0.00085, 1 - 0.012], dtype=torch.float32)
    torch.testing.assert_close(scheduler.alphas[[0, -1]], expected)


def test_every_byte_has_a_token(mini_sd):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(mini_sd / "tokenizer")
    ids = tokenizer("éß 日本 ~").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "éß 日本 ~"


def test_a_seed_determines_the_weights_and_another_does_not(mini_sd, tmp_path):
    files = [f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")]
    files.append("text_encoder/model.safetensors")
    again, other = build_folder(tmp_path / "again"), build_folder(tmp_path / "other", seed=1)
    for name in files:
        assert sha256(mini_sd / name) == sha256(again / name) != sha256(other / name)


def test_taesd_half_precision_and_no_change_of_the_callers_random_state(tmp_path):
    from diffusers import AutoencoderTiny

    torch.manual_seed(5)
    before = torch.get_rng_state()
    folder = build_folder(tmp_path / "taesd", vae="taesd", dtype=torch.float16)
    assert torch.equal(before, torch.get_rng_state())
    assert {t.dtype for t in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").values()} == {
        torch.float16
    }
    vae = AutoencoderTiny.from_pretrained(folder / "vae")
    assert vae.decode(torch.zeros(1, 4, 8, 8)).sample.shape == (1, 3, 64, 64)
    assert json.loads((folder / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderTiny"]


@pytest.mark.parametrize(("size", "millions"), [("small", 34.6), ("sd21", 865.9)])
def test_the_larger_sizes_have_the_documented_number_of_parameters(size, millions):
    with torch.device("meta"):
        unet = random_folder._unet(random_folder.architecture(size)["unet"])
    assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_bad_arguments_are_named_and_leave_nothing(tmp_path):
    (tmp_path / "here").mkdir()
    with pytest.raises(FileExistsError, match="here exists"):
        build_folder(tmp_path / "here")
    with pytest.raises(ValueError, match="size must be one of mini, small, sd21; got 'big'"):
        build_folder(tmp_path / "out", size="big")
    with pytest.raises(ValueError, match="vae must be kl or taesd; got 'vq'"):
        build_folder(tmp_path / "out", vae="vq")
    assert [p.name for p in tmp_path.iterdir()] == ["here"]
