"""A teacher's targets: functions of their number, kept on disk, refused when damaged; NAOSD learns from them."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator

from engine.io.images import Picture, write_image
from gdpo.degradation import Degradation, DegradationConfig
from gdpo.generator import OneStepGenerator
from gdpo.model.ncnn import load_ncnn, network
from gdpo.model.tiny import TinyUNetConfig
from gdpo.photos.dataset import CropDataset, loader
from gdpo.train.config import NAOSDConfig
from gdpo.train.methods.naosd import NAOSD
from gdpo.train.options import DataConfig, ModelConfig
from gdpo.train.setup import group_noise
from gdpo.train.teacher import Targets, TeacherConfig, load_teacher, upsampled, with_grain
from tests.support import commands


def write_ncnn(stem: Path, layers: list[tuple[torch.Tensor, ...]]) -> None:
    """A network of convolutions and PReLUs in ncnn's format."""
    lines, raw = ["7767517", f"{len(layers)} {len(layers)}"], b""
    for i, layer in enumerate(layers):
        if len(layer) == 2:
            weight, bias = layer
            out, _, kernel, _ = weight.shape
            lines.append(f"Convolution c{i} 1 1 b{i} b{i + 1} 0={out} 1={kernel} 5=1 6={weight.numel()}")
            raw += struct.pack("<I", 0) + weight.numpy().tobytes() + bias.numpy().tobytes()
        else:
            lines.append(f"PReLU p{i} 1 1 b{i} b{i + 1} 0={len(layer[0])}")
            raw += layer[0].numpy().tobytes()
    stem.with_suffix(".param").write_text("\n".join(lines) + "\n")
    stem.with_suffix(".bin").write_bytes(raw)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Twelve crops of 96x96 and a small teacher."""
    root = tmp_path_factory.mktemp("world")
    (root / "crops").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        rough = torch.from_numpy(rng.random((1, 3, 12, 12), np.float32))
        crop = F.interpolate(rough, scale_factor=8, mode="bicubic").clamp(0, 1)[0].mul(255).byte()
        write_image(root / "crops" / f"{i:02d}.png", Picture(crop.permute(1, 2, 0).contiguous().numpy()))
    torch.manual_seed(0)
    layers = [(torch.randn(8, 3, 3, 3) * 0.2, torch.zeros(8)), (torch.full((8,), 0.1),)]
    write_ncnn(root / "teacher", [*layers, (torch.randn(48, 8, 3, 3) * 0.05, torch.zeros(48))])
    return root


def teacher(world: Path, **changes) -> TeacherConfig:
    options = {"name": str(world / "teacher"), "share": 0.5, "noise": 0.02, "count": 6, "crop_size": 96}
    return TeacherConfig(**options | {"cache": str(world / "cache")} | changes)


MIX = DegradationConfig(preset="light", mix={"bicubic": 1.0})


def targets(world: Path, config: TeacherConfig | None = None, seed: int = 3) -> Targets:
    config = config or teacher(world)
    return Targets(config, str(world / "crops"), Degradation(MIX), seed, torch.device("cpu"))


def test_a_network_survives_the_format_and_a_cut_one_is_named(world, tmp_path):
    layers = load_ncnn(world / "teacher")
    assert [len(layer) for layer in layers] == [2, 1, 2]
    assert network(layers)(torch.rand(1, 3, 8, 8)).shape == (1, 3, 32, 32)
    write_ncnn(tmp_path / "cut", layers)
    (tmp_path / "cut.bin").write_bytes((tmp_path / "cut.bin").read_bytes()[:-40])
    with pytest.raises(ValueError, match="cut: weights and layers do not fit"):
        load_teacher(str(tmp_path / "cut"))
    with pytest.raises(FileNotFoundError, match="neither one of real-esrgan-x4plus"):
        load_teacher(str(tmp_path / "none"))


def test_a_target_is_what_the_teacher_draws_of_the_degraded_crop_with_its_grain(world):
    made = targets(world).make(2)
    net, _ = load_teacher(str(world / "teacher"))
    seen = made.lr.float() / 255 + 0.02 * made.grain.float() / 32
    expected = net(seen[None])[0].clamp(0, 1).mul(255).round().byte()
    assert torch.equal(made.picture, expected) and made.grain.float().std() / 32 == pytest.approx(1, abs=0.1)
    assert not torch.equal(net(made.lr[None].float() / 255)[0].clamp(0, 1).mul(255).round().byte(), expected)  # teeth


def test_on_says_which_presets_are_taught(world):
    for on, clean in (("clean", True), ("degraded", False)):
        some = targets(world, teacher(world, on=on))
        drawn = {some.degrade.preset_of(3, some._sample(n)) for n in range(6)}
        assert drawn == ({"bicubic"} if clean else {"light"})
    with pytest.raises(ValueError, match=r"teacher\.on is clean, but degradation has no such preset"):
        config = teacher(world, on="clean")
        Targets(config, str(world / "crops"), Degradation(DegradationConfig("light")), 3, torch.device("cpu")).make(0)


def test_what_is_kept_is_read_and_another_config_has_another_folder(world):
    first = targets(world)
    made = first.get(1)
    stamp = first.file(1).stat().st_mtime_ns
    again = targets(world)
    assert all(torch.equal(a, b) for a, b in zip(made, again.get(1))) and again.file(1).stat().st_mtime_ns == stamp
    assert targets(world, teacher(world, noise=0.01)).folder != first.folder != targets(world, seed=4).folder


@pytest.mark.parametrize("damage", ["cut", "changed", "foreign"])
def test_a_damaged_or_foreign_target_is_named(world, tmp_path, damage):
    mine = targets(world, teacher(world, cache=str(tmp_path)))
    mine.make(0)
    content = mine.file(0).read_bytes()
    if damage == "foreign":
        other = targets(world, teacher(world, cache=str(tmp_path)), seed=9)
        other.make(0)
        content = other.file(0).read_bytes()
    elif damage == "cut":
        content = content[:-100]
    else:
        content = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
    mine.file(0).write_bytes(content)
    with pytest.raises(ValueError, match=r"000000\.safetensors .*delete it to have it made anew"):
        targets(world, teacher(world, cache=str(tmp_path))).get(0)


def test_windows_are_parts_of_targets_that_fit_each_other(world):
    some = targets(world)
    windows = some.windows([4, 5, 6], 64)
    assert windows.hr.shape == windows.picture.shape == (3, 3, 64, 64) and windows.lr.shape == (3, 3, 16, 16)
    again = some.windows([6], 64)
    assert all(torch.equal(a[2:], b) for a, b in zip(windows, again))  # of the sample's number alone
    right = (F.avg_pool2d(windows.hr, 4) - windows.lr).abs().mean()
    assert right < 0.6 * (F.avg_pool2d(windows.hr.flip(2), 4) - windows.lr).abs().mean()  # turned alike


def test_the_generators_noise_holds_the_teachers_grain():
    torch.manual_seed(0)
    noise, grain = torch.randn(2, 48, 16, 16), torch.randn(2, 3, 16, 16)
    mixed = with_grain(noise, grain)
    assert torch.allclose(mixed.unflatten(1, (3, 16)).mean(2) * 4, grain, atol=1e-5)
    assert mixed.std() == pytest.approx(1, abs=0.02)


def config_of(world: Path, **changes) -> NAOSDConfig:
    return NAOSDConfig(
        model=ModelConfig(full=True, block_out_channels=(8, 16), layers_per_block=1),
        data=DataConfig(folder=str(world / "crops"), crop_size=64),
        degradation=MIX,
        train_batch_size=4,
        pixel="l1",
        perceptual_weight=0.0,
        vsd_weight=0.0,
        mixed_precision="no",
        **{"teacher": teacher(world)} | changes,
    )


@pytest.mark.parametrize("relative", [0.0, 0.06])
def test_the_loss_of_a_taught_sample_is_shared_between_teacher_and_hr(world, relative):
    config = config_of(world, pixel_relative=relative)
    config.validate()
    method = NAOSD(config, Accelerator(cpu=True))
    samples = list(range(8))
    taught = method.targets.drawn(samples)
    assert 0 < len(taught) < 8
    dataset = CropDataset(config.data.folder, "train", 64)
    batch = next(iter(loader(dataset, [samples], seed=0)))
    metrics = method.step(batch, 0, lambda loss: None)
    _, image = method.degrade(batch.hr, seed=config.seed, samples=samples)
    windows = method.targets.windows([samples[i] for i in taught], 64)
    hr = batch.hr.clone()
    image[taught], hr[taught] = upsampled(windows.lr) / 2 + 0.5, windows.hr
    drawn = image * 2 - 1  # an untrained TinyUNet returns its input
    of_hr = (drawn - (hr * 2 - 1)).abs().mean((1, 2, 3))
    of_teacher = (drawn[taught] - (windows.picture * 2 - 1)).abs().mean((1, 2, 3))
    expected = of_hr * relative / (of_hr + 0.003) if relative else of_hr.clone()
    expected[taught] = 0.3 * of_hr[taught] + 0.7 * of_teacher
    assert torch.allclose(metrics["loss"], expected.mean(), atol=1e-5)
    assert (of_hr.mean() - expected.mean()).abs() > 1e-3  # teeth


@pytest.mark.parametrize("on", ["degraded", "clean", "all"])
def test_a_model_that_is_its_own_teacher_keeps_what_it_drew(world, on):
    config = config_of(world, teacher=TeacherConfig(name="self", weight=1.0, on=on))
    config.validate()
    method = NAOSD(config, Accelerator(cpu=True))
    samples = list(range(8))
    batch = next(iter(loader(CropDataset(config.data.folder, "train", 64), [samples], seed=0)))
    assert not float(method.step(batch, 0, lambda loss: None)["taught"])  # nothing is learned yet
    with torch.no_grad():
        for parameter in method.generator.unet.head.out.parameters():
            parameter.add_(0.05)
    kept = [i for i in samples if on == "all" or (method.degrade.preset_of(0, i) == "bicubic") == (on == "clean")]
    metrics = method.step(batch, 0, lambda loss: None)
    before = method.inputs(batch)  # an untrained TinyUNet returns its input
    noise = group_noise(method.generator.encode(before).shape, 0, "naosd", samples, 1)
    with torch.no_grad():
        now = method.generator.decode(method.generator.predict(method.generator.encode(before), noise, None).x0)
    shown = batch.hr * 2 - 1
    shown[kept] = before[kept]
    assert torch.allclose(metrics["loss"], (now - shown).abs().mean(), atol=1e-5)
    assert 0 < len(kept) < 8 or on == "all"


def test_the_generator_of_a_folder_may_teach(world, tmp_path):
    shape = TinyUNetConfig(block_out_channels=(8, 16), layers_per_block=1)
    other = OneStepGenerator.tiny(shape, seed=0)
    torch.nn.init.constant_(other.unet.head.out.bias, 0.1)
    other.save_pretrained(tmp_path / "other")
    config = config_of(world, teacher=TeacherConfig(name=str(tmp_path / "other"), weight=1.0, on="all"))
    config.validate()
    method = NAOSD(config, Accelerator(cpu=True))
    batch = next(iter(loader(CropDataset(config.data.folder, "train", 64), [[0, 1, 2, 3]], seed=0)))
    assert float(method.step(batch, 0, lambda loss: None)["taught"]) == pytest.approx(0.1, abs=5e-3)  # decode clamps
    OneStepGenerator.tiny(shape, t_noise=100).save_pretrained(tmp_path / "foreign")
    with pytest.raises(ValueError, match=r"teacher\.name: .*foreign must have the parametrisation, t_noise"):
        NAOSD(config_of(world, teacher=TeacherConfig(name=str(tmp_path / "foreign"))), Accelerator(cpu=True))


def test_a_discriminator_knows_the_teachers_pictures_alone_and_figures_have_the_same_names(world):
    config = config_of(world, adversarial_weight=0.1, teacher=TeacherConfig(name="self", weight=1.0, on="clean"))
    method = NAOSD(config, Accelerator(cpu=True))
    clean = [i for i in range(40) if method.degrade.preset_of(0, i) == "bicubic"]
    names = []
    for samples in (clean[:2], [i for i in range(40) if i not in clean][:2]):
        batch = next(iter(loader(CropDataset(config.data.folder, "train", 64), [samples], seed=0)))
        metrics = method.step(batch, 0, lambda loss: None)
        names.append(list(metrics))
        assert (float(metrics["discriminator"]) > 0) == (samples[0] in clean)
    assert names[0] == names[1]  # processes whose batches differ add up the same figures


def test_the_perceptual_distance_looks_at_a_share_of_the_degraded_samples(world):
    class Distance(torch.nn.Module):
        def forward(self, a, b):
            seen.append(len(a))
            return (a - b).square().mean((1, 2, 3))

    found, seen, samples = [], [], list(range(64))
    dataset = CropDataset(str(world / "crops"), "train", 64)
    batch = next(iter(loader(dataset, [samples], seed=0)))
    for share, on in ((1.0, "all"), (0.5, "all"), (1.0, "degraded")):
        method = NAOSD(config_of(world, perceptual_share=share, perceptual_on=on), Accelerator(cpu=True))
        method.perceptual, method.config.perceptual_weight = Distance(), 1.0
        del seen[:]
        found.append((float(method.step(batch, 0, lambda loss: None)["perceptual"]), seen[0]))
    taught = method.targets.drawn(samples)
    clean = [s for s in samples if s not in taught and method.degrade.preset_of(method.config.seed, s) == "bicubic"]
    (every, n), (half, m), (_, degraded) = found
    assert n == 64 and 20 < m < 44 and degraded == 64 - len(clean) < 64
    assert half == pytest.approx(every, rel=0.3)  # the others stand for those left out


@pytest.mark.slow
def test_the_command_makes_them_all_in_parts_and_again_none(world, tmp_path):
    options = {
        "data": {"folder": str(world / "crops"), "crop_size": 64},
        "degradation": {"preset": "light", "mix": {"bicubic": 1.0}},
        "model": {"full": True},
        "vsd_weight": 0.0,
        "teacher": {
            "name": str(world / "teacher"), "count": 5, "crop_size": 96, "noise": 0.02, "cache": str(tmp_path / "t"),
        },
    }  # fmt: skip
    (tmp_path / "F.yaml").write_text(yaml.safe_dump(options))

    def command(*arguments: str) -> subprocess.CompletedProcess:
        return commands.run("gdpo.targets", "--config", tmp_path / "F.yaml", *arguments)

    first, second = command("--part", "1/2"), command()
    assert first.returncode == 0 and "3 targets made" in first.stdout, first.stderr
    assert "2 targets made, 3 were there" in second.stdout
    assert len(list((tmp_path / "t").rglob("*.safetensors"))) == 5
    several = ["--data.folder", f"[{tmp_path},{world / 'crops'}]"]
    named = command(*several, "--teacher.folder", str(world / "crops"))
    assert "0 targets made, 5 were there" in named.stdout, named.stderr
    unnamed = command(*several)
    assert unnamed.returncode == 2 and "teacher.folder must name the crops" in unnamed.stderr
    wrong = command("--part", "3/2")
    assert wrong.returncode == 2 and "--part must be K/N" in wrong.stderr
    own = command("--teacher.name", "self")
    assert own.returncode == 2 and "teacher.name is self" in own.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"weight": 1.5}, "teacher.weight must be from 0 to 1"), ({"crop_size": 32}, "at least data.crop_size 64")],
)
def test_wrong_options_are_named(world, changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(world, teacher=teacher(world, **changes)).validate()
