"""The torch JPEG against Pillow's libjpeg: equal to the bit, on photos, noise, odd sizes and every quality."""

import pytest
import torch
import torch.nn.functional as F
from skimage import data

from gdpo.degradation import jpeg as module
from gdpo.degradation.jpeg import jpeg


def photo(name, height=160, width=160):
    pixels = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None].float() / 255
    return pixels[:, :, 40 : 40 + height, 100 : 100 + width]


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket"])
@pytest.mark.parametrize("quality", [5, 49, 50, 60, 75, 95, 100])
def test_photos_equal_pillows(name, quality):
    image = photo(name)
    real, torch_ = jpeg([image], [quality], "pillow")[0], jpeg([image], [quality], "torch")[0]
    assert torch.equal(real, torch_)
    assert (real - image).abs().mean() > 1e-3 or quality == 100  # something was lost


def test_ragged_batches_of_anything_equal_pillows():
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    images = []
    for n in range(80):
        height, width = draw(1, 60), draw(module.SMALLEST, 60)
        if n % 4 == 0:
            image = torch.rand(1, 3, height, width, generator=generator)
        elif n % 4 == 1:
            image = torch.rand(1, 3, height, width, generator=generator).round()
        elif n % 4 == 2:
            image = torch.rand(1, 3, 1, 1, generator=generator).expand(1, 3, height, width)
        else:
            coarse = torch.rand(1, 3, 5, 5, generator=generator)
            image = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)  # leaves [0,1]
        images.append(image)
    qualities = [draw(1, 101) for _ in images]
    real, torch_ = jpeg(images, qualities, "pillow"), jpeg(images, qualities, "torch")
    assert [n for n, (a, b) in enumerate(zip(real, torch_)) if not torch.equal(a, b)] == []


@pytest.mark.parametrize("fault", ["quality", "fancy", "dct"])
def test_a_planted_fault_is_seen(fault, monkeypatch):
    image = photo("chelsea", 96, 80)
    real = jpeg([image], [80], "pillow")[0]
    if fault == "fancy":
        monkeypatch.setattr(module, "_doubled", lambda planes: F.interpolate(planes, scale_factor=2, mode="nearest"))
    if fault == "dct":  # the nearest whole numbers instead of libjpeg's
        dct = module._dct(torch.device("cpu")).clone()
        dct[2, 3] += 1
        monkeypatch.setattr(module, "_dct", lambda device: dct)
    assert not torch.equal(real, jpeg([image], [81 if fault == "quality" else 80], "torch")[0])


def test_auto_takes_pillow_on_the_cpu_and_nothing_is_nothing(monkeypatch):
    monkeypatch.setattr(module, "_through_torch", lambda *_: pytest.fail("torch was taken"))
    assert jpeg([photo("coffee")], [70], "auto")[0].shape == (1, 3, 160, 160)
    assert jpeg([], [], "torch") == []
