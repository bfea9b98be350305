"""Published networks as generators: their own pixels at first, to the bit through the engine, and back; bad files."""

import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from gdpo.convert import convert, main
from gdpo.generator import OneStepGenerator
from gdpo.merge import merge
from gdpo.model.network_unet import Recovery
from gdpo.model.spandrel_networks import import_spandrel, read_state, state_of_ncnn
from tests.support import commands

try:
    import_spandrel()
except RuntimeError as reason:
    pytest.skip(str(reason), allow_module_level=True)


def architecture(module: str, name: str, **options) -> torch.nn.Module:
    from importlib import import_module

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the architectures' code
        return getattr(import_module(f"spandrel.architectures.{module}"), name)(**options).eval()


def compact(scale: int = 4) -> torch.nn.Module:
    net = architecture("Compact.__arch.SRVGG", "SRVGGNetCompact", num_feat=8, num_conv=2, upscale=scale)
    for parameter in net.parameters():
        parameter.data *= 0.3
    return net


def rrdb(scale: int, blocks: int = 1, **more) -> torch.nn.Module:
    options = {"in_nc": 3, "out_nc": 3, "num_filters": 8, "num_blocks": blocks, "scale": scale} | more
    return architecture("ESRGAN.__arch.RRDB", "RRDBNet", **options)


def swinir() -> torch.nn.Module:
    options = {"depths": [2], "embed_dim": 8, "num_heads": [2], "window_size": 8, "upscale": 4}
    return architecture("SwinIR", "SwinIR", upsampler="pixelshuffledirect", **options)


NETWORKS = {
    "Compact": compact,
    "ESRGAN": lambda: rrdb(4),
    "ESRGAN x2": lambda: rrdb(2),
    "SwinIR": swinir,
    "RCAN": lambda: architecture("RCAN", "RCAN", scale=4, n_resgroups=1, n_resblocks=2, n_feats=16),
    "SPAN": lambda: architecture("SPAN", "SPAN", num_in_ch=3, num_out_ch=3, feature_channels=8),
    "PLKSR": lambda: architecture("PLKSR", "RealPLKSR", dim=8, n_blocks=1),
    "RealCUGAN": lambda: architecture("RealCUGAN", "UpCunet4x"),
}


def photo(height: int, width: int) -> np.ndarray:
    from skimage import data

    return np.ascontiguousarray(data.coffee()[100 : 100 + height, 200 : 200 + width])


