"""The whole degradation: reproducible, independent of the batch, and what an independent procedure makes of it."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from engine.io.images import ImageError, read_image
from gdpo.degradation import Degradation, DegradationConfig, blur
from gdpo.degradation.__main__ import main
from gdpo.degradation.draw import draw_sample
from tests.support.degradation_baseline import degrade_one
from tests.support.photos import crops

PRESETS = ["realesrgan", "light", "bicubic"]
SILENT = {"gaussian_probability": 1.0, "gaussian_sigma": [0, 0]}


def psnr(a, b):
    return float(-10 * torch.log10((a - b).square().mean() + 1e-12))


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("preset", PRESETS)
def test_shapes_and_exact_8_bit_values(preset):
    degrade = Degradation(DegradationConfig(preset))
    hr = crops(5, 96)[..., :72]
    lr, lr_up = degrade(hr, seed=1, step=0, samples=range(5))
    assert lr.shape == (5, 3, 24, 18) and lr_up.shape == hr.shape
    assert lr.dtype == lr_up.dtype == torch.float32
    assert torch.equal(lr, (lr * 255).round() / 255)
    for image in (lr, lr_up):
        assert image.min() >= 0 and image.max() <= 1
    assert 15 < psnr(degrade.upsample(lr), hr) < 45  # degraded, and still that photo
    assert not lr.requires_grad


@pytest.mark.parametrize("jpeg", ["pillow", "torch"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_sample_is_the_same_in_any_batch(preset, jpeg, threads):
    degrade = Degradation(DegradationConfig(preset, jpeg=jpeg))
    hr = crops(8, 64)
    lr, lr_up = degrade(hr, seed=3, samples=range(40, 48))
    assert torch.get_num_threads() == threads
    for chosen in ([0], [5], [6, 1, 3]):
        again = degrade(hr[chosen], seed=3, samples=[40 + i for i in chosen], step=9)
        assert torch.equal(again[0], lr[chosen]) and torch.equal(again[1], lr_up[chosen])


def test_pillow_and_torch_jpeg_are_one_degradation():
    hr = crops(8, 64)
    pillow, own = (Degradation(DegradationConfig(jpeg=j))(hr, seed=0, samples=range(8)) for j in ("pillow", "torch"))
    assert torch.equal(pillow[0], own[0]) and torch.equal(pillow[1], own[1])


def test_seed_and_sample_change_the_result_and_nothing_else_does():
    degrade, hr = Degradation(), crops(1, 64)
    first = degrade(hr, seed=0, samples=[7])[0]
    torch.manual_seed(5)
    np.random.seed(5)
    assert torch.equal(first, degrade(hr, seed=0, samples=[7], step=3)[0])
    assert not torch.equal(first, degrade(hr, seed=1, samples=[7])[0])
    assert not torch.equal(first, degrade(hr, seed=0, samples=[8])[0])


def test_a_batch_may_come_in_any_float_layout_and_under_autocast():
    degrade, hr = Degradation(), crops(2, 64).requires_grad_()
    lr = degrade(hr, seed=0, samples=[0, 1])[0]
    assert torch.equal(lr, degrade(hr.to(memory_format=torch.channels_last), seed=0, samples=[0, 1])[0])
    assert torch.equal(lr, degrade(hr.double(), seed=0, samples=[0, 1])[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lr, degrade(hr, seed=0, samples=[0, 1])[0])
        assert degrade.upsample(lr).dtype == torch.float32


@pytest.mark.parametrize("final_sinc", [0.0, 1.0])
def test_without_noise_it_is_the_opencv_procedure(final_sinc):
    modes = ["bilinear", "bicubic"]  # OpenCV's area filter is another one
    changes = {**SILENT, "resize_modes": modes}
    config = DegradationConfig(
        first=changes, second=changes, final_sinc_probability=final_sinc, upsample_modes=modes, jpeg="torch"
    )
    degrade, hr = Degradation(config), crops(12, 96)
    lr, lr_up = degrade(hr, seed=5, samples=range(12))
    for n in range(12):
        image = np.ascontiguousarray(hr[n].permute(1, 2, 0).numpy())
        expected = degrade_one(image, draw_sample(degrade.recipe, 5, n), np.random.default_rng(0))
        for ours, theirs in zip((lr[n], lr_up[n]), expected):
            # A float that falls on the other side of a half turns one 8-bit pixel before a JPEG, and so a block.
            assert psnr(ours, torch.from_numpy(theirs).permute(2, 0, 1)) > 45


def test_a_wrong_order_would_be_seen():
    config = DegradationConfig(first=SILENT, second=SILENT, final_sinc_probability=1.0)
    degrade, hr = Degradation(config), crops(1, 96)
    sample = next(n for n in range(50) if draw_sample(degrade.recipe, 5, n).jpeg_last)
    draw = draw_sample(degrade.recipe, 5, sample)
    image = np.ascontiguousarray(hr[0].permute(1, 2, 0).numpy())
    right, wrong = (
        torch.from_numpy(degrade_one(image, d, np.random.default_rng(0))[0]).permute(2, 0, 1)
        for d in (draw, replace(draw, jpeg_last=False))
    )
    assert psnr(right, wrong) < 40


@pytest.mark.parametrize("preset", PRESETS)
def test_the_batch_as_a_gpu_takes_it(preset, monkeypatch):
    degrade, hr = Degradation(DegradationConfig(preset)), crops(8, 64)
    alone = degrade(hr, seed=2, samples=range(8))
    # The way of other devices, on the CPU: the whole batch in one chain, blurred together.
    monkeypatch.setattr(blur, "_blur_each", blur._blur_together)
    together = degrade._degrade(hr, 2, list(range(8)))
    for a, b in zip(alone, together):
        assert min(psnr(x, y) for x, y in zip(a, b)) > 45


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("preset", PRESETS)
def test_a_gpu_makes_the_same_pictures(preset):
    degrade, hr = Degradation(DegradationConfig(preset)), crops(16, 128)
    lr, lr_up = degrade(hr, seed=2, samples=range(16))
    there, there_up = degrade(hr.cuda(), seed=2, samples=range(16))
    assert there.is_cuda and torch.equal(there, (there * 255).round() / 255)
    for a, b in ((lr, there), (lr_up, there_up)):
        assert min(psnr(x, y) for x, y in zip(a, b.cpu())) > 45
    again = degrade(hr.cuda(), seed=2, samples=range(16))
    assert torch.equal(again[0], there) and torch.equal(again[1], there_up)


def test_the_smallest_size_works_for_every_draw():
    for preset in PRESETS:
        degrade = Degradation(DegradationConfig(preset))
        side = -(-degrade.smallest_side // 4) * 4
        hr = torch.rand(1, 3, side, side).expand(150, -1, -1, -1)
        lr, _ = degrade(hr, seed=0, samples=range(150))
        assert lr.isfinite().all()


@pytest.mark.parametrize(
    ("hr", "samples", "words"),
    [
        (torch.rand(1, 3, 64, 66), [0], "multiples of 4 and at least 44; got 64x66"),
        (torch.rand(1, 3, 40, 64), [0], "at least 44; got 40x64"),
        (torch.rand(3, 64, 64), [0], "hr must be [B,3,H,W]; got (3, 64, 64)"),
        (torch.rand(1, 1, 64, 64), [0], "hr must be [B,3,H,W]; got (1, 1, 64, 64)"),
        (torch.rand(0, 3, 64, 64), [], "hr must be [B,3,H,W]; got (0, 3, 64, 64)"),
        (torch.rand(1, 3, 64, 64) * 2 - 1, [0], "hr must lie in [0,1]; got values from -"),
        (torch.full((1, 3, 64, 64), 1.01), [0], "hr must lie in [0,1]"),
        (torch.full((1, 3, 64, 64), float("nan")), [0], "hr must lie in [0,1]"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [0], "hr must be a floating tensor with values in [0,1]"),
        (np.zeros((1, 3, 64, 64)), [0], "hr must be a floating tensor with values in [0,1]; got ndarray"),
        (torch.rand(2, 3, 64, 64), [0], "one global sample index per image, 2; got 1"),
    ],
)
def test_bad_batches_are_refused_in_words(hr, samples, words):
    with pytest.raises((ValueError, TypeError)) as error:
        Degradation()(hr, seed=0, samples=samples)
    assert words in str(error.value)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for n, crop in enumerate(crops(2, 102)):
        Image.fromarray((crop * 255).byte().permute(1, 2, 0).numpy()).save(folder / f"photo{n}.png")
    return folder


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["degradation", *map(str, arguments)])
    return main()


def test_the_command_writes_sheets_and_pairs(photos, tmp_path, monkeypatch):
    sheet, pairs = tmp_path / "new" / "sheet.png", tmp_path / "pairs"
    light = ("--degradation.preset", "light", "--degradation.second.jpeg_quality", "[90,95]")
    command(monkeypatch, "--in", photos, "--out", sheet, "--size", 64, "--count", 3, "--pairs", pairs, *light)
    assert read_image(sheet).pixels.shape == (2 * 64, 4 * 64, 3)
    assert sorted(p.relative_to(pairs).as_posix() for p in pairs.rglob("*.png")) == [
        "HR/photo0.png", "HR/photo1.png", "LR/photo0.png", "LR/photo1.png",
    ]  # fmt: skip
    assert read_image(pairs / "HR/photo1.png").pixels.shape == (100, 100, 3)
    assert read_image(pairs / "LR/photo1.png").pixels.shape == (25, 25, 3)


def test_a_photo_without_a_pair_is_named_and_the_others_are_what_they_were(photos, tmp_path, monkeypatch, capsys):
    light = ("--degradation.preset", "light")
    assert command(monkeypatch, "--in", photos, "--pairs", tmp_path / "whole", *light) == 0
    (photos / "._photo0.png").write_bytes(b"what macOS leaves beside a picture")
    (photos / "photo0.png").write_bytes((photos / "photo0.png").read_bytes()[:1000])
    Image.new("RGB", (8, 8)).save(photos / "photo2.png")
    assert command(monkeypatch, "--in", photos, "--pairs", tmp_path / "pairs", *light) == 1
    for side in ("HR", "LR"):
        assert [p.name for p in (tmp_path / "pairs" / side).iterdir()] == ["photo1.png"]
        written = [(tmp_path / name / side / "photo1.png").read_bytes() for name in ("whole", "pairs")]
        assert written[0] == written[1]
    out = capsys.readouterr()
    assert "pairs: 1 pairs in HR and LR" in out.out
    lines = [line for line in out.err.splitlines() if line.startswith("left out: ")]
    assert len(lines) == 2 and "photo0.png: damaged" in lines[0] and "photo2.png: " in lines[1]
    (photos / "photo1.png").unlink()
    with pytest.raises(ValueError, match="--pairs: no photo of 2 gave a pair; the last: "):
        command(monkeypatch, "--in", photos, "--pairs", tmp_path / "none", *light)


def test_the_command_refuses_bad_input_in_words(photos, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="is smaller than --size 200"):
        command(monkeypatch, "--in", photos, "--out", tmp_path / "s.png", "--size", 200)
    with pytest.raises(ValueError, match="no such file or folder"):
        command(monkeypatch, "--in", tmp_path / "none", "--out", tmp_path / "s.png")
    (photos / "text.png").write_text("not a picture")
    with pytest.raises(ImageError, match=r"text\.png: not a picture of a kind that is read \(PNG, "):
        command(monkeypatch, "--in", photos, "--out", tmp_path / "s.png", "--size", 64)
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "--in", photos)
    assert stop.value.code == 2 and "give --out SHEET.png or --pairs FOLDER" in capsys.readouterr().err
    assert not (tmp_path / "s.png").exists()