def to_tensor(rgb: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 255


def enlarged(lr: torch.Tensor) -> torch.Tensor:
    return F.interpolate(lr, scale_factor=4, mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1


@pytest.fixture
def file(tmp_path) -> Path:
    torch.save({"params_ema": compact().state_dict()}, tmp_path / "net.pth")
    return tmp_path / "net.pth"


# ---- The LR out of its enlargement


@pytest.mark.parametrize("kind", ["photo", "noise", "black and white"])
def test_the_lr_is_recovered_to_the_bit(kind):
    rng = np.random.default_rng(0)
    rgb = {
        "photo": photo(61, 83),
        "noise": rng.integers(0, 256, (40, 52, 3)).astype(np.uint8),
        "black and white": (rng.integers(0, 2, (40, 52, 3)) * 255).astype(np.uint8),
    }[kind]
    lr = to_tensor(rgb)
    found = Recovery()(F.pixel_unshuffle(enlarged(lr), 4))
    assert torch.equal(found, lr)
    plain = F.avg_pool2d(enlarged(lr), 4) / 2 + 0.5  # what an average would give is not
    assert not torch.equal((plain * 255).round() / 255, lr)


def test_a_16_bit_lr_is_recovered_to_a_tenth_of_a_level():
    lr = torch.rand(1, 3, 30, 40, generator=torch.Generator().manual_seed(0))
    assert (Recovery()(F.pixel_unshuffle(enlarged(lr), 4)) - lr).abs().max() < 0.2 / 255


def test_the_lr_stays_exact_under_autocast_and_in_a_cast_module():
    lr = to_tensor(photo(20, 24))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Recovery().to(torch.bfloat16)(F.pixel_unshuffle(enlarged(lr), 4)), lr)


# ---- The folder


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folder_gives_the_networks_pixels_whatever_the_noise(name, tmp_path):
    net = NETWORKS[name]()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    convert(tmp_path / "net.pth", tmp_path / "model")
    generator = OneStepGenerator.from_pretrained(tmp_path / "model")
    assert generator.unet.windowed == (name == "SwinIR")
    lr = to_tensor(photo(32, 64))
    latents = generator.encode(enlarged(lr))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net(lr.clone())
        if "x2" in name:
            expected = net(expected.clamp(0, 1))
        drawn = generator.decode(generator.predict(latents, noise).x0)
    found, wanted = ((drawn + 1) / 2 * 255).double(), (expected.clamp(0, 1) * 255).double()
    undecided = ((wanted % 1) - 0.5).abs() < 1e-4  # a picture in [-1,1] rounds by that much
    assert torch.equal(found.round()[~undecided], wanted.round()[~undecided])
    assert undecided.float().mean() < 0.001 and expected.std() > 0.01
    generator.unet.noise.weight.data.normal_(std=0.1)
    with torch.no_grad():
        assert not torch.equal(generator.decode(generator.predict(latents, noise).x0), drawn)


@pytest.mark.parametrize("name", [*(n for n in NETWORKS if n != "RealCUGAN"), "ESRGAN x2, unshuffled"])
def test_a_network_can_see_the_noise_on_its_lr(name, tmp_path):
    """Its first convolution gives what it gives of the LR with the pooled noise on it."""
    net = NETWORKS[name]() if name in NETWORKS else rrdb(4, in_nc=12, shuffle_factor=2)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    convert(tmp_path / "net.pth", tmp_path / "model", noise=2.0)
    unet = OneStepGenerator.from_pretrained(tmp_path / "model").unet
    lr, rng = to_tensor(photo(32, 48)), torch.Generator().manual_seed(0)
    amount = (1 - unet.signal**2) ** 0.5  # of the noise in a noisy latent
    noise = torch.randn(1, 48, 32, 48, generator=rng) * amount
    on_the_lr = noise.unflatten(1, (3, 16)).mean(2) * (2 * 4 / amount / 255)
    assert on_the_lr.std() * 255 == pytest.approx(2, rel=0.05)
    seen = []
    unet.network.get_submodule(unet.first).register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        for picture, added in ((lr, None), (lr, noise), (lr + on_the_lr, None)):
            unet.draw(picture.clone(), added)
    plain, found, wanted = seen[:: len(seen) // 3]  # a x2 network runs twice
    change = float((wanted - plain).abs().max())
    assert change > 0.005 * float(plain.abs().max())
    torch.testing.assert_close(found, wanted, atol=1e-3 * change, rtol=0)


def test_noise_where_there_is_none_to_see_is_refused(file, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"noise 2 for the network to see, but t_noise -1 adds none"):
        convert(file, tmp_path / "model", noise=2.0, t_noise=-1)
    for level in (-1.0, 65.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"noise must be above 0 and at most 64 levels of 255; got"):
            convert(file, tmp_path / "model", noise=level)
    torch.save(NETWORKS["RealCUGAN"]().state_dict(), tmp_path / "cugan.pth")
    with pytest.raises(ValueError, match=r"RealCUGAN: does more with a picture before its first convolution"):
        convert(tmp_path / "cugan.pth", tmp_path / "model", noise=2.0)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder is not a network, and --noise is for networks alone"):
        convert(tmp_path / "folder", tmp_path / "model", noise=2.0)
    with pytest.raises(ValueError, match="--noise is for a network, and a network takes no --base"):
        convert(file, tmp_path / "model", tmp_path / "folder", noise=2.0)
    with pytest.raises(FileNotFoundError, match="gone"):
        convert(tmp_path / "gone.pth", tmp_path / "model", noise=2.0)
    assert not (tmp_path / "model").exists()
    monkeypatch.setattr(sys, "argv", ["convert", "model", "--noise=2", "--out", str(tmp_path / "n.safetensors")])
    with pytest.raises(ValueError, match="--noise makes a model folder"):
        main()


def test_the_engine_gives_the_networks_pixels(file, tmp_path):
    from engine import Upscaler
    from engine.export.generator import export_generator

    convert(file, tmp_path / "model")
    export_generator(OneStepGenerator.from_pretrained(tmp_path / "model"), tmp_path / "onnx")
    rgb = photo(37, 50)
    with torch.no_grad():
        expected = compact()(to_tensor(rgb))[0].clamp(0, 1).permute(1, 2, 0).numpy()
    assert np.array_equal(
        Upscaler.load(tmp_path / "onnx").upscale(rgb, seed=3, color="none"), np.floor(expected * 255 + 0.5)
    )


@pytest.mark.slow
def test_short_training_uses_the_noise_and_strength_0_is_the_network(file, crops, tmp_path):
    from tests.support.training import train

    convert(file, tmp_path / "model")
    options = [f"--model.pretrained={tmp_path / 'model'}", f"--data.folder={crops}", "--data.crop_size=64"]
    options += ["--mixed_precision=no", "--train_batch_size=2", "--validation_images=0", "--learning_rate=0.001"]
    train("naosd", *options, f"--output_dir={tmp_path / 'naosd'}", "--max_train_steps=3", "--vsd_weight=0",
          "--perceptual_weight=0")  # fmt: skip
    trained = tmp_path / "naosd" / "model"
    assert _spread(trained) > 0
    merge(trained, tmp_path / "strength-0", 0)
    first, last = (OneStepGenerator.from_pretrained(tmp_path / n).unet.state_dict() for n in ("model", "strength-0"))
    assert first.keys() == last.keys() and all(torch.equal(v, last[k]) for k, v in first.items())
    merge(trained, tmp_path / "merged")
    options[0] = f"--model.pretrained={tmp_path / 'merged'}"
    train("gdpo", *options, f"--output_dir={tmp_path / 'gdpo'}", "--max_train_steps=2", "--num_generations=2",
          "--reward_funcs=[psnr_y,naturalness]")  # fmt: skip
    merge(tmp_path / "gdpo" / "model", tmp_path / "tuned", 0.5)
    assert _spread(tmp_path / "tuned") > 0


def _spread(folder: Path) -> float:
    """How much two noises' pictures differ."""
    generator = OneStepGenerator.from_pretrained(folder)
    latents = generator.encode(enlarged(to_tensor(photo(16, 16)))).repeat(2, 1, 1, 1)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = generator.predict(latents, noise).x0
    return float((one - other).abs().max())


def test_ncnn_layers_get_their_authors_names():
    net = compact()
    layers = [tuple(p.detach() for p in module.parameters()) for module in net.body]
    assert {k: tuple(v.shape) for k, v in state_of_ncnn(layers).items()} == {
        k: tuple(v.shape) for k, v in net.state_dict().items()
    }
    with pytest.raises(ValueError, match="of 9 convolutions is not"):
        state_of_ncnn([(torch.zeros(1), torch.zeros(1))] * 9)


# ---- Bad input: a sentence each


class Attack:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_poisoned_pickle_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "owned"
    torch.save({"params": compact().state_dict(), "extra": Attack(marker)}, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"refused: its pickle names \w+\.system, .* nothing of it was executed"):
        convert(tmp_path / "net.pth", tmp_path / "model")
    assert not marker.exists() and not (tmp_path / "model").exists()
    torch.load(tmp_path / "net.pth", weights_only=False)
    assert marker.exists(), "the attack would not have worked"


BAD = {
    "unknown": (lambda f: torch.save({"a.weight": torch.zeros(3, 3)}, f), "no architecture that spandrel .* a.weight"),
    "x3": (lambda f: torch.save(compact(3).state_dict(), f), "is a x3 network .* expected x4, or x2"),
    "x1": (lambda f: torch.save(compact(1).state_dict(), f), "for Restoration; expected one that enlarges"),
    "damaged": (lambda f: f.write_bytes(b"no archive at all"), "not a file of weights that PyTorch wrote"),
    "diverged": (
        lambda f: torch.save({k: v * float("nan") for k, v in compact().state_dict().items()}, f),
        "net.pth: body.0.weight holds values that are not finite",
    ),
    "a list": (lambda f: torch.save([1, 2], f), "must hold a dict of weights; got list"),
    "script": (lambda f: torch.jit.script(torch.nn.Conv2d(3, 3, 3)).save(f), "TorchScript is a program"),
    "lora": (lambda f: torch.save({"rank_unet": 4}, f), "is a LoRA file: --base must name"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_bad_files_get_a_sentence(name, tmp_path):
    make, message = BAD[name]
    file = tmp_path / "net.pth"
    make(file)
    with pytest.raises(ValueError, match=message) as caught:
        convert(file, tmp_path / "model")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_safetensors_and_a_damaged_one(tmp_path):
    save_file(compact().state_dict(), tmp_path / "net.safetensors")
    assert read_state(tmp_path / "net.safetensors").keys() == compact().state_dict().keys()
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "net.safetensors").read_bytes()[:500])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        convert(tmp_path / "cut.safetensors", tmp_path / "model")


def test_the_command_line_says_one_line(tmp_path):
    torch.save(compact(3).state_dict(), tmp_path / "net.pth")
    done = commands.run("gdpo.convert", tmp_path / "net.pth", "--out", tmp_path / "model")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "x3 network" in done.stderr


def test_a_folder_of_another_network_is_refused(file, tmp_path):
    convert(file, tmp_path / "model")
    save_file({"noise.weight": torch.zeros(1)}, tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="no architecture that spandrel"):
        OneStepGenerator.from_pretrained(tmp_path / "model")
    rest = {f"network.{k}": v for k, v in compact(2).state_dict().items()}
    save_file(rest, tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="must hold a x4 Compact network; got x2 Compact"):
        OneStepGenerator.from_pretrained(tmp_path / "model")
